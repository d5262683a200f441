#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "simt/api.h"
#include "simt/runner.h"

namespace {
struct Work {
  std::function<void()> run;
  std::function<bool()> ready = nullptr;  // null: as soon as what is before it is done
};
}  // namespace
struct CUgraph_st {
  std::vector<Work> work;
};
struct CUgraphExec_st : CUgraph_st {};
struct CUstream_st {
  int device = 0;
  std::deque<Work> work;
  std::unique_ptr<CUgraph_st> captured;  // null: work is done
};
struct CUevent_st {
  CUevent_st* origin = nullptr;   // opened by handle: the event that is meant
  CUstream_st* stream = nullptr;  // of the last record
  int recorded = 0, done = 0;     // records made, records passed
  std::chrono::steady_clock::time_point at;
};

namespace {

constexpr size_t kAlign = 256;  // what cudaMalloc promises
constexpr int kVersion = 12040;

// Work on a stream waits in its queue until somebody needs it, or until it is picked at random when
// other work is enqueued: any order that streams and events allow may be the one that happens. One
// lock for all: two OS threads never run device work at the same time.
struct Device {
  std::recursive_mutex mutex;
  int count = 1;
  size_t total = size_t{8} << 30;
  size_t used = 0;
  std::map<void*, size_t> allocations;
  std::map<const char*, size_t> pinned;
  std::set<cudaStream_t> streams;
  std::minstd_rand random;
  bool refuse_ipc = false, refuse_graphs = false, refuse_peers = false, refuse_register = false;
  std::set<std::pair<int, int>> peers;  // device, peer: enabled
  int refuse_device = -1;  // graphs of this one, `late`: by a launch within the capture
  bool refuse_late = false;
  std::map<void*, int> opened;  // by handle, how often
  bool share_memory = false;
  std::map<void*, int> shared;     // allocations that other processes may map: the file
  std::map<void*, size_t> mapped;  // of other processes
};
Device& TheDevice() {
  static auto* device = new Device;  // outlives every stream
  return *device;
}
thread_local int current_device = 0;
thread_local int lock_depth = 0;
class Lock {
 public:
  explicit Lock(std::recursive_mutex& mutex) : mutex_(mutex) {
    mutex_.lock();
    ++lock_depth;
  }
  ~Lock() {
    --lock_depth;
    mutex_.unlock();
  }
  Lock(const Lock&) = delete;
  Lock& operator=(const Lock&) = delete;

 private:
  std::recursive_mutex& mutex_;
};

// What is waited for comes from another thread: lets it have the lock.
void Pause() {
  const int depth = lock_depth;
  for (int i = 0; i < depth; ++i) TheDevice().mutex.unlock();
  std::this_thread::sleep_for(std::chrono::microseconds(50));
  for (int i = 0; i < depth; ++i) TheDevice().mutex.lock();
}

// False: the stream has nothing to do, or nothing that can be done yet.
bool RunOne(cudaStream_t stream) {
  if (stream->work.empty()) return false;
  if (stream->work.front().ready && !stream->work.front().ready()) return false;
  const Work work = std::move(stream->work.front());
  stream->work.pop_front();
  work.run();
  return true;
}
// One step of `stream` or of what it may wait for.
void Progress(cudaStream_t stream) {
  if (RunOne(stream)) return;
  bool any = false;
  for (const cudaStream_t other : TheDevice().streams) any = any || RunOne(other);
  if (!any) Pause();
}
void RunAll(cudaStream_t stream) {
  while (!stream->work.empty()) Progress(stream);
}
void RunUntil(cudaEvent_t event, int record) {
  while (event->done < record) Progress(event->stream);
}
// Of the current device. Streams may go meanwhile.
void RunEverything() {
  const auto busy = []() -> cudaStream_t {
    for (const cudaStream_t s : TheDevice().streams) {
      if (s->device == current_device && !s->work.empty()) return s;
    }
    return nullptr;
  };
  while (const cudaStream_t stream = busy()) Progress(stream);
}

thread_local cudaError_t last_error = cudaSuccess;
cudaError_t Return(cudaError_t error) {
  if (error != cudaSuccess && error != cudaErrorNotReady) last_error = error;
  return error;
}

// The capture of this thread, and whether it is lost.
thread_local cudaStream_t capturing = nullptr;
thread_local bool capture_lost = false;

// For calls that a capture does not allow: they fail, and so does the capture.
bool Refused() {
  if (capturing == nullptr) return false;
  capture_lost = true;
  last_error = cudaErrorStreamCaptureUnsupported;
  return true;
}

// The default stream is in step with the host.
void Enqueue(cudaStream_t stream, Work work) {
  const Lock lock(TheDevice().mutex);
  if (stream == nullptr) {
    RunEverything();
    work.run();
    return;
  }
  if (stream->captured != nullptr) {
    stream->captured->work.push_back(std::move(work));
    const bool refused = TheDevice().refuse_late && TheDevice().refuse_device == stream->device;
    if (refused && stream->captured->work.size() == 2) Refused();
    return;
  }
  stream->work.push_back(std::move(work));
  // The low bits of this generator follow a short cycle.
  const auto draw = [] { return TheDevice().random() >> 8; };
  if (draw() % 2 == 0) return;  // often enough that work falls behind by several calls
  for (const cudaStream_t any : TheDevice().streams) {
    for (auto n = draw() % 3; n > 0 && RunOne(any); --n) {
    }
  }
}

bool IsPinned(const void* p, size_t bytes) {
  const auto& pinned = TheDevice().pinned;
  auto at = pinned.upper_bound(static_cast<const char*>(p));
  if (at == pinned.begin()) return false;
  --at;
  return static_cast<const char*>(p) + bytes <= at->first + at->second;
}
bool Within(const std::map<void*, size_t>& memory, const void* p) {
  auto at = memory.upper_bound(const_cast<void*>(p));
  if (at == memory.begin()) return false;
  --at;
  return p < static_cast<const char*>(at->first) + at->second;
}
bool IsDevices(const void* p) {
  return Within(TheDevice().allocations, p) || Within(TheDevice().mapped, p);
}

// What a handle of memory or of an event says.
struct IpcHandle {
  int64_t process = 0;
  void* at = nullptr;  // there
  int64_t bytes = 0;
  int file = -1;  // there; -1: not to be mapped elsewhere
};
static_assert(sizeof(IpcHandle) <= sizeof(cudaIpcMemHandle_t::reserved));

constexpr size_t kSharedBytes = size_t{2} << 20;

// Memory behind a file, which /proc names to other processes. Null: the system has none.
void* AllocateShared(size_t bytes) {
  const int file = memfd_create("simt-device-memory", MFD_CLOEXEC);
  if (file < 0) return nullptr;
  void* p = MAP_FAILED;
  if (ftruncate(file, static_cast<off_t>(bytes)) == 0) {
    p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  }
  if (p == MAP_FAILED) {
    close(file);
    return nullptr;
  }
  TheDevice().shared[p] = file;
  return p;
}
void FreeShared(std::map<void*, int>::iterator at, size_t bytes) {
  munmap(at->first, bytes);
  close(at->second);
  TheDevice().shared.erase(at);
}
void Pin(void* p, size_t bytes) {
  const Lock lock(TheDevice().mutex);
  TheDevice().pinned[static_cast<char*>(p)] = bytes;
}

cudaError_t HostAllocate(void** p, size_t bytes) {
  *p = nullptr;
  if (Refused()) return cudaErrorStreamCaptureUnsupported;
  if (posix_memalign(p, 4096, bytes == 0 ? 1 : bytes) != 0) {
    return Return(cudaErrorMemoryAllocation);
  }
  Pin(*p, bytes);
  return cudaSuccess;
}

}  // namespace

namespace simt {
void EnqueueKernel(cudaStream_t stream, dim3 grid, dim3 block, size_t dynamic_shared_bytes,
                   std::function<void()> thread_body) {
  if (stream == nullptr) {  // without the lock: tests launch from several threads
    {
      const Lock lock(TheDevice().mutex);
      RunEverything();
    }
    Run(grid, block, dynamic_shared_bytes, thread_body);
    return;
  }
  Enqueue(stream, {[=] { Run(grid, block, dynamic_shared_bytes, thread_body); }});
}

void EnqueueWaitingKernel(cudaStream_t stream, dim3 grid, dim3 block,
                          std::function<void()> thread_body) {
  // Of each launch of a graph anew; launches of one stream never overlap.
  const auto threads = std::make_shared<BlockThreads>();
  const Lock lock(TheDevice().mutex);
  Enqueue(stream,
          {[=] { threads->Start(grid, block, TheDevice().random(), thread_body); }, nullptr});
  Enqueue(stream, {[=] { threads->Finish(); }, [=] { return threads->done(); }});
}

void EnqueueHost(cudaStream_t stream, std::function<bool()> ready, std::function<void()> run) {
  Enqueue(stream, {std::move(run), std::move(ready)});
}

bool IsCaptured(cudaStream_t stream) {
  const Lock lock(TheDevice().mutex);
  return stream->captured != nullptr;
}

void RunAsMuchAsCanBe() {
  const Lock lock(TheDevice().mutex);
  bool any = true;
  while (any) {
    any = false;
    for (const cudaStream_t stream : TheDevice().streams) any = RunOne(stream) || any;
  }
}

void SetDevices(int count) {
  const Lock lock(TheDevice().mutex);
  TheDevice().count = count;
}

void SetDeviceMemory(size_t bytes) {
  const Lock lock(TheDevice().mutex);
  TheDevice().total = bytes;
}

void RefuseGraphs(bool refuse) {
  const Lock lock(TheDevice().mutex);
  TheDevice().refuse_graphs = refuse;
}

void RefuseGraphsOf(int device, bool late) {
  const Lock lock(TheDevice().mutex);
  TheDevice().refuse_device = device;
  TheDevice().refuse_late = late;
}

void RefusePeerAccess(bool refuse) {
  const Lock lock(TheDevice().mutex);
  TheDevice().refuse_peers = refuse;
}

void RefuseHostRegister(bool refuse) {
  const Lock lock(TheDevice().mutex);
  TheDevice().refuse_register = refuse;
}

void ShareMemory() {
  const Lock lock(TheDevice().mutex);
  TheDevice().share_memory = true;
}

void RefuseIpc(bool refuse) {
  const Lock lock(TheDevice().mutex);
  TheDevice().refuse_ipc = refuse;
}
}  // namespace simt

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorNoDevice:
      return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorNotReady:
      return "device not ready";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated:
      return "operation failed due to a previous error during capture";
    default:
      return "invalid argument";
  }
}
const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorNoDevice:
      return "cudaErrorNoDevice";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorNotReady:
      return "cudaErrorNotReady";
    case cudaErrorStreamCaptureUnsupported:
      return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureInvalidated:
      return "cudaErrorStreamCaptureInvalidated";
    default:
      return "cudaErrorInvalidValue";
  }
}
cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return last_error; }

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = kVersion;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = kVersion;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = TheDevice().count;
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) {
  const Lock lock(TheDevice().mutex);
  const int count = TheDevice().count;
  *can = device != peer && !TheDevice().refuse_peers ? 1 : 0;
  return device < count && peer < count ? cudaSuccess : Return(cudaErrorInvalidDevice);
}
cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned) {
  const Lock lock(TheDevice().mutex);
  if (TheDevice().refuse_peers || peer == current_device) return Return(cudaErrorInvalidDevice);
  return TheDevice().peers.emplace(current_device, peer).second
             ? cudaSuccess
             : Return(cudaErrorPeerAccessAlreadyEnabled);
}
cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= TheDevice().count) return Return(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (device < 0 || device >= TheDevice().count) return Return(cudaErrorInvalidDevice);
  *properties = {};
  properties->pciBusID = device;
  std::strcpy(properties->name, "SIMT stand-in");
  properties->totalGlobalMem = TheDevice().total;
  properties->sharedMemPerBlock = 49152;
  properties->sharedMemPerBlockOptin = 101376;
  properties->multiProcessorCount = 4;
  properties->major = 8;
  properties->minor = 6;
  properties->l2CacheSize = 1 << 20;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp p;
  if (const cudaError_t error = cudaGetDeviceProperties(&p, device); error != cudaSuccess) {
    return error;
  }
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(p.sharedMemPerBlockOptin);
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = p.multiProcessorCount;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = p.major;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = p.minor;
      return cudaSuccess;
  }
  return Return(cudaErrorInvalidValue);
}
cudaError_t cudaDeviceSynchronize() {
  if (Refused()) return cudaErrorStreamCaptureUnsupported;
  const Lock lock(TheDevice().mutex);
  RunEverything();
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  const Lock lock(TheDevice().mutex);
  *total = TheDevice().total;
  *free = TheDevice().total - TheDevice().used;
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** p, size_t bytes) {
  *p = nullptr;
  if (Refused()) return cudaErrorStreamCaptureUnsupported;
  Device& device = TheDevice();
  const Lock lock(device.mutex);
  if (bytes > device.total - device.used) return Return(cudaErrorMemoryAllocation);
  if (bytes == 0) return cudaSuccess;
  if (device.share_memory && bytes % kSharedBytes == 0) {
    *p = AllocateShared(bytes);
  } else if (posix_memalign(p, kAlign, bytes) != 0) {
    *p = nullptr;
  }
  if (*p == nullptr) return Return(cudaErrorMemoryAllocation);
  // What is read before it was written shows as NaN. Only small blocks: a pool's pages stay
  // untouched.
  std::memset(*p, 0xFF, bytes < (size_t{64} << 20) ? bytes : 0);
  device.used += bytes;
  device.allocations[*p] = bytes;
  return cudaSuccess;
}
cudaError_t cudaFree(void* p) {
  if (p == nullptr) return cudaSuccess;
  if (Refused()) return cudaErrorStreamCaptureUnsupported;
  Device& device = TheDevice();
  const Lock lock(device.mutex);
  const auto at = device.allocations.find(p);
  if (at == device.allocations.end()) return Return(cudaErrorInvalidValue);
  RunEverything();
  const size_t bytes = at->second;
  device.used -= bytes;
  device.allocations.erase(at);
  if (const auto shared = device.shared.find(p); shared != device.shared.end()) {
    FreeShared(shared, bytes);
  } else {
    std::free(p);
  }
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) { return HostAllocate(p, bytes); }
cudaError_t cudaMallocHost(void** p, size_t bytes) { return HostAllocate(p, bytes); }
cudaError_t cudaFreeHost(void* p) {
  if (Refused()) return cudaErrorStreamCaptureUnsupported;
  const Lock lock(TheDevice().mutex);
  RunEverything();
  TheDevice().pinned.erase(static_cast<char*>(p));
  std::free(p);
  return cudaSuccess;
}
cudaError_t cudaHostRegister(void* p, size_t bytes, unsigned) {
  if (TheDevice().refuse_register) return Return(cudaErrorInvalidValue);
  Pin(p, bytes);
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* p) {
  const Lock lock(TheDevice().mutex);
  RunEverything();
  TheDevice().pinned.erase(static_cast<char*>(p));
  return cudaSuccess;
}

cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  *device = host;
  return cudaSuccess;
}

cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                              size_t width, size_t height, cudaMemcpyKind kind,
                              cudaStream_t stream) {
  if (width == 0 || height == 0) return cudaSuccess;
  const Lock lock(TheDevice().mutex);
  const auto copy = [=](const char* source) {
    for (size_t i = 0; i < height; ++i) {
      std::memcpy(static_cast<char*>(to) + i * to_pitch, source + i * from_pitch, width);
    }
  };
  const auto* source = static_cast<const char*>(from);
  const size_t from_bytes = (height - 1) * from_pitch + width;
  const size_t to_bytes = (height - 1) * to_pitch + width;
  const bool pageable = (!IsPinned(from, from_bytes) && !IsDevices(from)) ||
                        (!IsPinned(to, to_bytes) && !IsDevices(to));
  if ((stream == nullptr || pageable) && Refused()) return cudaErrorStreamCaptureUnsupported;
  if (kind == cudaMemcpyHostToDevice && !IsPinned(from, from_bytes)) {
    // Pageable memory is read before the call returns.
    Enqueue(stream, {[copy, staged = std::vector<char>(source, source + from_bytes)] {
              copy(staged.data());
            }});
    return cudaSuccess;
  }
  Enqueue(stream, {[copy, source] { copy(source); }});
  if (kind == cudaMemcpyDeviceToHost && !IsPinned(to, to_bytes)) {
    return cudaStreamSynchronize(stream);  // and pageable memory is written before it does
  }
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  return cudaMemcpy2DAsync(to, bytes, from, bytes, bytes, 1, kind, stream);
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return cudaMemcpyAsync(to, from, bytes, kind, nullptr);
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream) {
  if (bytes > 0) Enqueue(stream, {[=] { std::memset(p, value, bytes); }});
  return cudaSuccess;
}
cudaError_t cudaMemset(void* p, int value, size_t bytes) {
  return cudaMemsetAsync(p, value, bytes, nullptr);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  const Lock lock(TheDevice().mutex);
  *stream = new CUstream_st;
  (*stream)->device = current_device;
  TheDevice().streams.insert(*stream);
  return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithFlags(stream, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  const Lock lock(TheDevice().mutex);
  RunAll(stream);
  TheDevice().streams.erase(stream);
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (Refused()) return cudaErrorStreamCaptureUnsupported;
  const Lock lock(TheDevice().mutex);
  if (stream == nullptr) {
    RunEverything();
  } else {
    RunAll(stream);
  }
  return cudaSuccess;
}
// Whoever polls must see progress.
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  if (Refused()) return cudaErrorStreamCaptureUnsupported;
  const Lock lock(TheDevice().mutex);
  if (stream == nullptr || stream->work.empty()) return cudaSuccess;
  Progress(stream);
  return cudaErrorNotReady;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  if (Refused()) return cudaErrorStreamCaptureUnsupported;
  const Lock lock(TheDevice().mutex);
  if (event->origin != nullptr) event = event->origin;
  Enqueue(stream, {[] {}, [event, record = event->recorded] { return event->done >= record; }});
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new CUevent_st;
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  const Lock lock(TheDevice().mutex);
  RunEverything();
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  if (Refused()) return cudaErrorStreamCaptureUnsupported;
  const Lock lock(TheDevice().mutex);
  if (event->stream != stream) RunUntil(event, event->recorded);
  event->stream = stream;
  ++event->recorded;
  Enqueue(stream, {[event, record = event->recorded] {
            event->done = record;
            event->at = std::chrono::steady_clock::now();
          }});
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (Refused()) return cudaErrorStreamCaptureUnsupported;
  const Lock lock(TheDevice().mutex);
  RunUntil(event, event->recorded);
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  if (Refused()) return cudaErrorStreamCaptureUnsupported;
  const Lock lock(TheDevice().mutex);
  if (event->done == event->recorded) return cudaSuccess;
  Progress(event->stream);
  return cudaErrorNotReady;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  *milliseconds = std::chrono::duration<float, std::milli>(end->at - begin->at).count();
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  const Lock lock(TheDevice().mutex);
  const bool refused = TheDevice().refuse_graphs ||
                       (TheDevice().refuse_device == current_device && !TheDevice().refuse_late);
  if (stream == nullptr || capturing != nullptr || refused) {
    return Return(cudaErrorStreamCaptureUnsupported);
  }
  stream->captured = std::make_unique<CUgraph_st>();
  capturing = stream;
  capture_lost = false;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  const Lock lock(TheDevice().mutex);
  *status = stream->captured == nullptr ? cudaStreamCaptureStatusNone
            : capture_lost              ? cudaStreamCaptureStatusInvalidated
                                        : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  const Lock lock(TheDevice().mutex);
  *graph = nullptr;
  if (stream == nullptr || capturing != stream) return Return(cudaErrorInvalidValue);
  std::unique_ptr<CUgraph_st> captured = std::move(stream->captured);
  capturing = nullptr;
  if (capture_lost) return Return(cudaErrorStreamCaptureInvalidated);
  *graph = captured.release();
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  *exec = new CUgraphExec_st{*graph};
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  for (const Work& work : exec->work) Enqueue(stream, work);
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete exec;
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* p) {
  Device& device = TheDevice();
  const Lock lock(device.mutex);
  const auto allocation = device.allocations.find(p);
  if (device.refuse_ipc || allocation == device.allocations.end()) {
    return Return(cudaErrorInvalidValue);
  }
  IpcHandle h;
  h.process = getpid();
  h.at = p;
  h.bytes = static_cast<int64_t>(allocation->second);
  if (const auto shared = device.shared.find(p); shared != device.shared.end()) {
    h.file = shared->second;
  }
  std::memcpy(handle->reserved, &h, sizeof h);
  return cudaSuccess;
}
cudaError_t cudaIpcOpenMemHandle(void** p, cudaIpcMemHandle_t handle, unsigned) {
  Device& device = TheDevice();
  const Lock lock(device.mutex);
  IpcHandle h;
  std::memcpy(&h, handle.reserved, sizeof h);
  *p = h.at;
  if (h.process != getpid()) {
    const std::string path = "/proc/" + std::to_string(h.process) + "/fd/" + std::to_string(h.file);
    const int file = open(path.c_str(), O_RDWR | O_CLOEXEC);
    if (file < 0) return Return(cudaErrorInvalidValue);
    *p = mmap(nullptr, h.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (*p == MAP_FAILED) return Return(cudaErrorInvalidValue);
    device.mapped[*p] = h.bytes;
  } else if (device.allocations.count(*p) == 0) {  // a test that says it were another process
    return Return(cudaErrorInvalidValue);
  }
  ++device.opened[*p];
  return cudaSuccess;
}
cudaError_t cudaIpcCloseMemHandle(void* p) {
  Device& device = TheDevice();
  const Lock lock(device.mutex);
  if (--device.opened[p] < 0) return Return(cudaErrorInvalidValue);
  if (const auto at = device.mapped.find(p); at != device.mapped.end()) {
    munmap(p, at->second);
    device.mapped.erase(at);
  }
  return cudaSuccess;
}
cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t* handle, cudaEvent_t event) {
  const Lock lock(TheDevice().mutex);
  if (TheDevice().refuse_ipc) return Return(cudaErrorInvalidValue);
  const IpcHandle h = {.process = getpid(), .at = event};
  std::memcpy(handle->reserved, &h, sizeof h);
  return cudaSuccess;
}
cudaError_t cudaIpcOpenEventHandle(cudaEvent_t* event, cudaIpcEventHandle_t handle) {
  IpcHandle h;
  std::memcpy(&h, handle.reserved, sizeof h);
  if (h.process != getpid()) return Return(cudaErrorInvalidValue);
  *event = new CUevent_st;
  (*event)->origin = static_cast<cudaEvent_t>(h.at);
  return cudaSuccess;
}
