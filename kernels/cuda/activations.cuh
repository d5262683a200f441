// Rows of activations become operands of products; the norm or SwiGLU before a
// linear layer is done on the way.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/linear_ops.h"

namespace shoal::cuda {

inline constexpr int kRowThreads = 256;
inline constexpr int kRowWarps = kRowThreads / 32;
inline constexpr int kRowStep = 4 * kRowThreads;  // columns that a block takes at once
inline constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// The sum, or the maximum, over the block: the same in every thread and in one
// order.
template <bool kMax>
__device__ inline float BlockReduce(float v) {
  auto& warps = StaticShared<float[kRowWarps]>();
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, v, lanes);
    v = kMax ? fmaxf(v, other) : v + other;
  }
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
  __syncthreads();
  v = warps[0];
  for (int i = 1; i < kRowWarps; ++i) v = kMax ? fmaxf(v, warps[i]) : v + warps[i];
  __syncthreads();
  return v;
}

template <Activation kActivation>
__device__ __forceinline__ float GatedOf(float gate, float up) {
  if constexpr (kActivation == Activation::kSwiGlu) {
    return gate / (1 + expf(-gate)) * up;
  } else if constexpr (kActivation == Activation::kGeGlu) {
    return gate / (1 + expf(-gate * (kGeluLinear + kGeluCubic * gate * gate))) * up;
  } else {
    const float g = fminf(gate, kSwiGluLimit);
    const float u = fminf(fmaxf(up, -kSwiGluLimit), kSwiGluLimit);
    return g / (1 + expf(-kSwiGluAlpha * g)) * (u + 1);
  }
}

template <Activation kActivation>
__device__ __forceinline__ float4 GatedOf(const float4& gate, const float4& up) {
  return {GatedOf<kActivation>(gate.x, up.x), GatedOf<kActivation>(gate.y, up.y),
          GatedOf<kActivation>(gate.z, up.z), GatedOf<kActivation>(gate.w, up.w)};
}

// Columns col .. col + 3 of a row of `cols`; zeros behind its end.
__device__ __forceinline__ float4 LoadColumns(const float* x, int col, int cols) {
  if (col + 4 <= cols && reinterpret_cast<uintptr_t>(x + col) % 16 == 0) {
    return *reinterpret_cast<const float4*>(x + col);
  }
  return {col < cols ? x[col] : 0, col + 1 < cols ? x[col + 1] : 0, col + 2 < cols ? x[col + 2] : 0,
          col + 3 < cols ? x[col + 3] : 0};
}

// One row of the operand, read as often as needed.
struct RowReader {
  const InputRows& in;
  const float *x, *up;
  float factor = 1;  // of the norm, without the weight
  float mean = 0;    // that a LayerNorm subtracts

  static constexpr int kAhead = 8;

  __device__ RowReader(const InputRows& input, int row)
      : in(input),
        x(input.x + row * input.stride),
        up(input.up != nullptr ? input.up + row * input.stride : nullptr) {
    if (in.kind != InputRows::Kind::kRmsNorm && in.kind != InputRows::Kind::kLayerNorm) return;
    const float count = static_cast<float>(in.cols);
    if (in.kind == InputRows::Kind::kLayerNorm) {
      mean = RowSum([](const float4& v, int) { return (v.x + v.y) + (v.z + v.w); }) / count;
    }
    const float squares = RowSum([this](const float4& v, int col) {
      const float4 d = Centered(v, col);
      return (d.x * d.x + d.y * d.y) + (d.z * d.z + d.w * d.w);
    });
    factor = in.scale / sqrtf(squares / count + in.eps);
    if (in.row_scale != nullptr) factor *= in.row_scale[row];
  }

  // The sum of term(columns, the first of them) over the row.
  template <typename Term>
  __device__ float RowSum(const Term& term) const {
    float sum = 0;
    for (int first = 4 * threadIdx.x; first < in.cols; first += kAhead * kRowStep) {
      float4 v[kAhead];  // all of them under way at once
#pragma unroll
      for (int i = 0; i < kAhead; ++i) v[i] = LoadColumns(x, first + i * kRowStep, in.cols);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) sum += term(v[i], first + i * kRowStep);
    }
    return BlockReduce<false>(sum);
  }

  // Less the mean; zeros stay behind the row's end.
  __device__ float4 Centered(const float4& v, int col) const {
    if (in.kind != InputRows::Kind::kLayerNorm) return v;
    return {col < in.cols ? v.x - mean : 0, col + 1 < in.cols ? v.y - mean : 0,
            col + 2 < in.cols ? v.z - mean : 0, col + 3 < in.cols ? v.w - mean : 0};
  }

  __device__ float4 Columns(int col) const {
    float4 v = LoadColumns(x, col, in.cols);
    if (in.kind == InputRows::Kind::kRmsNorm || in.kind == InputRows::Kind::kLayerNorm) {
      const float4 w = LoadColumns(in.weight, col, in.cols);
      v = Centered(v, col);
      v = {v.x * factor * w.x, v.y * factor * w.y, v.z * factor * w.z, v.w * factor * w.w};
    } else if (in.kind == InputRows::Kind::kGated) {
      const float4 u = LoadColumns(up, col, in.cols);
      v = in.activation == Activation::kSwiGlu  ? GatedOf<Activation::kSwiGlu>(v, u)
          : in.activation == Activation::kGeGlu ? GatedOf<Activation::kGeGlu>(v, u)
                                                : GatedOf<Activation::kClampedSwiGlu>(v, u);
    }
    return v;
  }
};

__device__ __forceinline__ float Extreme(const float4& v) {
  return fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
}

__device__ __forceinline__ uint32_t PackBytes(int a, int b, int c, int d) {
  return (a & 0xFF) | (b & 0xFF) << 8 | (c & 0xFF) << 16 | static_cast<uint32_t>(d) << 24;
}

// Block (row, run of kRowStep columns); 8 lanes make one column block. Blocks
// that share a row each add up its squares: cheaper than a second launch.
__global__ void __launch_bounds__(kRowThreads) QuantizeRowsKernel(InputRows in, Int8Rows out) {
  GridWait();
  const int row = blockIdx.x;
  const RowReader reader(in, row);
  const int col = blockIdx.y * kRowStep + 4 * threadIdx.x;
  const float4 v = reader.Columns(col);
  float extreme = Extreme(v);
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
  if (col >= in.cols) return;
  const int word = threadIdx.x % 8;
  const int64_t at = col / 32 * out.row_stride + row;
  reinterpret_cast<uint32_t*>(out.q + at * 32)[word % 4 * 2 + word / 4] =
      PackBytes(q[0], q[1], q[2], q[3]);
  if (word % 4 == 0) out.half_sums[at * 2 + word / 4] = scale * static_cast<float>(sum);
  if (word == 0) out.scale[at] = scale;
}

template <bool kBf16>
__device__ __forceinline__ uint32_t PackHalves(float a, float b) {
  if constexpr (kBf16) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(a)) |
           static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16_rn(b))) << 16;
  } else {
    return __half_as_ushort(__float2half_rn(a)) |
           static_cast<uint32_t>(__half_as_ushort(__float2half_rn(b))) << 16;
  }
}

// The scale, a power of two, that brings values of up to `extreme` to [512,
// 1024).
struct PowerOfTwo {
  float scale = 1, inverse = 1;
};
__device__ __forceinline__ PowerOfTwo HalfScale(float extreme) {
  const unsigned exponent = __float_as_uint(extreme) >> 23;
  if (exponent <= 9) return {};  // so small that nothing can come of it
  return {__uint_as_float((exponent - 9) << 23), __uint_as_float((263 - exponent) << 23)};
}

// A block for each row.
template <bool kBf16>
__global__ void __launch_bounds__(kRowThreads) HalveRowsKernel(InputRows in, HalfRows out) {
  GridWait();
  const int row = blockIdx.x;
  const RowReader reader(in, row);
  PowerOfTwo by;
  if constexpr (!kBf16) {
    float extreme = 0;
    for (int col = 4 * threadIdx.x; col < in.cols; col += kRowStep) {
      extreme = fmaxf(extreme, Extreme(reader.Columns(col)));
    }
    by = HalfScale(BlockReduce<true>(extreme));
  }
  const int cols = (in.cols + 31) / 32 * 32;
  for (int col = 4 * threadIdx.x; col < cols; col += kRowStep) {
    const float4 v = reader.Columns(col);
    const int word = col / 4 % 8;
    const uint2 halves = {PackHalves<kBf16>(v.x * by.inverse, v.y * by.inverse),
                          PackHalves<kBf16>(v.z * by.inverse, v.w * by.inverse)};
    *reinterpret_cast<uint2*>(out.data + (col / 32 * out.row_stride + row) * 32 + word % 4 * 8 +
                              word / 4 * 4) = halves;
  }
  if (threadIdx.x == 0) out.scale[row] = by.scale;
}

// A block for each row: its largest magnitude.
__global__ void __launch_bounds__(kRowThreads) RowExtremesKernel(InputRows in, float* extremes) {
  GridWait();
  const RowReader reader(in, blockIdx.x);
  float extreme = 0;
  for (int col = 4 * threadIdx.x; col < in.cols; col += kRowStep) {
    extreme = fmaxf(extreme, Extreme(reader.Columns(col)));
  }
  extreme = BlockReduce<true>(extreme);
  if (threadIdx.x == 0) extremes[blockIdx.x] = extreme;
}

// A block for each row. The columns of a plain matrix are a multiple of 32.
__global__ void __launch_bounds__(kRowThreads)
    HalveAllKernel(InputRows in, const float* extremes, PlainHalves out) {
  GridWait();
  float extreme = 0;
  for (int i = threadIdx.x; i < in.rows; i += kRowThreads) extreme = fmaxf(extreme, extremes[i]);
  const PowerOfTwo by = HalfScale(BlockReduce<true>(extreme));
  const RowReader reader(in, blockIdx.x);
  for (int col = 4 * threadIdx.x; col < in.cols; col += kRowStep) {
    const float4 v = reader.Columns(col);
    *reinterpret_cast<uint2*>(out.data + static_cast<int64_t>(blockIdx.x) * in.cols + col) = {
        PackHalves<false>(v.x * by.inverse, v.y * by.inverse),
        PackHalves<false>(v.z * by.inverse, v.w * by.inverse)};
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) *out.factor = by.scale / kHalfWeightScale;
}

// A block for each row.
__global__ void __launch_bounds__(kRowThreads) CopyRowsKernel(InputRows in, FloatRows out) {
  GridWait();
  const int row = blockIdx.x;
  const RowReader reader(in, row);
  for (int col = 4 * threadIdx.x; col < in.cols; col += kRowStep) {
    *reinterpret_cast<float4*>(out.data + row * out.stride + col) = reader.Columns(col);
  }
}

}  // namespace shoal::cuda
