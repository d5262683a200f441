// The inner loops of attention, one table for each instruction set.
//
// A run is 16 consecutive KV blocks (256 tokens, aligned to positions that are multiples of 256). A
// kernel attends up to 16 query vectors of one KV head to one run and leaves the softmax open: acc
// = sum of p * v, sum = sum of p, p = exp(score - max). Attention (attention.h) merges runs in
// order of position. So what a query gets from a run depends on that query and that run alone,
// whoever computes it and whatever queries stand beside it.
//
// Included by files compiled for AVX-512: no library code may be instantiated from here.
#pragma once

#include <stdint.h>

namespace shoal {

inline constexpr int kRunBlocks = 16;
inline constexpr int kRunTokens = 256;
inline constexpr int kTileQueries = 16;
// max of a query that sees no token of a run. Finite, so that exp(max - max) is a number.
inline constexpr float kNoScore = -1e30f;

struct AttendArgs {
  int queries = 0;   // 1..kTileQueries
  int head_dim = 0;  // even
  float scale = 0;
  const float* q[kTileQueries];  // [head_dim] each
  int32_t begin[kTileQueries];   // visible tokens of the run: [begin, end), possibly empty
  int32_t end[kTileQueries];
  int block_begin = 0;  // blocks that any query sees; the others' pointers are not read
  int block_end = 0;
  int token_end = 0;             // largest `end`: tokens from here on may hold garbage
  const uint8_t* k[kRunBlocks];  // one head of each block, laid out as kv_layout.h says
  const uint8_t* v[kRunBlocks];
  float* scores = nullptr;  // scratch [kTileQueries, kRunTokens], 64 B aligned
  float* acc = nullptr;     // out [queries, acc_stride]
  int acc_stride = 0;       // head_dim rounded up to 16
  float* max = nullptr;     // out [queries]
  float* sum = nullptr;     // out [queries]
};

struct AttentionKernels {
  void (*attend_f32)(const AttendArgs& args);
  void (*attend_f16)(const AttendArgs& args);
  void (*attend_q8)(const AttendArgs& args);
  // Saturating conversion to IEEE half, round to nearest even.
  void (*to_half)(const float* x, uint16_t* out, int n);
};

const AttentionKernels& ScalarAttentionKernels();
const AttentionKernels& Avx2AttentionKernels();
const AttentionKernels& Avx512AttentionKernels();

}  // namespace shoal
