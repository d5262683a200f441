// Between attention.cu and attention_prefill.cu, which are compiled apart: their kernels take long.
#pragma once

#include "kernels/backend.h"
#include "kernels/cuda/attention_ops.h"
#include "kernels/cuda/kv_block.cuh"

namespace shoal::cuda {

struct PrefillParams {
  const float* q;  // [rows, q_stride]
  int64_t q_stride;
  float* out;  // [rows, out_stride]
  int64_t out_stride;
  KvView kv;
  HeadMap heads;
  float scale_log2;  // scores are exponents of 2
  const SegmentPlace* segments;
  const int32_t* tables;
  const PrefillItem* items;  // of this launch: blockIdx.x
  int32_t run_tokens;
  // Partial results of the launch's runs; those of item i stand at i - whole_tiles.
  int32_t whole_tiles;
  int32_t acc_stride;
  float* acc;     // [runs, KV heads, vectors of a tile, acc_stride]: sum of p * v
  float2* state;  // [runs, KV heads, vectors of a tile]: {largest score, sum of p}
};

struct PrefillMergeParams {
  PrefillParams prefill;       // of the launch that left the runs; `items` is not read
  const PrefillMerge* merges;  // of this launch: blockIdx.x
  int32_t tile;                // vectors
  // [KV heads, vectors of a tile]: where the last pass's last tile stood, and where this one's
  // does.
  const float2* carried;
  float2* carry;
};

// A plan's prompts (made with PlanOptionsFor), with partial results in `workspace`.
void AttendPrompts(PrefillParams params, KvType type, const BatchPlan& plan, uint8_t* workspace,
                   Stream stream);

}  // namespace shoal::cuda
