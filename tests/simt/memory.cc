// Memory of the device and of the host, copies, and memory of other processes.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "simt/api.h"
#include "tests/simt/device.h"

using namespace simt;

namespace {

constexpr size_t kAlign = 256;  // what cudaMalloc promises

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
