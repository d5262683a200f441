// The cheap operations of a step. A row is computed in one order, whatever stands beside it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/batch_plan.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/packed_value.cuh"
#include "kernels/cuda/warp.cuh"
#include "kernels/norm.h"

namespace shoal::cuda {

inline constexpr int kElementWarps = 8;
inline constexpr int kElementThreads = 32 * kElementWarps;

struct NormParams {
  const float* x;  // [rows, cols]
  int64_t stride;
  const float* weight;
  float eps, scale;
  const float* row_scale;
  bool layer;  // NormKind::kLayer
  int32_t cols;
  float* out;
  int64_t out_stride;
};

// A block has a row.
static __global__ void __launch_bounds__(kElementThreads) NormRow(NormParams p) {
  GridWait();
  const float* const x = p.x + blockIdx.x * p.stride;
  float* const out = p.out + blockIdx.x * p.out_stride;
  const float count = static_cast<float>(p.cols);
  float mean = 0, squares = 0;
  if (p.layer) {
    for (int c = threadIdx.x; c < p.cols; c += kElementThreads) mean += x[c];
    mean = BlockSum<kElementWarps>(mean) / count;
  }
  for (int c = threadIdx.x; c < p.cols; c += kElementThreads) {
    squares += (x[c] - mean) * (x[c] - mean);
  }
  float factor = p.scale / sqrtf(BlockSum<kElementWarps>(squares) / count + p.eps);
  if (p.row_scale != nullptr) factor *= p.row_scale[blockIdx.x];
  for (int c = threadIdx.x; c < p.cols; c += kElementThreads) {
    out[c] = (x[c] - mean) * factor * p.weight[c];
  }
}

// Block (row, run).
static __global__ void __launch_bounds__(kElementThreads)
    SquaresRow(const float* x, int64_t stride, ColumnRun first, ColumnRun second, float* sums) {
  GridWait();
  const ColumnRun run = blockIdx.y == 0 ? first : second;
  x += blockIdx.x * stride;
  float squares = 0;
  for (int c = run.begin + static_cast<int>(threadIdx.x); c < run.end; c += kElementThreads) {
    squares += x[c] * x[c];
  }
  squares = BlockSum<kElementWarps>(squares);
  if (threadIdx.x == 0) sums[2 * blockIdx.x + blockIdx.y] = squares;
}

// x += y; a block has kElementThreads columns of a row.
static __global__ void __launch_bounds__(kElementThreads)
    AddRow(float* x, int64_t x_stride, const float* y, int64_t y_stride, int cols) {
  GridWait();
  const int c = static_cast<int>(blockIdx.y) * kElementThreads + static_cast<int>(threadIdx.x);
  if (c < cols) x[blockIdx.x * x_stride + c] += y[blockIdx.x * y_stride + c];
}

// out[i] = row ids[i] of the table times scale; a warp has 32 columns at a time.
static __global__ void __launch_bounds__(kElementThreads)
    EmbedRow(PackedView table, const int32_t* ids, float scale, float* out) {
  GridWait();
  const int32_t id = ids[blockIdx.x];
  out += blockIdx.x * table.cols;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kElementThreads + threadIdx.x;
  for (int64_t c = first; c < table.cols; c += static_cast<int64_t>(gridDim.y) * kElementThreads) {
    out[c] = id < 0 ? 0 : table.Value(id, c) * scale;
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
  int32_t groups, groups_used;

  __device__ float Probability(float logit) const { return 1 / (1 + expf(-logit)); }
  // What experts are chosen by. A NaN has no rank: it counts as the smallest, so that ids are
  // always experts.
  __device__ float Score(const float* logits, int e) const {
    // Without a bias and groups by the logits: large ones have the same sigmoid.
    float score = logits[e];
    if (choice_bias != nullptr || groups > 1) score = Probability(score);
    if (choice_bias != nullptr) score += choice_bias[e];
    return score == score ? score : -INFINITY;
  }
};

struct Ranked {
  float score;
  int32_t id;
  // Larger scores first, the lower id among equals.
  __device__ bool Before(const Ranked& other) const {
    return score > other.score || (score == other.score && id < other.id);
  }
};

// The best of n behind `last` in the order of Ranked, for all lanes; lane l asks for the scores of
// l, l + 32, ...
template <typename Score>
__device__ inline Ranked NextBest(int n, const Ranked& last, const Score& score) {
  Ranked best = {-INFINITY, n};
  for (int i = threadIdx.x % 32; i < n; i += 32) {
    const Ranked mine = {score(i), i};
    if (last.Before(mine) && mine.Before(best)) best = mine;
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const Ranked other = {__shfl_xor_sync(kWholeWarp, best.score, lanes),
                          __shfl_xor_sync(kWholeWarp, best.id, lanes)};
    if (other.Before(best)) best = other;
  }
  return best;
}

// A bit for each group whose experts take part.
__device__ inline uint32_t BestGroups(const RouteParams& p, const float* logits) {
  if (p.groups == 1) return 1;
  const int group = static_cast<int>(threadIdx.x) % 32, size = p.experts / p.groups;
  float first = -INFINITY, second = -INFINITY;
  for (int e = group * size; e < (group + 1) * size && group < p.groups; ++e) {
    const float score = p.Score(logits, e);
    second = fmaxf(second, fminf(first, score));
    first = fmaxf(first, score);
  }
  uint32_t bits = 0;
  Ranked last = {INFINITY, -1};
  for (int i = 0; i < p.groups_used; ++i) {
    last = NextBest(p.groups, last, [&](int) { return first + second; });
    bits |= 1u << last.id;
  }
  return bits;
}

// A warp has a row; grid: rows by eights.
static __global__ void __launch_bounds__(kElementThreads)
    RouteRow(RouteParams p, const RowPlace* places, int rows) {
  GridWait();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kElementWarps + threadIdx.x / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (row >= rows) return;
  const float* logits = p.logits + row * p.experts;
  int32_t* ids = p.ids + row * p.used;
  float* weights = p.weights + row * p.used;
  if (places != nullptr && places[row].pos < 0) {
    for (int i = lane; i < p.used; i += 32) {
      ids[i] = -1;
      weights[i] = 0;
    }
    return;
  }
  const uint32_t groups = BestGroups(p, logits);
  const auto score = [&](int e) {
    return groups >> e / (p.experts / p.groups) & 1 ? p.Score(logits, e) : -INFINITY;
  };
  Ranked last = {INFINITY, -1};
  float largest = 0, chosen = 0;
  for (int i = 0; i < p.used; ++i) {
    last = NextBest(p.experts, last, score);
    if (i == 0) largest = last.score;
    const float weight = p.sigmoid ? p.Probability(logits[last.id]) : expf(last.score - largest);
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
