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
#include <utility>
#include <vector>

#include "simt/api.h"
#include "simt/runner.h"

struct CUgraph_st {
  std::vector<std::function<void()>> work;
};
struct CUgraphExec_st : CUgraph_st {};
struct CUstream_st {
  std::deque<std::function<void()>> work;
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
  size_t total = size_t{8} << 30;
  size_t used = 0;
  std::map<void*, size_t> allocations;
  std::map<const char*, size_t> pinned;
  std::set<cudaStream_t> streams;
  std::minstd_rand random;
  bool refuse_ipc = false, refuse_graphs = false;
  std::map<void*, int> opened;  // by handle, how often
};
Device& TheDevice() {
  static auto* device = new Device;  // outlives every stream
  return *device;
}
using Lock = std::lock_guard<std::recursive_mutex>;

void RunOne(cudaStream_t stream) {
  const std::function<void()> work = std::move(stream->work.front());
  stream->work.pop_front();
  work();
}
void RunAll(cudaStream_t stream) {
  while (!stream->work.empty()) RunOne(stream);
}
void RunUntil(cudaEvent_t event, int record) {
  while (event->done < record) RunOne(event->stream);
}
void RunEverything() {
  for (const cudaStream_t stream : TheDevice().streams) RunAll(stream);
}

// The default stream is in step with the host.
void Enqueue(cudaStream_t stream, std::function<void()> work) {
  const Lock lock(TheDevice().mutex);
  if (stream == nullptr) {
    RunEverything();
    work();
    return;
  }
  if (stream->captured != nullptr) {
    stream->captured->work.push_back(std::move(work));
    return;
  }
  stream->work.push_back(std::move(work));
  // The low bits of this generator follow a short cycle.
  const auto draw = [] { return TheDevice().random() >> 8; };
  if (draw() % 2 == 0) return;  // often enough that work falls behind by several calls
  for (const cudaStream_t any : TheDevice().streams) {
    for (auto n = draw() % 3; n > 0 && !any->work.empty(); --n) RunOne(any);
  }
}

bool IsPinned(const void* p, size_t bytes) {
  const auto& pinned = TheDevice().pinned;
  auto at = pinned.upper_bound(static_cast<const char*>(p));
  if (at == pinned.begin()) return false;
  --at;
  return static_cast<const char*>(p) + bytes <= at->first + at->second;
}
bool IsDevices(const void* p) {
  const auto& allocations = TheDevice().allocations;
  auto at = allocations.upper_bound(const_cast<void*>(p));
  if (at == allocations.begin()) return false;
  --at;
  return p < static_cast<const char*>(at->first) + at->second;
}
void Pin(void* p, size_t bytes) {
  const Lock lock(TheDevice().mutex);
  TheDevice().pinned[static_cast<char*>(p)] = bytes;
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
  Enqueue(stream, [=] { Run(grid, block, dynamic_shared_bytes, thread_body); });
}

void SetDeviceMemory(size_t bytes) {
  const Lock lock(TheDevice().mutex);
  TheDevice().total = bytes;
}

void RefuseGraphs(bool refuse) {
  const Lock lock(TheDevice().mutex);
  TheDevice().refuse_graphs = refuse;
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
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) {
  *can = 0;
  return device == 0 && peer == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  return Return(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (device != 0) return Return(cudaErrorInvalidDevice);
  *properties = {};
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
  if (posix_memalign(p, kAlign, bytes) != 0) return Return(cudaErrorMemoryAllocation);
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
  device.used -= at->second;
  device.allocations.erase(at);
  std::free(p);
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
  Pin(p, bytes);
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* p) {
  const Lock lock(TheDevice().mutex);
  RunEverything();
  TheDevice().pinned.erase(static_cast<char*>(p));
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
    Enqueue(stream, [copy, staged = std::vector<char>(source, source + from_bytes)] {
      copy(staged.data());
    });
    return cudaSuccess;
  }
  Enqueue(stream, [copy, source] { copy(source); });
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
  if (bytes > 0) Enqueue(stream, [=] { std::memset(p, value, bytes); });
  return cudaSuccess;
}
cudaError_t cudaMemset(void* p, int value, size_t bytes) {
  return cudaMemsetAsync(p, value, bytes, nullptr);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  const Lock lock(TheDevice().mutex);
  *stream = new CUstream_st;
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
  RunOne(stream);
  return cudaErrorNotReady;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  if (Refused()) return cudaErrorStreamCaptureUnsupported;
  const Lock lock(TheDevice().mutex);
  if (event->origin != nullptr) event = event->origin;
  Enqueue(stream, [event, record = event->recorded] { RunUntil(event, record); });
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
  Enqueue(stream, [event, record = event->recorded] {
    event->done = record;
    event->at = std::chrono::steady_clock::now();
  });
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
  RunOne(event->stream);
  return cudaErrorNotReady;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  *milliseconds = std::chrono::duration<float, std::milli>(end->at - begin->at).count();
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  const Lock lock(TheDevice().mutex);
  if (stream == nullptr || capturing != nullptr || TheDevice().refuse_graphs) {
    return Return(cudaErrorStreamCaptureUnsupported);
  }
  stream->captured = std::make_unique<CUgraph_st>();
  capturing = stream;
  capture_lost = false;
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
  for (const std::function<void()>& work : exec->work) Enqueue(stream, work);
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
  const Lock lock(TheDevice().mutex);
  if (TheDevice().refuse_ipc || TheDevice().allocations.count(p) == 0) {
    return Return(cudaErrorInvalidValue);
  }
  std::memcpy(handle->reserved, &p, sizeof p);
  return cudaSuccess;
}
cudaError_t cudaIpcOpenMemHandle(void** p, cudaIpcMemHandle_t handle, unsigned) {
  const Lock lock(TheDevice().mutex);
  std::memcpy(p, handle.reserved, sizeof *p);
  if (TheDevice().allocations.count(*p) == 0) return Return(cudaErrorInvalidValue);
  ++TheDevice().opened[*p];
  return cudaSuccess;
}
cudaError_t cudaIpcCloseMemHandle(void* p) {
  const Lock lock(TheDevice().mutex);
  if (--TheDevice().opened[p] < 0) return Return(cudaErrorInvalidValue);
  return cudaSuccess;
}
cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t* handle, cudaEvent_t event) {
  const Lock lock(TheDevice().mutex);
  if (TheDevice().refuse_ipc) return Return(cudaErrorInvalidValue);
  std::memcpy(handle->reserved, &event, sizeof event);
  return cudaSuccess;
}
cudaError_t cudaIpcOpenEventHandle(cudaEvent_t* event, cudaIpcEventHandle_t handle) {
  *event = new CUevent_st;
  std::memcpy(&(*event)->origin, handle.reserved, sizeof *event);
  return cudaSuccess;
}
