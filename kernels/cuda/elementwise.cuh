// The cheap operations of a step. A row is computed in one order, whatever stands beside it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/packed_value.cuh"
#include "kernels/cuda/warp.cuh"

namespace shoal::cuda {

inline constexpr int kElementWarps = 8;
inline constexpr int kElementThreads = 32 * kElementWarps;

// out = x * weight / rms(x); a block has a row.
static __global__ void __launch_bounds__(kElementThreads)
    RmsNormRow(const float* x, int64_t stride, const float* weight, float eps, int cols, float* out,
               int64_t out_stride) {
  GridWait();
  x += blockIdx.x * stride;
  out += blockIdx.x * out_stride;
  float squares = 0;
  for (int c = threadIdx.x; c < cols; c += kElementThreads) squares += x[c] * x[c];
  const float sum = BlockSum<kElementWarps>(squares);
  const float inverse = 1 / sqrtf(sum / static_cast<float>(cols) + eps);
  for (int c = threadIdx.x; c < cols; c += kElementThreads) out[c] = x[c] * inverse * weight[c];
}

// x += y; a block has kElementThreads columns of a row.
static __global__ void __launch_bounds__(kElementThreads)
    AddRow(float* x, int64_t x_stride, const float* y, int64_t y_stride, int cols) {
  GridWait();
  const int c = static_cast<int>(blockIdx.y) * kElementThreads + static_cast<int>(threadIdx.x);
  if (c < cols) x[blockIdx.x * x_stride + c] += y[blockIdx.x * y_stride + c];
}

// out[i] = row ids[i] of the table; a warp has 32 columns at a time.
static __global__ void __launch_bounds__(kElementThreads)
    EmbedRow(PackedView table, const int32_t* ids, float* out) {
  GridWait();
  const int32_t id = ids[blockIdx.x];
  out += blockIdx.x * table.cols;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kElementThreads + threadIdx.x;
  for (int64_t c = first; c < table.cols; c += static_cast<int64_t>(gridDim.y) * kElementThreads) {
    out[c] = id < 0 ? 0 : table.Value(id, c);
  }
}

struct RouteParams {
  const float* logits;  // [rows, experts]
  int32_t experts, used;
  bool softmax_all, renormalize;
  float scale;
  int32_t* ids;  // [rows, used]
  float* weights;
  bool sigmoid;
  const float* choice_bias;  // [experts] or null

  __device__ float Probability(float logit) const { return 1 / (1 + expf(-logit)); }
  // What experts are chosen by.
  __device__ float Score(const float* logits, int e) const {
    if (!sigmoid) return logits[e];
    return Probability(logits[e]) + (choice_bias != nullptr ? choice_bias[e] : 0);
  }
};

struct Ranked {
  float logit;
  int32_t id;
  // Larger logits first, the lower id among equals.
  __device__ bool Before(const Ranked& other) const {
    return logit > other.logit || (logit == other.logit && id < other.id);
  }
};

// The best expert behind `last` in the order of Ranked, for all lanes.
__device__ inline Ranked NextExpert(const RouteParams& p, const float* logits, const Ranked& last) {
  Ranked best = {-INFINITY, p.experts};
  for (int e = threadIdx.x % 32; e < p.experts; e += 32) {
    // A NaN has no rank: it counts as the smallest, so that ids are always experts.
    const float score = p.Score(logits, e);
    const Ranked mine = {score == score ? score : -INFINITY, e};
    if (last.Before(mine) && mine.Before(best)) best = mine;
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const Ranked other = {__shfl_xor_sync(kWholeWarp, best.logit, lanes),
                          __shfl_xor_sync(kWholeWarp, best.id, lanes)};
    if (other.Before(best)) best = other;
  }
  return best;
}

// A warp has a row; grid: rows by eights.
static __global__ void __launch_bounds__(kElementThreads) RouteRow(RouteParams p, int rows) {
  GridWait();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kElementWarps + threadIdx.x / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (row >= rows) return;
  const float* logits = p.logits + row * p.experts;
  int32_t* ids = p.ids + row * p.used;
  float* weights = p.weights + row * p.used;
  Ranked last = {INFINITY, -1};
  float largest = 0, chosen = 0;
  for (int i = 0; i < p.used; ++i) {
    last = NextExpert(p, logits, last);
    if (i == 0) largest = last.logit;
    const float weight = p.sigmoid ? p.Probability(logits[last.id]) : expf(last.logit - largest);
    chosen += weight;
    if (lane == 0) {
      ids[i] = last.id;
      weights[i] = weight;
    }
  }
  float total = chosen;
  if (p.sigmoid && !p.renormalize) {
    total = 1;
  } else if (p.softmax_all && !p.renormalize) {
    total = 0;
    for (int e = lane; e < p.experts; e += 32) total += expf(logits[e] - largest);
    total = WarpSum(total);
  }
  __syncwarp();
  for (int i = lane; i < p.used; i += 32) weights[i] = weights[i] / total * p.scale;
}

}  // namespace shoal::cuda
