// What sampling needs of a vocabulary shard's logits: the best k, and the log of the sum of their
// exponentials. Chunks of a row are sorted each by a block of its own, then one block for each row
// merges them, so that k numbers go to the host and not the vocabulary.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/row_ops.h"
#include "kernels/cuda/warp.cuh"

namespace shoal::cuda {

inline constexpr int kChunkThreads = 256;
inline constexpr int kChunkWarps = kChunkThreads / 32;

// A logit and its token as one number: larger is better, equal logits by the lower token; 0: none.
__device__ inline uint64_t RankKey(float logit, uint32_t token) {
  if (!(logit == logit)) return 0;
  const uint32_t bits = __float_as_uint(logit + 0.0f);  // -0 equals 0
  const uint32_t ordered = bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
  return static_cast<uint64_t>(ordered) << 32 | (0xffffffffu - token);
}
__device__ inline LogitCandidate FromKey(uint64_t key, int32_t first_token) {
  if (key == 0) return {-1, -INFINITY};
  const uint32_t ordered = static_cast<uint32_t>(key >> 32);
  const uint32_t bits = ordered ^ ((ordered >> 31) != 0 ? 0x80000000u : 0xffffffffu);
  return {first_token + static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(key)),
          __uint_as_float(bits)};
}

// The steps of a bitonic network over `keys`, n of them (a power of 2): runs of `size` become
// sorted, best first where the run's index is even.
__device__ inline void BitonicMerge(uint64_t* keys, int n, int size) {
  for (int stride = size / 2; stride > 0; stride /= 2) {
    __syncthreads();
    for (int i = threadIdx.x; i < n / 2; i += kChunkThreads) {
      const int low = i / stride * stride * 2 + i % stride;
      const bool best_first = (low & size) == 0;
      const uint64_t a = keys[low], b = keys[low + stride];
      if ((a < b) == best_first) {
        keys[low] = b;
        keys[low + stride] = a;
      }
    }
  }
}

struct LogitsParams {
  const float* logits;  // [rows, stride]
  int64_t stride;
  int32_t vocab;
  int32_t first_token;
  const LogitRequest* requests;  // [rows]
  int32_t keep;                  // candidates, rounded up to a power of 2; 0: none
  int32_t candidates;
  uint64_t* chunk_keys;       // [rows, chunks, keep]
  LogitChunkSum* chunk_sums;  // [rows, chunks]
  LogitSummary* summaries;
  LogitCandidate* out;  // [rows, candidates]
};

// Grid: chunks, rows.
static __global__ void __launch_bounds__(kChunkThreads) ReduceChunk(LogitsParams p) {
  GridWait();
  const int first = static_cast<int>(blockIdx.x) * kLogitChunk;
  const int count = min(p.vocab - first, kLogitChunk);
  const float* logits = p.logits + blockIdx.y * p.stride + first;
  const float scale = p.requests[blockIdx.y].scale;
  const int64_t chunk = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  float largest = -INFINITY;
  for (int i = threadIdx.x; i < count; i += kChunkThreads) {
    largest = fmaxf(largest, logits[i] * scale);
  }
  largest = BlockMax<kChunkWarps>(largest);
  float sum = 0;
  for (int i = threadIdx.x; i < count; i += kChunkThreads) {
    const float x = logits[i] * scale;
    sum += x == -INFINITY ? 0 : expf(x - largest);
  }
  sum = BlockSum<kChunkWarps>(sum);
  if (threadIdx.x == 0) p.chunk_sums[chunk] = {largest, sum};
  if (p.keep == 0) return;

  uint64_t* keys = reinterpret_cast<uint64_t*>(DynamicShared());  // [kLogitChunk]
  for (int i = threadIdx.x; i < kLogitChunk; i += kChunkThreads) {
    keys[i] = i < count ? RankKey(logits[i], static_cast<uint32_t>(first + i)) : 0;
  }
  for (int size = 2; size <= kLogitChunk; size *= 2) BitonicMerge(keys, kLogitChunk, size);
  __syncthreads();
  for (int i = threadIdx.x; i < p.keep; i += kChunkThreads)
    p.chunk_keys[chunk * p.keep + i] = keys[i];
}

// Grid: rows.
static __global__ void __launch_bounds__(kChunkThreads) MergeChunks(LogitsParams p, int chunks) {
  GridWait();
  const int64_t row = blockIdx.x;
  const LogitChunkSum* sums = p.chunk_sums + row * chunks;
  if (threadIdx.x == 0) {
    const LogitRequest request = p.requests[row];
    float largest = -INFINITY;
    for (int i = 0; i < chunks; ++i) largest = fmaxf(largest, sums[i].largest);
    double log_sum = largest;
    if (largest > -INFINITY && largest < INFINITY) {
      double sum = 0;
      for (int i = 0; i < chunks; ++i) sum += sums[i].sum * exp(double{sums[i].largest} - largest);
      log_sum += log(sum);
    }
    p.summaries[row].log_sum_exp = request.scale > 0 ? log_sum : 0;
    p.summaries[row].target_logit =
        request.target < 0 ? -INFINITY : p.logits[row * p.stride + request.target];
  }
  if (p.keep == 0) return;
  uint64_t* best = reinterpret_cast<uint64_t*>(DynamicShared());  // [keep]
  for (int i = threadIdx.x; i < p.keep; i += kChunkThreads) best[i] = 0;
  for (int c = 0; c < chunks; ++c) {
    // Of two lists in opposite orders the larger ones at each place are the best of both, first
    // rising then falling: one merge of the network sorts them.
    const uint64_t* keys = p.chunk_keys + (row * chunks + c) * p.keep;
    __syncthreads();
    for (int i = threadIdx.x; i < p.keep; i += kChunkThreads) {
      const uint64_t other = keys[p.keep - 1 - i];
      if (other > best[i]) best[i] = other;
    }
    BitonicMerge(best, p.keep, p.keep);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < p.candidates; i += kChunkThreads) {
    p.out[row * p.candidates + i] = FromKey(best[i], p.first_token);
  }
}

}  // namespace shoal::cuda
