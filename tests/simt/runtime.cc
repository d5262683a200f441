#include <unistd.h>

#include <chrono>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "simt/api.h"
#include "simt/runner.h"
#include "tests/simt/device.h"

namespace simt {
namespace {

thread_local int current_device = 0;
thread_local int lock_depth = 0;
thread_local cudaError_t last_error = cudaSuccess;

// The capture of this thread, and whether it is lost.
thread_local cudaStream_t capturing = nullptr;
thread_local bool capture_lost = false;

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

}  // namespace

Device& TheDevice() {
  static auto* device = new Device;  // outlives every stream
  return *device;
}

Lock::Lock(std::recursive_mutex& mutex) : mutex_(mutex) {
  mutex_.lock();
  ++lock_depth;
}
Lock::~Lock() {
  --lock_depth;
  mutex_.unlock();
}

void RunEverything() {
  const auto busy = []() -> cudaStream_t {
    for (const cudaStream_t s : TheDevice().streams) {
      if (s->device == current_device && !s->work.empty()) return s;
    }
    return nullptr;
  };
  while (const cudaStream_t stream = busy()) Progress(stream);
}

cudaError_t Return(cudaError_t error) {
  if (error != cudaSuccess && error != cudaErrorNotReady) last_error = error;
  return error;
}

bool Refused() {
  if (capturing == nullptr) return false;
  capture_lost = true;
  last_error = cudaErrorStreamCaptureUnsupported;
  return true;
}

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

using namespace simt;

namespace {
constexpr int kVersion = 12040;
}  // namespace

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
