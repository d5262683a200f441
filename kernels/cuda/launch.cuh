// Kernel launches and shared memory, under nvcc and under the tests' stand-in. Nothing else uses
// `cudaLaunchKernelEx` or `__shared__`.
#pragma once

#include "kernels/cuda/intrinsics.cuh"

#if defined(__CUDACC__)

#include <atomic>

namespace shoal::cuda {

// The block's dynamic shared memory, aligned to 128 bytes; as large as the launch asked for.
__device__ __forceinline__ unsigned char* DynamicShared() {
  extern __shared__ __align__(128) unsigned char shoal_dynamic_shared[];
  return shoal_dynamic_shared;
}

// One T for the block, uninitialised; T needs no constructor. Calls with the same T and kId give
// the same variable.
template <typename T, int kId = 0>
__device__ __forceinline__ T& StaticShared() {
  __shared__ alignas(alignof(T)) unsigned char bytes[sizeof(T)];
  return *reinterpret_cast<T*>(bytes);
}

// Whether kernels on the calling thread's GPU may begin before the one before them has ended.
inline bool LaunchesOverlap() {
  constexpr int kDevices = 64;
  static std::atomic<int> major[kDevices];  // 0: not asked yet
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return false;
  int known = major[device].load(std::memory_order_relaxed);
  if (known == 0) {
    cudaDeviceGetAttribute(&known, cudaDevAttrComputeCapabilityMajor, device);
    major[device].store(known, std::memory_order_relaxed);
  }
  return known >= 9;
}

// Enqueues kernel(args...), which calls GridWait. An error (too much shared memory, a grid too
// large) is left for cudaGetLastError.
template <typename... Params, typename... Args>
void Launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t stream, const Args&... args) {
  constexpr size_t kWithoutAsking = 48 << 10;
  if (shared_bytes > kWithoutAsking) {
    cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                         cudaFuncAttributeMaxDynamicSharedMemorySize,
                         static_cast<int>(shared_bytes));
  }
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = LaunchesOverlap() ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

// The same for a kernel that waits for others of other streams; its blocks must not wait for each
// other. (On a GPU it is like any other; the stand-in must run it beside the rest.)
template <typename... Params, typename... Args>
void LaunchWaiting(void (*kernel)(Params...), dim3 grid, dim3 block, cudaStream_t stream,
                   const Args&... args) {
  Launch(kernel, grid, block, 0, stream, args...);
}

}  // namespace shoal::cuda

#endif
