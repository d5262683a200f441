// The KV cache as device code sees it; kernels/kv_layout.h has the bytes of a block.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/intrinsics.cuh"

namespace shoal::cuda {

inline constexpr int kBlockTokens = 16;
inline constexpr int kPartDims = 32;  // dims that share a scale in a q8_0 block

struct KvView {
  uint8_t* base;
  int64_t block_stride;
  int64_t head_bytes;  // of K of one head in a block; V takes the same
  int32_t kv_heads;
  int32_t head_dim;

  __device__ uint8_t* K(int block, int head) const {
    return base + block * block_stride + head * head_bytes;
  }
  __device__ uint8_t* V(int block, int head) const { return K(block, kv_heads + head); }
};

// Which query heads read which KV head; see AttentionShape.
struct HeadMap {
  int32_t q_heads;
  int32_t q_head_begin;
  int32_t kv_head_begin;
  int32_t group;
  int32_t window;
  const float* sinks;  // AttentionShape::sinks
  bool chunked;

  // Query heads of local KV head h: [First(h), Last(h)).
  __device__ int First(int kv_head) const {
    return max(0, (kv_head_begin + kv_head) * group - q_head_begin);
  }
  __device__ int Last(int kv_head) const {
    return min(q_heads, (kv_head_begin + kv_head + 1) * group - q_head_begin);
  }
  // As AttentionShape.
  __device__ int FirstVisible(int pos) const {
    if (window <= 0) return 0;
    return chunked ? pos / window * window : max(0, pos - window + 1);
  }
  // As an exponent of 2; one that weighs nothing where there is none.
  __device__ float SinkLog2(int head) const {
    return sinks != nullptr ? sinks[head] * 1.44269504f : -1e30f;
  }
};

template <typename T>
__device__ T LoadAs(const uint8_t* p) {
  return *reinterpret_cast<const T*>(p);
}

__device__ inline float HalfBits(uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
}

__device__ inline void UnpackHalves(const uint4& v, float (&x)[8]) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = HalfBits(words[i] & 0xffff);
    x[2 * i + 1] = HalfBits(words[i] >> 16);
  }
}

__device__ inline void UnpackBytes(const uint2& v, float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[i] = static_cast<float>(static_cast<int8_t>(v.x >> (8 * i)));
    x[4 + i] = static_cast<float>(static_cast<int8_t>(v.y >> (8 * i)));
  }
}

// One type of cache: LoadK reads kLane tokens of one dim, LoadV kLane dims of one token (16 bytes
// of a float type, whose address must be a multiple of that), LoadPair two dims of a token at any
// even dim.
struct F32Kv {
  static constexpr int kLane = 4;
  static __device__ void LoadK(const uint8_t* k, int dims, int dim, int token, float (&x)[4]) {
    Load(k + 4 * (dim * kBlockTokens + token), x);
  }
  static __device__ void LoadV(const uint8_t* v, int dims, int token, int dim, float (&x)[4]) {
    Load(v + 4 * (token * dims + dim), x);
  }
  static __device__ float2 LoadPair(const uint8_t* v, int dims, int token, int dim) {
    return LoadAs<float2>(v + 4 * (token * dims + dim));
  }

 private:
  static __device__ void Load(const uint8_t* p, float (&x)[4]) {
    const float4 v = LoadAs<float4>(p);
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
  }
};

struct F16Kv {
  static constexpr int kLane = 8;
  static __device__ void LoadK(const uint8_t* k, int dims, int dim, int token, float (&x)[8]) {
    UnpackHalves(LoadAs<uint4>(k + 2 * (dim * kBlockTokens + token)), x);
  }
  static __device__ void LoadV(const uint8_t* v, int dims, int token, int dim, float (&x)[8]) {
    UnpackHalves(LoadAs<uint4>(v + 2 * (token * dims + dim)), x);
  }
  static __device__ float2 LoadPair(const uint8_t* v, int dims, int token, int dim) {
    const uint32_t both = LoadAs<uint32_t>(v + 2 * (token * dims + dim));
    return make_float2(HalfBits(both & 0xffff), HalfBits(both >> 16));
  }
};

struct Q8Kv {
  static constexpr int kLane = 8;
  static __device__ int ScaleBytes(int dims) {
    return 2 * kBlockTokens * ((dims + kPartDims - 1) / kPartDims);
  }
  static __device__ float Scale(const uint8_t* x, int dim, int token) {
    return HalfBits(LoadAs<uint16_t>(x + 2 * (dim / kPartDims * kBlockTokens + token)));
  }
  static __device__ void LoadK(const uint8_t* k, int dims, int dim, int token, float (&x)[8]) {
    float scale[8];
    UnpackHalves(LoadAs<uint4>(k + 2 * (dim / kPartDims * kBlockTokens + token)), scale);
    UnpackBytes(LoadAs<uint2>(k + ScaleBytes(dims) + dim * kBlockTokens + token), x);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] *= scale[i];
  }
  static __device__ void LoadV(const uint8_t* v, int dims, int token, int dim, float (&x)[8]) {
    const float scale = Scale(v, dim, token);
    UnpackBytes(LoadAs<uint2>(v + ScaleBytes(dims) + token * dims + dim), x);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] *= scale;
  }
  static __device__ float2 LoadPair(const uint8_t* v, int dims, int token, int dim) {
    const float scale = Scale(v, dim, token);
    const uint16_t both = LoadAs<uint16_t>(v + ScaleBytes(dims) + token * dims + dim);
    return make_float2(scale * static_cast<int8_t>(both & 0xff),
                       scale * static_cast<int8_t>(both >> 8));
  }
};

}  // namespace shoal::cuda
