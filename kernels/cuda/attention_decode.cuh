// Attention of decode rows: one block of threads for each (row, KV head, split of 256 positions),
// whose open softmax goes to the workspace, then a merge in order of position.
//
// The block reads each K and V of its split once, for up to 8 query heads. Scores: lanes lie along
// tokens, as K does, so a warp's load is 512 contiguous bytes; lanes that hold the same tokens at
// different dims add up by shuffles at the end. Values: threads lie along dims, as V does, groups
// of them take every n-th token and meet in shared memory at the end. Sums are f32, in an order
// that depends on nothing but the row.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/batch_plan.h"
#include "kernels/cuda/kv_block.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/warp.cuh"

namespace shoal::cuda {

inline constexpr int kDecodeWarps = 8;
inline constexpr int kDecodeThreads = 32 * kDecodeWarps;
inline constexpr int kMergeThreads = 128;
inline constexpr int kSplitBlocks = kSplitTokens / kBlockTokens;
inline constexpr float kNoScore = -1e30f;  // finite: exp2(kNoScore - kNoScore) is a number

struct DecodeParams {
  const float* q;  // [rows, q_stride]
  int64_t q_stride;
  KvView kv;
  HeadMap heads;
  float scale_log2;  // scores are exponents of 2
  const RowPlace* rows;
  const int32_t* tables;
  const DecodeItem* items;  // of this launch: blockIdx.x
  float* acc;               // [items, q_heads, acc_stride]: sum of p * v
  float2* state;  // [items, q_heads]: {max of the scores, sum of p}, p = exp2(score - max)
  int32_t acc_stride;
  bool prefetch;  // a split's K and V to the L2 cache before they are used
};

// Where a split lies and what of it the row sees: tokens [begin, end).
struct SplitView {
  const int32_t* table;  // blocks of the split
  int begin, end;
  int first_head, heads;
  int kv_head;
};

// All of the split's K and V on their way at once: the loads below are few at a time, and those of
// V would begin when the scores are done.
__device__ inline void PrefetchSplit(const KvView& kv, const SplitView& split) {
  constexpr int kLine = 128;
  const int lines = static_cast<int>((kv.head_bytes + kLine - 1) / kLine);  // of K, and of V
  const int first = split.begin / kBlockTokens;
  const int blocks = (split.end + kBlockTokens - 1) / kBlockTokens - first;
  for (int i = threadIdx.x; i < blocks * lines; i += kDecodeThreads) {
    const int block = split.table[first + i / lines];
    const int at = i % lines * kLine;
    PrefetchL2(kv.K(block, split.kv_head) + at);
    PrefetchL2(kv.V(block, split.kv_head) + at);
  }
}

// q of the block's heads, dim by dim: shared[dim][kHeads], zeros for heads it lacks.
template <int kHeads>
__device__ void LoadQueries(const DecodeParams& p, const float* row, const SplitView& split,
                            float* shared) {
  const int dims = p.kv.head_dim;
  for (int g = 0; g < kHeads; ++g) {
    const float* q = row + (split.first_head + g) * dims;
    for (int d = threadIdx.x; d < dims; d += kDecodeThreads) {
      shared[d * kHeads + g] = g < split.heads ? q[d] : 0;
    }
  }
}

// Scores of one KV block: warp-wide. acc[g * kLane + i] of a lane belongs to token
// lane % (16 / kLane) * kLane + i.
template <typename Format, int kHeads>
__device__ void ScoreBlock(const uint8_t* k, int dims, const float* q, float scale, float* scores) {
  constexpr int kLane = Format::kLane, kParts = kBlockTokens / kLane, kDims = 32 / kParts;
  const int lane = threadIdx.x % 32;
  const int token = lane % kParts * kLane;
  float acc[kHeads * kLane];
#pragma unroll
  for (int i = 0; i < kHeads * kLane; ++i) acc[i] = 0;
  // So many loads are under way at once; eight heads leave registers for two.
  [[maybe_unused]] constexpr int kUnrolled = kHeads > 4 ? 2 : 4;
#pragma unroll kUnrolled
  for (int d = lane / kParts; d < dims; d += kDims) {
    float x[kLane];
    Format::LoadK(k, dims, d, token, x);
#pragma unroll
    for (int g = 0; g < kHeads; ++g) {
      const float qg = q[d * kHeads + g];
#pragma unroll
      for (int i = 0; i < kLane; ++i) acc[g * kLane + i] += qg * x[i];
    }
  }
  // Lanes of the same tokens share out the sums; each keeps kLeft of them (all, when there is one).
  const int first = ShareSums<kHeads * kLane, kParts>(acc, lane);
  constexpr int kLeft = kSumsLeft<kHeads * kLane, kParts>;
#pragma unroll
  for (int i = 0; i < kLeft; ++i) {
    const int at = first + i;
    scores[at / kLane * kSplitTokens + token + at % kLane] = acc[i] * scale;
  }
}

// Warp g makes weights of head g's scores.
__device__ inline void SoftmaxSplit(const DecodeParams& p, const SplitView& split, float* scores) {
  const int g = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (g >= split.heads) return;
  float* s = scores + g * kSplitTokens;
  float largest = kNoScore;
  for (int t = split.begin + lane; t < split.end; t += 32) largest = fmaxf(largest, s[t]);
  largest = WarpMax(largest);
  float sum = 0;
  for (int t = split.begin + lane; t < split.end; t += 32) {
    s[t] = Exp2(s[t] - largest);
    sum += s[t];
  }
  sum = WarpSum(sum);
  if (lane == 0) {
    p.state[static_cast<int64_t>(blockIdx.x) * p.heads.q_heads + split.first_head + g] =
        make_float2(largest, sum);
  }
}

// kLanes dims of V from `dim` on; beyond the end of the head the values are zeros.
template <typename Format, bool kAligned, int kLanes>
__device__ void LoadValues(const uint8_t* v, int dims, int token, int dim, float (&x)[kLanes]) {
  if constexpr (kAligned) {
    Format::LoadV(v, dims, token, dim, x);
  } else {
#pragma unroll
    for (int i = 0; i < kLanes; i += 2) {
      const float2 pair =
          dim + i < dims ? Format::LoadPair(v, dims, token, dim + i) : make_float2(0, 0);
      x[i] = pair.x;
      x[i + 1] = pair.y;
    }
  }
}

// acc[g][..] = sum over the thread's tokens of p * v, then over the groups of threads.
template <typename Format, int kHeads, bool kAligned>
__device__ void WeighValues(const DecodeParams& p, const SplitView& split, const float* scores,
                            float* shared) {
  constexpr int kLanes = kAligned ? Format::kLane : 4;
  const int dims = p.kv.head_dim, vectors = (dims + kLanes - 1) / kLanes;
  const int groups = kDecodeThreads / vectors;
  const int group = threadIdx.x / vectors, dim = threadIdx.x % vectors * kLanes;
  float acc[kHeads][kLanes];
#pragma unroll
  for (int g = 0; g < kHeads; ++g) {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) acc[g][i] = 0;
  }
  if (group < groups) {
    [[maybe_unused]] constexpr int kUnrolled = kHeads > 4 ? 2 : 4;
#pragma unroll kUnrolled
    for (int t = split.begin + group; t < split.end; t += groups) {
      float x[kLanes];
      const uint8_t* v = p.kv.V(split.table[t / kBlockTokens], split.kv_head);
      LoadValues<Format, kAligned>(v, dims, t % kBlockTokens, dim, x);
#pragma unroll
      for (int g = 0; g < kHeads; ++g) {
        const float weight = scores[g * kSplitTokens + t];
#pragma unroll
        for (int i = 0; i < kLanes; ++i) acc[g][i] += weight * x[i];
      }
    }
  }
  const int width = vectors * kLanes;
#pragma unroll
  for (int g = 0; g < kHeads; ++g) {
    if (g >= split.heads) break;
    __syncthreads();
    if (group < groups) {
#pragma unroll
      for (int i = 0; i < kLanes; ++i) shared[group * width + dim + i] = acc[g][i];
    }
    __syncthreads();
    float* out =
        p.acc +
        (static_cast<int64_t>(blockIdx.x) * p.heads.q_heads + split.first_head + g) * p.acc_stride;
    for (int d = threadIdx.x; d < dims; d += kDecodeThreads) {
      float sum = 0;
      for (int i = 0; i < groups; ++i) sum += shared[i * width + d];
      out[d] = sum;
    }
  }
}

// Dynamic shared memory of AttendSplit: weights, then queries, later the sums of groups.
inline int64_t DecodeSharedBytes(int kernel_heads, int head_dim) {
  const int64_t queries = static_cast<int64_t>(kernel_heads) * head_dim;
  const int64_t sums = static_cast<int64_t>(kDecodeThreads) * 8;
  return 4 *
         (static_cast<int64_t>(kernel_heads) * kSplitTokens + (queries > sums ? queries : sums));
}

// Grid: items, KV heads, chunks of kHeads query heads of a KV head.
template <typename Format, int kHeads, bool kAligned>
__global__ void __launch_bounds__(kDecodeThreads) AttendSplit(DecodeParams p) {
  GridWait();
  const DecodeItem item = p.items[blockIdx.x];
  const RowPlace place = p.rows[item.row];
  const int base = item.split * kSplitTokens;
  SplitView split;
  split.table = p.tables + place.table + base / kBlockTokens;
  split.begin = max(p.heads.FirstVisible(place.pos) - base, 0);
  split.end = min(place.pos + 1 - base, kSplitTokens);
  split.kv_head = static_cast<int>(blockIdx.y);
  split.first_head = p.heads.First(split.kv_head) + static_cast<int>(blockIdx.z) * kHeads;
  split.heads = min(p.heads.Last(split.kv_head) - split.first_head, kHeads);
  if (split.begin >= split.end || split.heads <= 0) return;
  if (p.prefetch) PrefetchSplit(p.kv, split);

  float* scores = reinterpret_cast<float*>(DynamicShared());  // [kHeads][kSplitTokens]
  float* work = scores + kHeads * kSplitTokens;
  LoadQueries<kHeads>(p, p.q + item.row * p.q_stride, split, work);
  __syncthreads();
  for (int b = static_cast<int>(threadIdx.x) / 32; b < kSplitBlocks; b += kDecodeWarps) {
    if ((b + 1) * kBlockTokens <= split.begin || b * kBlockTokens >= split.end) continue;
    ScoreBlock<Format, kHeads>(p.kv.K(split.table[b], split.kv_head), p.kv.head_dim, work,
                               p.scale_log2, scores + b * kBlockTokens);
  }
  __syncthreads();
  SoftmaxSplit(p, split, scores);
  __syncthreads();
  WeighValues<Format, kHeads, kAligned>(p, split, scores, work);
}

struct MergeParams {
  const DecodeRow* decode_rows;  // of this launch: blockIdx.x
  const RowPlace* rows;
  const float* acc;
  const float2* state;
  float* out;  // [rows, out_stride]
  int64_t out_stride;
  HeadMap heads;
  int32_t first_item;  // of the launch that filled acc and state
  int32_t head_dim;
  int32_t acc_stride;
};

// Grid: decode rows, query heads. A group of threads that spans the dims takes a run of splits;
// groups meet in shared memory, so sums are in order of position within fixed runs.
static __global__ void __launch_bounds__(kMergeThreads) MergeSplits(MergeParams p) {
  GridWait();
  const DecodeRow entry = p.decode_rows[blockIdx.x];
  const int pos = p.rows[entry.row].pos;
  const int head = static_cast<int>(blockIdx.y);
  float* out = p.out + entry.row * p.out_stride + static_cast<int64_t>(head) * p.head_dim;
  if (pos < 0) {  // an idle row of a step
    for (int d = threadIdx.x; d < p.head_dim; d += kMergeThreads) out[d] = 0;
    return;
  }
  const int first = p.heads.FirstVisible(pos) / kSplitTokens;
  const int count = pos / kSplitTokens + 1 - first;
  const int64_t slot =
      static_cast<int64_t>(entry.first_item - p.first_item + first) * p.heads.q_heads + head;
  const float2* state = p.state + slot;  // of split i: [i * q_heads]
  float largest = kNoScore;
  for (int i = threadIdx.x; i < count; i += kMergeThreads) {
    largest = fmaxf(largest, state[static_cast<int64_t>(i) * p.heads.q_heads].x);
  }
  largest = BlockMax<kMergeThreads / 32>(largest);

  const int vectors = p.acc_stride / 4, groups = kMergeThreads / vectors;
  const int group = static_cast<int>(threadIdx.x) / vectors;
  const int dim = static_cast<int>(threadIdx.x) % vectors * 4;
  float4 acc = make_float4(0, 0, 0, 0);
  float sum = 0;
  if (group < groups) {
    const int run = (count + groups - 1) / groups;
#pragma unroll 4
    for (int i = group * run; i < min(count, (group + 1) * run); ++i) {
      const int64_t at = static_cast<int64_t>(i) * p.heads.q_heads;
      const float2 s = state[at];
      const float weight = Exp2(s.x - largest);
      const float4 v = *reinterpret_cast<const float4*>(p.acc + (slot + at) * p.acc_stride + dim);
      sum += weight * s.y;
      acc.x += weight * v.x;
      acc.y += weight * v.y;
      acc.z += weight * v.z;
      acc.w += weight * v.w;
    }
  }
  float* sums = reinterpret_cast<float*>(DynamicShared());  // [groups][acc_stride + 4]
  const int width = p.acc_stride + 4;
  if (group < groups) {
    *reinterpret_cast<float4*>(sums + group * width + dim) = acc;
    if (dim == 0) sums[group * width + p.acc_stride] = sum;
  }
  __syncthreads();
  const float sink = p.heads.SinkLog2(head);
  for (int d = threadIdx.x; d < p.head_dim; d += kMergeThreads) {
    float total = 0, weight = Exp2(sink - largest);
    for (int i = 0; i < groups; ++i) {
      total += sums[i * width + d];
      weight += sums[i * width + p.acc_stride];
    }
    out[d] = total / weight;
  }
}

inline int64_t MergeSharedBytes(int acc_stride) {
  return int64_t{4} * (kMergeThreads / (acc_stride / 4)) * (acc_stride + 4);
}

}  // namespace shoal::cuda
