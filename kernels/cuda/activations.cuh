// Rows of activations become operands of products; the norm or SwiGLU before a linear layer is done
// on the way.
#pragma once

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ops.h"

namespace shoal::cuda {

inline constexpr int kRowThreads = 256;
inline constexpr int kRowWarps = kRowThreads / 32;
inline constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// The sum over the block, the same in every thread and in one order.
__device__ inline float BlockSum(float v) {
  float* warp_sums = StaticShared<float[kRowWarps]>();
  for (int lanes = 16; lanes > 0; lanes /= 2) v += __shfl_xor_sync(kAllLanes, v, lanes);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = v;
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < kRowWarps; ++i) sum += warp_sums[i];
  __syncthreads();
  return sum;
}

// What each column of the row is multiplied with by the norm, apart from the weight.
__device__ inline float NormFactor(const InputRows& in, const float* x) {
  if (in.kind != InputRows::Kind::kRmsNorm) return 1;
  float sum = 0;
  for (int col = 4 * threadIdx.x; col < in.cols; col += 4 * kRowThreads) {
    const float4 v = *reinterpret_cast<const float4*>(x + col);
    sum += (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w);
  }
  return 1 / sqrtf(BlockSum(sum) / static_cast<float>(in.cols) + in.eps);
}

__device__ __forceinline__ float Silu(float x) { return x / (1 + expf(-x)); }

// Columns col .. col + 3 of the operand's row; x and up point at the source row.
__device__ inline float4 InputColumns(const InputRows& in, const float* x, const float* up,
                                      float factor, int col) {
  float4 v = *reinterpret_cast<const float4*>(x + col);
  if (in.kind == InputRows::Kind::kRmsNorm) {
    const float4 w = *reinterpret_cast<const float4*>(in.weight + col);
    v = {v.x * factor * w.x, v.y * factor * w.y, v.z * factor * w.z, v.w * factor * w.w};
  } else if (in.kind == InputRows::Kind::kSwiGlu) {
    const float4 u = *reinterpret_cast<const float4*>(up + col);
    v = {Silu(v.x) * u.x, Silu(v.y) * u.y, Silu(v.z) * u.z, Silu(v.w) * u.w};
  }
  return v;
}

__device__ __forceinline__ uint32_t PackBytes(int a, int b, int c, int d) {
  return (a & 0xFF) | (b & 0xFF) << 8 | (c & 0xFF) << 16 | static_cast<uint32_t>(d) << 24;
}

// Block (row, chunk of 4 * kRowThreads columns); 8 lanes make one column block. Blocks that share a
// row each add up its squares: cheaper than a second launch.
__global__ void __launch_bounds__(kRowThreads) QuantizeRowsKernel(InputRows in, Int8Rows out) {
  const int row = blockIdx.x;
  const int64_t source = (in.source != nullptr ? in.source[row] : row) * in.stride;
  const float* x = in.x + source;
  const float factor = NormFactor(in, x);
  const int col = 4 * (blockIdx.y * kRowThreads + threadIdx.x);
  const bool inside = col < in.cols;
  float4 v = {0, 0, 0, 0};
  if (inside) v = InputColumns(in, x, in.up + source, factor, col);
  float extreme = fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
  for (int lanes = 4; lanes > 0; lanes /= 2) {
    extreme = fmaxf(extreme, __shfl_xor_sync(kAllLanes, extreme, lanes));
  }
  const bool zero = !(extreme > 1e-30f);  // as on the CPU: its inverse would overflow
  const float inverse = zero ? 0 : 127 / extreme;
  const float scale = zero ? 0 : extreme / 127;
  const int q[4] = {__float2int_rn(v.x * inverse), __float2int_rn(v.y * inverse),
                    __float2int_rn(v.z * inverse), __float2int_rn(v.w * inverse)};
  int sum = q[0] + q[1] + q[2] + q[3];
  for (int lanes = 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
  if (!inside) return;
  const int word = threadIdx.x % 8;
  const int64_t at = int64_t{col / 32} * out.row_stride + row;
  reinterpret_cast<uint32_t*>(out.q + at * 32)[word % 4 * 2 + word / 4] =
      PackBytes(q[0], q[1], q[2], q[3]);
  if (word % 4 == 0) out.half_sums[at * 2 + word / 4] = scale * static_cast<float>(sum);
  if (word == 0) out.scale[at] = scale;
}

}  // namespace shoal::cuda
