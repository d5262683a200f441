// Attention on AMX tiles; see TileArgs for the operands.
#include <immintrin.h>

#include "kernels/cpu/attention_kernels.h"

namespace shoal {
namespace {

constexpr int kBlockTokens = 16;
constexpr int kPartDims = 32;   // dims that share a q8_0 scale
constexpr int kTileBytes = 64;  // of a row
constexpr int kPair = 2 * kTileElems;

// The compiler does not know that tile loads read memory: nothing may be moved over this.
inline void Fence() { __asm__ volatile("" ::: "memory"); }

inline __mmask16 First(int n) {
  return n >= 16  ? __mmask16{0xffff}
         : n <= 0 ? __mmask16{0}
                  : static_cast<__mmask16>((1u << n) - 1);
}

// --- Packing
// -------------------------------------------------------------------------------------------------

struct F16Type {
  static const uint8_t* Values(const uint8_t* x, int dims) { return x; }
  static __m512 Load(const uint8_t* x, int64_t i, __mmask16 mask) {
    return _mm512_cvtph_ps(
        _mm256_maskz_loadu_epi16(mask, reinterpret_cast<const uint16_t*>(x) + i));
  }
  // What a value of token lane or token row is to be multiplied by.
  static __m512 KScale(const uint8_t* x, int dim) { return _mm512_set1_ps(1); }
  static __m512 VScale(const uint8_t* x, int dim, int token) { return _mm512_set1_ps(1); }
};

struct Q8Type {
  static const uint8_t* Values(const uint8_t* x, int dims) {
    return x + 2 * kBlockTokens * ((dims + kPartDims - 1) / kPartDims);
  }
  static __m512 Load(const uint8_t* x, int64_t i, __mmask16 mask) {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, reinterpret_cast<const int8_t*>(x) + i)));
  }
  static __m512 KScale(const uint8_t* x, int dim) {
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(x) + dim / kPartDims * kBlockTokens;
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales)));
  }
  static __m512 VScale(const uint8_t* x, int dim, int token) {
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(x) + dim / kPartDims * kBlockTokens;
    return _mm512_set1_ps(_cvtsh_ss(scales[token]));
  }
};

// Writes row `row` of a pair of right-hand tiles: lane l holds even[l], odd[l]. The high part is
// cut off, which loses nothing of a half; the low part is rounded.
inline void StorePairRow(uint16_t* tiles, int row, __m512 even, __m512 odd) {
  const __m512i high_mask = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const __m512i half_ulp = _mm512_set1_epi32(0x8000);
  const __m512i e = _mm512_castps_si512(even), o = _mm512_castps_si512(odd);
  const __m512i e_high = _mm512_and_si512(e, high_mask), o_high = _mm512_and_si512(o, high_mask);
  const __m512i e_low = _mm512_add_epi32(
      _mm512_castps_si512(_mm512_sub_ps(even, _mm512_castsi512_ps(e_high))), half_ulp);
  const __m512i o_low = _mm512_add_epi32(
      _mm512_castps_si512(_mm512_sub_ps(odd, _mm512_castsi512_ps(o_high))), half_ulp);
  _mm512_storeu_si512(tiles + row * 32, _mm512_or_si512(_mm512_srli_epi32(e, 16), o_high));
  _mm512_storeu_si512(
      tiles + kTileElems + row * 32,
      _mm512_or_si512(_mm512_srli_epi32(e_low, 16), _mm512_and_si512(o_low, high_mask)));
}

template <typename Type>
void PackK(const AttendArgs& args, uint16_t* k) {
  const int steps = TileSteps(args.head_dim);
  for (int block = args.block_begin; block < args.block_end; ++block) {
    const uint8_t* values = Type::Values(args.k[block], args.head_dim);
    for (int pair = 0; pair < steps * 16; ++pair) {
      const int dim = 2 * pair;
      uint16_t* tiles = k + (static_cast<int64_t>(block) * steps + pair / 16) * kPair;
      __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
      if (dim < args.head_dim) {  // head_dim is even
        const __m512 scale = Type::KScale(args.k[block], dim);
        even = _mm512_mul_ps(Type::Load(values, dim * kBlockTokens, 0xffff), scale);
        odd = _mm512_mul_ps(Type::Load(values, (dim + 1) * kBlockTokens, 0xffff), scale);
      }
      StorePairRow(tiles, pair % 16, even, odd);
    }
  }
}

// Dims [dim, dim + 16) of a token of the run, zeros where there is none.
template <typename Type>
__m512 LoadV(const AttendArgs& args, int token, int dim, __mmask16 mask) {
  const int block = token / kBlockTokens;
  if (block < args.block_begin || token >= args.token_end) return _mm512_setzero_ps();
  const uint8_t* v = args.v[block];
  const int row = token % kBlockTokens;
  const __m512 x = Type::Load(Type::Values(v, args.head_dim),
                              static_cast<int64_t>(row) * args.head_dim + dim, mask);
  return _mm512_mul_ps(x, Type::VScale(v, dim, row));
}

template <typename Type>
void PackV(const AttendArgs& args, uint16_t* v) {
  const int vectors = TileVectors(args.head_dim);
  for (int pair = args.block_begin / 2; pair < (args.block_end + 1) / 2; ++pair) {
    for (int vector = 0; vector < vectors; ++vector) {
      const int dim = vector * 16;
      const __mmask16 mask = First(args.head_dim - dim);
      uint16_t* tiles = v + (static_cast<int64_t>(pair) * vectors + vector) * kPair;
      for (int row = 0; row < 16; ++row) {
        const int token = pair * 32 + row * 2;
        StorePairRow(tiles, row, LoadV<Type>(args, token, dim, mask),
                     LoadV<Type>(args, token + 1, dim, mask));
      }
    }
  }
}

template <typename Type>
void Pack(const AttendArgs& args, uint16_t* k, uint16_t* v) {
  PackK<Type>(args, k);
  PackV<Type>(args, v);
}

// Two vectors of a left-hand row, high and low parts rounded.
inline void StoreLeft(uint16_t* high, uint16_t* low, __m512 a, __m512 b) {
  const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const __m512 a_high = _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a), mask));
  const __m512 b_high = _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(b), mask));
  _mm512_storeu_si512(high, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b_high, a_high)));
  _mm512_storeu_si512(low, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(
                               _mm512_sub_ps(b, b_high), _mm512_sub_ps(a, a_high))));
}

void PackQ(const float* const* q, int queries, int head_dim, uint16_t* out) {
  const int steps = TileSteps(head_dim);
  for (int i = 0; i < kTileQueries; ++i) {
    for (int step = 0; step < steps; ++step) {
      __m512 a = _mm512_setzero_ps(), b = _mm512_setzero_ps();
      if (i < queries) {
        const int dims = head_dim - step * 32;
        a = _mm512_maskz_loadu_ps(First(dims), q[i] + step * 32);
        b = _mm512_maskz_loadu_ps(First(dims - 16), q[i] + step * 32 + 16);
      }
      uint16_t* high = out + (i / kTileRows * steps + step) * kPair + i % kTileRows * 32;
      StoreLeft(high, high + kTileElems, a, b);
    }
  }
}

// --- Attending
// -----------------------------------------------------------------------------------------------

// All eight tiles are 16 rows of 64 bytes. The layout is that of LDTILECFG.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

// Accumulators 0..3 take the left tiles 4, 5 times the right tiles 6, 7. Each operand is loaded
// once, and the products that one accumulator takes lie four apart, which hides their latency.
#define SHOAL_TILE_PRODUCTS \
  _tile_dpbf16ps(0, 4, 6);  \
  _tile_dpbf16ps(1, 4, 7);  \
  _tile_dpbf16ps(2, 5, 6);  \
  _tile_dpbf16ps(3, 5, 7)

inline void ZeroAccumulators() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// Rows whose softmax is computed while tiles are multiplied.
struct SoftmaxRows {
  const AttendArgs* args;  // null: none
  const float* top;        // [args->queries]
  uint16_t* p;             // [args->queries, kProbStride]
  int done = 0;

  void Take(int n);
};

// Scores of 32 queries and two blocks, and the softmax of `rows_per_step` rows of others for each
// step.
void ScoreTiles(const AttendArgs& args, const TileArgs& tiles, int block, SoftmaxRows* rows,
                int rows_per_step) {
  const int64_t row_of_tiles = static_cast<int64_t>(TileSteps(args.head_dim)) * kPair;
  const uint16_t* q = tiles.q;
  const uint16_t* k = tiles.k + block * row_of_tiles;
  const uint16_t* q_end = q + row_of_tiles;
  ZeroAccumulators();
  for (; q < q_end; q += kPair, k += kPair) {
    _tile_loadd(4, q, kTileBytes);
    _tile_loadd(5, q + row_of_tiles, kTileBytes);
    _tile_loadd(6, k + kTileElems, kTileBytes);
    _tile_loadd(7, k + row_of_tiles + kTileElems, kTileBytes);
    SHOAL_TILE_PRODUCTS;  // high * low
    _tile_loadd(6, k, kTileBytes);
    _tile_loadd(7, k + row_of_tiles, kTileBytes);
    rows->Take(rows_per_step / 2);
    SHOAL_TILE_PRODUCTS;  // high * high
    _tile_loadd(4, q + kTileElems, kTileBytes);
    _tile_loadd(5, q + row_of_tiles + kTileElems, kTileBytes);
    rows->Take(rows_per_step - rows_per_step / 2);
    SHOAL_TILE_PRODUCTS;  // low * high
  }
  float* scores = args.scores + block * kBlockTokens;
  float* scores2 = scores + kTileRows * kRunTokens;
  constexpr int kRowBytes = kRunTokens * sizeof(float);
  _tile_stored(0, scores, kRowBytes);
  _tile_stored(1, scores + kBlockTokens, kRowBytes);
  _tile_stored(2, scores2, kRowBytes);
  _tile_stored(3, scores2 + kBlockTokens, kRowBytes);
}

// 2^x for x <= 0, to 4e-6 relative. 0 from kExp2Floor down: no sum would notice such numbers, and
// the subnormal ones would cost a hundred cycles each. The polynomial interpolates 2^r at Chebyshev
// nodes of [-1/2, 1/2].
constexpr float kExp2Floor = -100;
inline __m512 Exp2(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(9.666368515e-03f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.592197584e-02f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.402234904e-01f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.931210452e-01f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(kExp2Floor), _CMP_GT_OQ), p,
                                n);
}

// Scores that the query does not see become kNoScore: they may be NaN, from garbage in the block.
void MaskScores(float* s, int first, int last, int begin, int end) {
  const __m512 none = _mm512_set1_ps(kNoScore);
  for (int t = first; t < begin; t += 16) _mm512_mask_storeu_ps(s + t, First(begin - t), none);
  for (int t = end & ~15; t < last; t += 16) {
    _mm512_mask_storeu_ps(s + t, static_cast<__mmask16>(~First(end - t)), none);
  }
}

// The largest score of each query, in score units before scaling; kNoScore when it sees none.
void MaxScores(const AttendArgs& args, float* max) {
  const int first = args.block_begin * kBlockTokens, last = args.block_end * kBlockTokens;
  for (int i = 0; i < args.queries; ++i) {
    float* s = args.scores + i * kRunTokens;
    const int begin = args.begin[i], end = args.end[i];
    if (begin >= end) {
      MaskScores(s, first, last, last, 0);
    } else if (begin > first || end < last) {
      MaskScores(s, first, last, begin, end);
    }
    // Two chains: the latency of one would be longer than the work.
    __m512 even = _mm512_loadu_ps(s + first), odd = even;
    int t = first + 16;
    for (; t + 32 <= last; t += 32) {
      even = _mm512_max_ps(even, _mm512_loadu_ps(s + t));
      odd = _mm512_max_ps(odd, _mm512_loadu_ps(s + t + 16));
    }
    if (t < last) even = _mm512_max_ps(even, _mm512_loadu_ps(s + t));
    max[i] = _mm512_reduce_max_ps(_mm512_max_ps(even, odd));
  }
}

inline void StoreProbs(uint16_t* p, __m512 a, __m512 b) {
  _mm512_storeu_si512(p, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)));
}

// Scores of one query to p, in pairs of blocks; leaves max and sum.
void SoftmaxRow(const AttendArgs& args, int query, float top, uint16_t* p) {
  const float* s = args.scores + query * kRunTokens;
  const int first = args.block_begin * kBlockTokens, last = args.block_end * kBlockTokens;
  const bool sees = args.begin[query] < args.end[query];
  const __m512 factor = _mm512_set1_ps(args.scale * 1.44269504088896341f);
  // The multiply-add rounds once, so the best score may end a little above 0: that does no harm.
  const __m512 shift = sees ? _mm512_mul_ps(_mm512_set1_ps(top), factor) : _mm512_setzero_ps();
  __m512 sum = _mm512_setzero_ps();
  const auto exp2 = [&](int t) {
    return Exp2(_mm512_fmsub_ps(_mm512_loadu_ps(s + t), factor, shift));
  };
  int t = first;
  if (t % 32 != 0) {
    const __m512 b = exp2(t);
    sum = b;
    StoreProbs(p + t - 16, _mm512_setzero_ps(), b);
    t += 16;
  }
  for (; t + 32 <= last; t += 32) {
    const __m512 a = exp2(t), b = exp2(t + 16);
    sum = _mm512_add_ps(sum, _mm512_add_ps(a, b));
    StoreProbs(p + t, a, b);
  }
  if (t < last) {
    const __m512 a = exp2(t);
    sum = _mm512_add_ps(sum, a);
    StoreProbs(p + t, a, _mm512_setzero_ps());
  }
  args.max[query] = sees ? top * args.scale : kNoScore;
  args.sum[query] = sees ? _mm512_reduce_add_ps(sum) : 0;
}

// Outputs of 32 queries and two vectors of dims.
void OutputTiles(const AttendArgs& args, const TileArgs& tiles, int vector) {
  const int64_t vectors = TileVectors(args.head_dim);
  constexpr int kProbBytes = kProbStride * sizeof(uint16_t);
  ZeroAccumulators();
  for (int pair = args.block_begin / 2; pair < (args.block_end + 1) / 2; ++pair) {
    const uint16_t* p = tiles.p + pair * 32;
    const uint16_t* v = tiles.v + (pair * vectors + vector) * kPair;
    _tile_loadd(4, p, kProbBytes);
    _tile_loadd(5, p + kTileRows * kProbStride, kProbBytes);
    _tile_loadd(6, v + kTileElems, kTileBytes);
    _tile_loadd(7, v + kPair + kTileElems, kTileBytes);
    SHOAL_TILE_PRODUCTS;  // p * low
    _tile_loadd(6, v, kTileBytes);
    _tile_loadd(7, v + kPair, kTileBytes);
    SHOAL_TILE_PRODUCTS;  // p * high
  }
  float* acc = args.acc + vector * 16;
  float* acc2 = acc + static_cast<int64_t>(kTileRows) * args.acc_stride;
  const int64_t row_bytes = args.acc_stride * static_cast<int64_t>(sizeof(float));
  _tile_stored(0, acc, row_bytes);
  _tile_stored(1, acc + 16, row_bytes);
  _tile_stored(2, acc2, row_bytes);
  _tile_stored(3, acc2 + 16, row_bytes);
}

void SoftmaxRows::Take(int n) {
  if (args == nullptr) return;
  for (; n > 0 && done < args->queries; --n, ++done) {
    SoftmaxRow(*args, done, top[done], p + done * kProbStride);
  }
}

constexpr TileConfig kConfig;

// Blocks go in pairs; scores of a block that nobody sees are never looked at.
void AllScores(const AttendArgs& args, const TileArgs& tiles, SoftmaxRows* rows) {
  const int first = args.block_begin & ~1;
  const int steps = (args.block_end - first + 1) / 2 * TileSteps(args.head_dim);
  for (int block = first; block < args.block_end; block += 2) {
    ScoreTiles(args, tiles, block, rows, (kTileQueries + steps - 1) / steps);
  }
}

void Score(const AttendArgs& args, const TileArgs& tiles) {
  _tile_loadconfig(&kConfig);
  Fence();
  SoftmaxRows none{nullptr, nullptr, nullptr};
  AllScores(args, tiles, &none);
  Fence();
  _tile_release();
}

void Attend(const AttendArgs& args, const TileArgs& tiles, const AttendArgs* next,
            const TileArgs* next_tiles) {
  _tile_loadconfig(&kConfig);
  float top[kTileQueries];
  MaxScores(args, top);
  SoftmaxRows rows{&args, top, tiles.p};
  Fence();
  if (next != nullptr) AllScores(*next, *next_tiles, &rows);
  rows.Take(kTileQueries);
  Fence();
  for (int vector = 0; vector < TileVectors(args.head_dim); vector += 2) {
    OutputTiles(args, tiles, vector);
  }
  Fence();
  _tile_release();
}

}  // namespace

const TileKernels& AmxTileKernels() {
  static constexpr TileKernels kKernels = {PackQ, Pack<F16Type>, Pack<Q8Type>, Score, Attend};
  return kKernels;
}

}  // namespace shoal
