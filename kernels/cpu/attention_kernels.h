// The inner loops of attention, one table for each instruction set.
//
// A run is 16 consecutive KV blocks (256 tokens, aligned to positions that are multiples of 256). A
// kernel attends up to 32 query vectors of one KV head to one run and leaves the softmax open: acc
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
inline constexpr int kTileQueries = 32;
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
  int64_t next_k = 0;       // from K of a block to the K that is attended next; 0: not known
  float* scores = nullptr;  // scratch [kTileQueries, kRunTokens], 64 B aligned
  float* acc = nullptr;     // out [queries, acc_stride]
  int acc_stride = 0;       // head_dim rounded up to 32
  float* max = nullptr;     // out [queries]
  float* sum = nullptr;     // out [queries]
};

// Open softmaxes of `queries` queries (at most kTileQueries): state takes what a run found.
struct MergeArgs {
  int queries = 0;
  int dims = 0;
  const float* run_acc = nullptr;  // [queries, stride]
  const float* run_max = nullptr;
  const float* run_sum = nullptr;
  float* acc = nullptr;  // [queries, stride]
  float* max = nullptr;
  float* sum = nullptr;
  int stride = 0;
};

struct AttentionKernels {
  void (*attend_f32)(const AttendArgs& args);
  void (*attend_f16)(const AttendArgs& args);
  void (*attend_q8)(const AttendArgs& args);
  void (*merge)(const MergeArgs& args);
  // Saturating conversion to IEEE half, round to nearest even.
  void (*to_half)(const float* x, uint16_t* out, int n);
};

const AttentionKernels& ScalarAttentionKernels();
#if defined(__x86_64__)
const AttentionKernels& Avx2AttentionKernels();
const AttentionKernels& Avx512AttentionKernels();
#elif defined(__aarch64__)
const AttentionKernels& NeonAttentionKernels();
#endif

// Attention through matrix tiles. q, k and v are two bf16 numbers each, high and low part. A
// product of q and k is three tile products (high high, high low, low high), so that scores are
// good to about 2^-15, where plain bf16 would be good to 2^-8: large keys (Qwen2 has them) turn
// that into percents. p is one bf16 number: that moves a weight by 2^-9, no more than the rounding
// of the output to bf16 that the next product begins with.
//
// Operands are rows of 32 numbers for the left side, and for the right side 16 rows of pairs: row i
// of a K tile is dims 2i, 2i+1 of 16 tokens, row i of a V tile is tokens 2i, 2i+1 of 16 dims. Tiles
// are 1 KiB, low after high.
struct TileArgs {
  const uint16_t* q;  // [2, steps] pairs of tiles: 16 queries each, a step is 32 dims
  const uint16_t* k;  // [kRunBlocks, steps] pairs of tiles
  const uint16_t*
      v;  // [kRunBlocks / 2, vectors] pairs of tiles, a vector is 16 dims; an even number of them
  uint16_t* p;  // scratch [kTileQueries, kProbStride]
};

inline constexpr int kTileRows = 16;
inline constexpr int kTileElems = 512;  // numbers in a tile
inline constexpr int kProbStride =
    kRunTokens + 32;  // not a power of 2: rows of a tile fall in different cache sets
static inline int TileSteps(int head_dim) { return (head_dim + 31) / 32; }
static inline int TileVectors(int head_dim) { return (head_dim + 31) / 32 * 2; }

struct TileKernels {
  // Up to kTileQueries queries, zeros below.
  void (*pack_q)(const float* const* q, int queries, int head_dim, uint16_t* out);
  // Blocks [block_begin, block_end) of `args`; V tokens outside of them or from token_end on become
  // zeros.
  void (*pack_f16)(const AttendArgs& args, uint16_t* k, uint16_t* v);
  void (*pack_q8)(const AttendArgs& args, uint16_t* k, uint16_t* v);
  // The two together are attend_f16 on what the others packed: score fills args.scores, and attend
  // does the rest. Meanwhile attend scores the queries of `next` (null: none), which have scores of
  // their own, so that the tile unit works beside the softmax. The calling thread's tile
  // configuration is lost.
  void (*score)(const AttendArgs& args, const TileArgs& tiles);
  void (*attend)(const AttendArgs& args, const TileArgs& tiles, const AttendArgs* next,
                 const TileArgs* next_tiles);
};

#if defined(__x86_64__)
const TileKernels& AmxTileKernels();
#endif

}  // namespace shoal
