// The way of q, k and v of a batch into attention: per-head norm, rotation, conversion, the place
// in the cache. A warp has one head of one row, in shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/batch_plan.h"
#include "kernels/cuda/kv_block.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/warp.cuh"
#include "kernels/norm.h"

namespace shoal::cuda {

inline constexpr int kCacheWarps = 4;
inline constexpr int kMaxHead = 512;  // dims

struct RopeView {
  const float* cos;  // [positions, half]; null: no rotation
  const float* sin;
  int32_t half;
  bool neox;
};

struct CacheParams {
  float* q;  // [rows, stride]
  float* k;
  const float* v;
  int64_t stride;
  QkNorm norm;
  const float* q_norm;  // or null
  const float* k_norm;
  float eps;
  const float* squares;  // as QkvArgs, as the columns
  int32_t q_cols, k_cols;
  const float* q_scale;
  RopeView rope;
  int32_t q_heads;
  KvView kv;
  const RowPlace* rows;
  const int32_t* tables;
};

// One head of q or k of a row.
__device__ inline void NormHead(float* x, const CacheParams& p, bool is_q, int head, int row) {
  const float* weights = is_q ? p.q_norm : p.k_norm;
  if (weights == nullptr) return;
  const int dims = p.kv.head_dim;
  if (p.norm != QkNorm::kHeadRms && p.norm != QkNorm::kHeadRmsBehind) {
    weights += static_cast<int64_t>(head) * dims;
  }
  const int lane = threadIdx.x % 32;
  float count = static_cast<float>(dims), mean = 0, squares = 0;
  if (p.norm == QkNorm::kHeadLayer) {
    for (int d = lane; d < dims; d += 32) mean += x[d];
    mean = WarpSum(mean) / count;
  }
  if (p.norm == QkNorm::kRowRms) {
    squares = p.squares[2 * row + (is_q ? 0 : 1)];
    count = static_cast<float>(is_q ? p.q_cols : p.k_cols);
  } else {
    for (int d = lane; d < dims; d += 32) squares += (x[d] - mean) * (x[d] - mean);
    squares = WarpSum(squares);
  }
  const float factor = 1 / sqrtf(squares / count + p.eps);
  for (int d = lane; d < dims; d += 32) x[d] = (x[d] - mean) * factor * weights[d];
  __syncwarp();
}

// What stands behind the rotation.
__device__ inline void ScaleHead(float* x, const CacheParams& p, bool is_q, int pos) {
  const int lane = threadIdx.x % 32, dims = p.kv.head_dim;
  float factor = 1;
  if (p.norm == QkNorm::kPlain) {
    float squares = 0;
    for (int d = lane; d < dims; d += 32) squares += x[d] * x[d];
    factor = 1 / sqrtf(WarpSum(squares) / static_cast<float>(dims) + p.eps);
  }
  if (is_q && p.q_scale != nullptr) factor *= p.q_scale[pos];
  for (int d = lane; d < dims; d += 32) x[d] *= factor;
  __syncwarp();
}

// Dims beyond the rotated ones stay.
__device__ inline void RotateHead(float* x, const RopeView& rope, int pos) {
  const float* cos = rope.cos + static_cast<int64_t>(pos) * rope.half;
  const float* sin = rope.sin + static_cast<int64_t>(pos) * rope.half;
  for (int i = threadIdx.x % 32; i < rope.half; i += 32) {
    float* a = rope.neox ? x + i : x + 2 * i;
    float* b = rope.neox ? x + i + rope.half : x + 2 * i + 1;
    const float at = *a, bt = *b;
    *a = at * cos[i] - bt * sin[i];
    *b = bt * cos[i] + at * sin[i];
  }
  __syncwarp();
}

// One token of one head: a column of K or a row of V.
struct CacheSlot {
  uint8_t* base;
  int dims;
  int token;
  bool is_k;
  __device__ int At(int dim) const {
    return is_k ? dim * kBlockTokens + token : token * dims + dim;
  }
};

struct F32Writer {
  static __device__ void Write(const CacheSlot& slot, const float* x) {
    for (int d = threadIdx.x % 32; d < slot.dims; d += 32) {
      reinterpret_cast<float*>(slot.base)[slot.At(d)] = x[d];
    }
  }
};

struct F16Writer {
  static __device__ void Write(const CacheSlot& slot, const float* x) {
    constexpr float kHalfMax = 65504;
    for (int d = threadIdx.x % 32; d < slot.dims; d += 32) {
      reinterpret_cast<uint16_t*>(slot.base)[slot.At(d)] =
          __half_as_ushort(__float2half_rn(fminf(fmaxf(x[d], -kHalfMax), kHalfMax)));
    }
  }
};

struct Q8Writer {
  // As the CPU's store: the scale is the largest magnitude / 127.
  static __device__ void Write(const CacheSlot& slot, const float* x) {
    const int lane = threadIdx.x % 32;
    uint16_t* scales = reinterpret_cast<uint16_t*>(slot.base);
    int8_t* ints = reinterpret_cast<int8_t*>(slot.base + Q8Kv::ScaleBytes(slot.dims));
    for (int first = 0; first < slot.dims; first += kPartDims) {
      const int d = first + lane;
      const float value = d < slot.dims ? x[d] : 0;
      const float scale = WarpMax(fabsf(value)) / 127;
      const float inverse = scale > 0 ? 1 / scale : 0;
      if (d < slot.dims) ints[slot.At(d)] = static_cast<int8_t>(__float2int_rn(value * inverse));
      if (lane == 0) {
        scales[first / kPartDims * kBlockTokens + slot.token] =
            __half_as_ushort(__float2half_rn(scale));
      }
    }
  }
};

// Grid: rows, then heads of q, k and v by fours.
template <typename Writer>
__global__ void __launch_bounds__(32 * kCacheWarps) WriteQkv(CacheParams p) {
  GridWait();
  const int row = static_cast<int>(blockIdx.x);
  const RowPlace place = p.rows[row];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  int head = static_cast<int>(blockIdx.y) * kCacheWarps + warp;
  if (place.pos < 0 || head >= p.q_heads + 2 * p.kv.kv_heads) return;
  const bool is_q = head < p.q_heads;
  if (!is_q) head -= p.q_heads;
  const bool is_k = !is_q && head < p.kv.kv_heads;
  if (!is_q && !is_k) head -= p.kv.kv_heads;

  const int dims = p.kv.head_dim;
  const int64_t at = row * p.stride + static_cast<int64_t>(head) * dims;
  const float* from = (is_q ? p.q : is_k ? p.k : p.v) + at;
  float* x = reinterpret_cast<float*>(DynamicShared()) + warp * dims;
  for (int d = lane; d < dims; d += 32) x[d] = from[d];
  __syncwarp();
  if (is_q || is_k) {
    const bool behind = p.norm == QkNorm::kHeadRmsBehind;
    if (!behind) NormHead(x, p, is_q, head, row);
    if (p.rope.cos != nullptr) RotateHead(x, p.rope, place.pos);
    if (behind) NormHead(x, p, is_q, head, row);
    if (p.norm == QkNorm::kPlain || p.q_scale != nullptr) ScaleHead(x, p, is_q, place.pos);
    float* to = (is_q ? p.q : p.k) + at;
    for (int d = lane; d < dims; d += 32) to[d] = x[d];
  }
  if (is_q) return;
  const int block = p.tables[place.table + place.pos / kBlockTokens];
  Writer::Write(
      {is_k ? p.kv.K(block, head) : p.kv.V(block, head), dims, place.pos % kBlockTokens, is_k}, x);
}

}  // namespace shoal::cuda
