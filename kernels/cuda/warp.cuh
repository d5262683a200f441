// Reductions over the lanes of a warp and the warps of a block, in a fixed order.
#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/launch.cuh"

namespace shoal::cuda {

inline constexpr unsigned kWholeWarp = 0xffffffffu;

__device__ inline float WarpMax(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(kWholeWarp, x, lanes));
  return x;
}

__device__ inline float WarpSum(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kWholeWarp, x, lanes);
  return x;
}

// The largest x and the sum of all x of a block of kWarps warps, for every thread. All threads
// call.
template <int kWarps>
__device__ float BlockMax(float x) {
  struct Parts {
    float part[kWarps];
  };
  Parts& parts = StaticShared<Parts, 1>();
  x = WarpMax(x);
  __syncthreads();  // an earlier call's parts have been read
  if (threadIdx.x % 32 == 0) parts.part[threadIdx.x / 32] = x;
  __syncthreads();
  for (int i = 0; i < kWarps; ++i) x = fmaxf(x, parts.part[i]);
  return x;
}

template <int kWarps>
__device__ float BlockSum(float x) {
  struct Parts {
    float part[kWarps];
  };
  Parts& parts = StaticShared<Parts, 2>();
  x = WarpSum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts.part[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < kWarps; ++i) sum += parts.part[i];
  return sum;
}

// How many of n sums a lane keeps when the 32 / kStride lanes that hold parts of the same ones
// share them out.
template <int n, int kStride>
inline constexpr int kSumsLeft = kSumsLeft<(n > 1 ? n / 2 : 1), kStride * 2>;
template <int n>
inline constexpr int kSumsLeft<n, 32> = n;

// sums[0..n) of the lanes that are equal modulo kStride are added up. Returns which of them the
// lane now holds, from sums[0] on: at each step a lane keeps one half and sends the other. n is a
// power of 2.
template <int n, int kStride>
__device__ __forceinline__ int ShareSums(float* sums, int lane) {
  if constexpr (kStride >= 32) {
    return 0;
  } else if constexpr (n > 1) {
    const bool upper = (lane & kStride) != 0;
#pragma unroll
    for (int i = 0; i < n / 2; ++i) {
      const float send = upper ? sums[i] : sums[i + n / 2];
      const float keep = upper ? sums[i + n / 2] : sums[i];
      sums[i] = keep + __shfl_xor_sync(kWholeWarp, send, kStride);
    }
    return (upper ? n / 2 : 0) + ShareSums<n / 2, kStride * 2>(sums, lane);
  } else {
    sums[0] += __shfl_xor_sync(kWholeWarp, sums[0], kStride);
    return ShareSums<1, kStride * 2>(sums, lane);
  }
}

}  // namespace shoal::cuda
