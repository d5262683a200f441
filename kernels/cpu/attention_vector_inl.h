// The f32 attention kernels, written once over vectors of kLanes floats. attention_avx2.cc and
// attention_avx512.cc define the vector operations and then include this file, which is why it has
// no includes of its own.
//
// Scores: 16 tokens of K are one or two vectors, so a score is a lane and no horizontal sum is
// needed; each K vector that is loaded (and widened from f16 or int8) serves several queries.
// Outputs: dims are lanes, and each V vector serves several queries. An element's sum runs over
// dims or tokens in order whatever the tile size, so tiles of different sizes give the same bits.
// int8 * half is exact in float: q8_0 costs no accuracy here.
#pragma once

#ifdef __clang__
#define SHOAL_UNROLL _Pragma("unroll")
#else
#define SHOAL_UNROLL _Pragma("GCC unroll 16")
#endif

namespace shoal {
namespace {

constexpr int kBlockTokens = 16;
constexpr int kPartDims = 32;  // dims that share a q8_0 scale
constexpr int kBlockVecs = kBlockTokens / kLanes;
constexpr int kMaxParts = 16;

struct F32Type {
  static constexpr bool kScaled = false;
  static constexpr int kBytes = 4;
  static const uint8_t* Values(const uint8_t* x, int dims) { return x; }
  static Vec Load(const uint8_t* x, int64_t i) {
    return LoadF32(reinterpret_cast<const float*>(x) + i);
  }
  static Vec LoadFirst(const uint8_t* x, int64_t i, int n) {
    return LoadFirstF32(reinterpret_cast<const float*>(x) + i, n);
  }
};

struct F16Type {
  static constexpr bool kScaled = false;
  static constexpr int kBytes = 2;
  static const uint8_t* Values(const uint8_t* x, int dims) { return x; }
  static Vec Load(const uint8_t* x, int64_t i) {
    return LoadF16(reinterpret_cast<const uint16_t*>(x) + i);
  }
  static Vec LoadFirst(const uint8_t* x, int64_t i, int n) {
    return LoadFirstF16(reinterpret_cast<const uint16_t*>(x) + i, n);
  }
};

struct Q8Type {
  static constexpr bool kScaled = true;
  static constexpr int kBytes = 1;
  static const uint8_t* Values(const uint8_t* x, int dims) {
    return x + 2 * kBlockTokens * ((dims + kPartDims - 1) / kPartDims);
  }
  static Vec Load(const uint8_t* x, int64_t i) {
    return LoadI8(reinterpret_cast<const int8_t*>(x) + i);
  }
  static Vec LoadFirst(const uint8_t* x, int64_t i, int n) {
    return LoadFirstI8(reinterpret_cast<const int8_t*>(x) + i, n);
  }
};

// Blocks lie anywhere in memory and K of one head is 2 KiB of a block, too short for the hardware's
// prefetcher to help. As with weights (linear_simd.h), what is far ahead is asked for into L2 and
// what is near into L1.
constexpr int kAheadBlocks = 4;
constexpr int kNearBytes = 1024;

inline void PrefetchFar(const uint8_t* p) { __builtin_prefetch(p, 0, 2); }
inline void PrefetchNear(const uint8_t* p) { __builtin_prefetch(p, 0, 3); }

// scores[query][token] for queries [first, first + kQueries) and blocks [block, block + kBlocks).
template <typename Type, int kQueries, int kBlocks>
void ScoreTile(const AttendArgs& args, int first, int block) {
  constexpr int kVecs = kBlocks * kBlockVecs;
  const float* q[kQueries];
  SHOAL_UNROLL for (int i = 0; i < kQueries; ++i) q[i] = args.q[first + i];
  const uint8_t* k[kBlocks];
  SHOAL_UNROLL for (int b = 0; b < kBlocks; ++b) {
    k[b] = Type::Values(args.k[block + b], args.head_dim);
  }
  // What comes next: the following blocks of K, then the first of V.
  const uint8_t* next[kBlocks];
  SHOAL_UNROLL for (int b = 0; b < kBlocks; ++b) {
    const int at = block + kBlocks + b;
    const int v_at = at - args.block_end + args.block_begin;
    next[b] = at < args.block_end ? args.k[at] : args.v[v_at < args.block_end ? v_at : block];
  }
  Vec acc[kQueries][kVecs];
  SHOAL_UNROLL for (int i = 0; i < kQueries; ++i) {
    SHOAL_UNROLL for (int v = 0; v < kVecs; ++v) acc[i][v] = Set(0);
  }
  const int part_dims = Type::kScaled ? kPartDims : args.head_dim;
  for (int begin = 0; begin < args.head_dim; begin += part_dims) {
    const int end = args.head_dim - begin < part_dims ? args.head_dim : begin + part_dims;
    Vec scale[kVecs];
    if constexpr (Type::kScaled) {
      SHOAL_UNROLL for (int v = 0; v < kVecs; ++v) {
        const uint16_t* scales = reinterpret_cast<const uint16_t*>(args.k[block + v / kBlockVecs]);
        scale[v] = LoadF16(scales + begin / kPartDims * kBlockTokens + v % kBlockVecs * kLanes);
      }
    }
    constexpr int kDims = 2;  // of f16 K they are a cache line; head_dim is even
    for (int pair = begin; pair < end; pair += kDims) {
      SHOAL_UNROLL for (int b = 0; b < kBlocks; ++b) {
        const int at = pair * kBlockTokens * Type::kBytes;
        SHOAL_UNROLL for (int line = 0; line < kDims * kBlockTokens * Type::kBytes; line += 64) {
          PrefetchFar(next[b] + at + line);
          PrefetchNear(k[b] + at + kNearBytes / kBlocks + line);
        }
      }
      SHOAL_UNROLL for (int j = 0; j < kDims; ++j) {
        const int d = pair + j;
        Vec kv[kVecs];
        SHOAL_UNROLL for (int v = 0; v < kVecs; ++v) {
          kv[v] = Type::Load(k[v / kBlockVecs], d * kBlockTokens + v % kBlockVecs * kLanes);
          if constexpr (Type::kScaled) kv[v] = Mul(kv[v], scale[v]);
        }
        SHOAL_UNROLL for (int i = 0; i < kQueries; ++i) {
          const Vec x = Set(q[i][d]);
          SHOAL_UNROLL for (int v = 0; v < kVecs; ++v) acc[i][v] = Fma(x, kv[v], acc[i][v]);
        }
      }
    }
  }
  const Vec scale = Set(args.scale);
  SHOAL_UNROLL for (int i = 0; i < kQueries; ++i) {
    float* out = args.scores + (first + i) * kRunTokens + block * kBlockTokens;
    SHOAL_UNROLL for (int v = 0; v < kVecs; ++v) Store(out + v * kLanes, Mul(acc[i][v], scale));
  }
}

template <typename Type, int kQueries>
void ScoreQueries(const AttendArgs& args, int first) {
  constexpr int kFit = kScoreTile / (kQueries * kBlockVecs);
  constexpr int kBlocks = kFit < 1 ? 1 : kFit > 8 ? 8 : kFit;
  int block = args.block_begin;
  for (; block + kBlocks <= args.block_end; block += kBlocks) {
    ScoreTile<Type, kQueries, kBlocks>(args, first, block);
  }
  for (; block < args.block_end; ++block) ScoreTile<Type, kQueries, 1>(args, first, block);
}

// Weights of scores so far below the best are 0: no f32 sum would notice them, and as subnormal
// numbers they would cost a hundred cycles each.
constexpr float kExpFloor = -69;

// exp(x) for x <= 0, to about 1e-7 relative; 0 from kExpFloor down. Cephes' expf: x = n ln 2 + r, a
// polynomial in r.
Vec Exp(Vec score) {
  const Vec x = Max(score, Set(kExpFloor));
  const Vec n = Round(Mul(x, Set(1.44269504088896341f)));
  Vec r = Fma(n, Set(-0.693359375f), x);
  r = Fma(n, Set(2.12194440e-4f), r);
  Vec p = Set(1.9875691500e-4f);
  p = Fma(p, r, Set(1.3981999507e-3f));
  p = Fma(p, r, Set(8.3334519073e-3f));
  p = Fma(p, r, Set(4.1665795894e-2f));
  p = Fma(p, r, Set(1.6666665459e-1f));
  p = Fma(p, r, Set(5.0000001201e-1f));
  p = Fma(Mul(p, r), r, Add(r, Set(1)));
  return KeepWhereAbove(score, Set(kExpFloor), ScaleByPowerOf2(p, n));
}

// Turns the scores of a query into p and leaves max and sum. Tokens that the query does not see get
// p = 0.
void SoftmaxQuery(const AttendArgs& args, int query) {
  float* s = args.scores + query * kRunTokens;
  const int first = args.block_begin * kBlockTokens, last = args.block_end * kBlockTokens;
  const int begin = args.begin[query], end = args.end[query];
  // Lanes beyond hold scores of garbage, perhaps NaN: replace, never multiply.
  for (int t = first; t < last && t < begin; ++t) s[t] = -__builtin_inff();
  for (int t = end > first ? end : first; t < last; ++t) s[t] = -__builtin_inff();
  Vec max = Set(kNoScore);
  for (int t = first; t < last; t += kLanes) max = Max(max, LoadF32(s + t));
  const float top = ReduceMax(max);
  const Vec shift = Set(top);
  Vec sum = Set(0);
  for (int t = first; t < last; t += kLanes) {
    const Vec p = Exp(Sub(LoadF32(s + t), shift));
    Store(s + t, p);
    sum = Add(sum, p);
  }
  args.max[query] = top;
  args.sum[query] = ReduceSum(sum);
}

// acc[query][dim] = sum of p * v for kQueries queries and kVecs vectors of dims; `partial` dims of
// the last vector are loaded (kLanes: all).
template <typename Type, int kQueries, int kVecs, bool kPartial>
void OutputTile(const AttendArgs& args, int first, int dim, int partial) {
  const float* p[kQueries];
  SHOAL_UNROLL for (int i = 0; i < kQueries; ++i) p[i] = args.scores + (first + i) * kRunTokens;
  Vec acc[kQueries][kVecs];
  SHOAL_UNROLL for (int i = 0; i < kQueries; ++i) {
    SHOAL_UNROLL for (int v = 0; v < kVecs; ++v) acc[i][v] = Set(0);
  }
  for (int block = args.block_begin; block < args.block_end; ++block) {
    const int base = block * kBlockTokens;
    const int tokens = args.token_end - base < kBlockTokens ? args.token_end - base : kBlockTokens;
    const uint8_t* values = Type::Values(args.v[block], args.head_dim);
    float scales[kMaxParts * kBlockTokens];
    if constexpr (Type::kScaled) {
      const uint16_t* half = reinterpret_cast<const uint16_t*>(args.v[block]);
      const int last = (dim + kVecs * kLanes - 1) / kPartDims;
      for (int i = dim / kPartDims * kBlockTokens;
           i < (last + 1) * kBlockTokens &&
           i < (args.head_dim + kPartDims - 1) / kPartDims * kBlockTokens;
           i += kLanes) {
        Store(scales + i, LoadF16(half + i));
      }
    }
    // What comes next: the following blocks of V, then the first of the next K.
    const int at = block + kAheadBlocks - args.block_end;
    const uint8_t* next = at < 0 ? args.v[block + kAheadBlocks]
                          : args.next_k != 0 && args.block_begin + at < args.block_end
                              ? args.k[args.block_begin + at] + args.next_k
                              : args.v[block];
    // V of one head in a block ends soon; it goes on in the next block.
    const int64_t bytes = int64_t{kBlockTokens} * args.head_dim * Type::kBytes;
    const uint8_t* after = args.v[block + 1 < args.block_end ? block + 1 : block];
    for (int t = 0; t < tokens; ++t) {
      SHOAL_UNROLL for (int line = 0; line < kVecs * kLanes * Type::kBytes; line += 64) {
        const int64_t offset =
            (static_cast<int64_t>(t) * args.head_dim + dim) * Type::kBytes + line;
        PrefetchFar(next + offset);
        const int64_t near = offset + kNearBytes;
        PrefetchNear(near < bytes ? args.v[block] + near : after + (near - bytes));
      }
      Vec x[kVecs];
      SHOAL_UNROLL for (int v = 0; v < kVecs; ++v) {
        const int at = dim + v * kLanes;
        const int64_t index = static_cast<int64_t>(t) * args.head_dim + at;
        x[v] = kPartial ? Type::LoadFirst(values, index, partial) : Type::Load(values, index);
        if constexpr (Type::kScaled) {
          x[v] = Mul(x[v], Set(scales[at / kPartDims * kBlockTokens + t]));
        }
      }
      SHOAL_UNROLL for (int i = 0; i < kQueries; ++i) {
        const Vec weight = Set(p[i][base + t]);
        SHOAL_UNROLL for (int v = 0; v < kVecs; ++v) acc[i][v] = Fma(weight, x[v], acc[i][v]);
      }
    }
  }
  SHOAL_UNROLL for (int i = 0; i < kQueries; ++i) {
    float* out = args.acc + static_cast<int64_t>(first + i) * args.acc_stride + dim;
    SHOAL_UNROLL for (int v = 0; v < kVecs; ++v) Store(out + v * kLanes, acc[i][v]);
  }
}

template <typename Type, int kQueries>
void OutputQueries(const AttendArgs& args, int first) {
  int dim = 0;
  for (; dim + kOutputVecs * kLanes <= args.head_dim; dim += kOutputVecs * kLanes) {
    OutputTile<Type, kQueries, kOutputVecs, false>(args, first, dim, kLanes);
  }
  for (; dim + kLanes <= args.head_dim; dim += kLanes) {
    OutputTile<Type, kQueries, 1, false>(args, first, dim, kLanes);
  }
  if (dim < args.head_dim)
    OutputTile<Type, kQueries, 1, true>(args, first, dim, args.head_dim - dim);
}

template <typename Type>
void Attend(const AttendArgs& args) {
  int i = 0;
  for (; i + kScoreQueries <= args.queries; i += kScoreQueries) {
    ScoreQueries<Type, kScoreQueries>(args, i);
  }
  if constexpr (kScoreQueries > 4) {
    for (; i + 4 <= args.queries; i += 4) ScoreQueries<Type, 4>(args, i);
  }
  for (; i + 2 <= args.queries; i += 2) ScoreQueries<Type, 2>(args, i);
  for (; i < args.queries; ++i) ScoreQueries<Type, 1>(args, i);
  for (i = 0; i < args.queries; ++i) SoftmaxQuery(args, i);
  for (i = 0; i + 4 <= args.queries; i += 4) OutputQueries<Type, 4>(args, i);
  for (; i + 2 <= args.queries; i += 2) OutputQueries<Type, 2>(args, i);
  for (; i < args.queries; ++i) OutputQueries<Type, 1>(args, i);
}

void Merge(const MergeArgs& args) {
  // Lanes are queries for the factors. Spare lanes hold equal maxima, hence factors of 1.
  float keep[kTileQueries] = {}, add[kTileQueries] = {};
  for (int i = 0; i < args.queries; ++i) {
    const float max = args.max[i] > args.run_max[i] ? args.max[i] : args.run_max[i];
    keep[i] = args.max[i] - max;
    add[i] = args.run_max[i] - max;
    args.max[i] = max;
  }
  for (int i = 0; i < args.queries; i += kLanes) {
    Store(keep + i, Exp(LoadF32(keep + i)));
    Store(add + i, Exp(LoadF32(add + i)));
  }
  for (int i = 0; i < args.queries; ++i) {
    args.sum[i] = args.sum[i] * keep[i] + args.run_sum[i] * add[i];
    float* acc = args.acc + static_cast<int64_t>(i) * args.stride;
    const float* run = args.run_acc + static_cast<int64_t>(i) * args.stride;
    const Vec k = Set(keep[i]), a = Set(add[i]);
    // Both accumulators are padded to 16 dims.
    for (int d = 0; d < args.dims; d += kLanes) {
      Store(acc + d, Fma(LoadF32(acc + d), k, Mul(LoadF32(run + d), a)));
    }
  }
}

void ToHalf(const float* x, uint16_t* out, int n) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) StoreF16(out + i, LoadF32(x + i));
  if (i == n) return;
  uint16_t tail[kLanes];
  StoreF16(tail, LoadFirstF32(x + i, n - i));
  for (int t = 0; i + t < n; ++t) out[i + t] = tail[t];
}

constexpr AttentionKernels kVectorKernels = {Attend<F32Type>, Attend<F16Type>, Attend<Q8Type>,
                                             Merge, ToHalf};

}  // namespace
}  // namespace shoal
