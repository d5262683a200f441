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
  const PrefillItem* items;  // blockIdx.x
};

// Attends the `items` tiles of a plan made with PrefillTile().
void AttendPrompt(const PrefillParams& params, KvType type, int items, Stream stream);

}  // namespace shoal::cuda
