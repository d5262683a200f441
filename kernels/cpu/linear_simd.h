// Panel products written once for every vector instruction set. Included like linear_formats.h,
// which it needs.

// ---- The product with int8 activations.

// Dot products of unsigned codes start at -(offset * sum of activations), so that they come out
// exact.
template <int kShift>
inline __attribute__((always_inline)) I Start(int32_t neg_sum) {
  if constexpr (kShift == 0) return Isa::ZeroI();
  return Isa::Shl32(Isa::Set32(neg_sum), kShift);
}

// What the integer sums of a sub-block, one or one for each half, add to a row's result.
template <class Fmt>
inline __attribute__((always_inline)) F AddSums(const Sub& sub, const Q8Block& a, const I sum[2],
                                                F acc) {
  if constexpr (Fmt::kScales == 1) {
    const F scale = Isa::Mul(sub.scale[0], Isa::Broadcast(a.scale));
    acc = Isa::Fma(Isa::ToFloat(sum[0]), scale, acc);
    if constexpr (Fmt::kBias) acc = Isa::Fma(sub.bias[0], Isa::Broadcast(a.sum), acc);
  } else {
    const F both =
        Isa::Fma(Isa::ToFloat(sum[1]), sub.scale[1], Isa::Mul(Isa::ToFloat(sum[0]), sub.scale[0]));
    acc = Isa::Fma(both, Isa::Broadcast(a.scale), acc);
    if constexpr (Fmt::kBias) {
      acc = Isa::Fma(sub.bias[0], Isa::Broadcast(a.half_sum[0]), acc);
      acc = Isa::Fma(sub.bias[1], Isa::Broadcast(a.half_sum[1]), acc);
    }
  }
  return acc;
}

template <class Fmt>
inline __attribute__((always_inline)) F AddRow(const Sub& sub, const Q8Block& a, F acc) {
  I sum[2];
  if constexpr (Fmt::kScales == 1) {
    sum[0] = Isa::template Dot<Fmt::kKind, 8>(sub.line, a.q, Start<Fmt::kShift>(a.neg_sum));
  } else {
    sum[0] = Isa::template Dot<Fmt::kKind, 4>(sub.line, a.q, Start<Fmt::kShift>(a.neg_half_sum[0]));
    sum[1] = Isa::template Dot<Fmt::kKind, 4>(sub.line + 4, a.q + 16,
                                              Start<Fmt::kShift>(a.neg_half_sum[1]));
  }
  return AddSums<Fmt>(sub, a, sum, acc);
}

// Two rows of activations at once, by lines that PairLines has changed and what PairRows made of
// the rows. The sums are those of AddRow: integers.
template <class P, class Fmt>
inline __attribute__((always_inline)) void AddPair(const Sub& sub, const I* pair, const Q8Block& a,
                                                   const Q8Block& b, F* acc_a, F* acc_b) {
  I sum_a[2], sum_b[2];
  if constexpr (Fmt::kScales == 1) {
    P::template DotPair<8>(sub.line, pair, Start<Fmt::kShift>(a.neg_sum),
                           Start<Fmt::kShift>(b.neg_sum), &sum_a[0], &sum_b[0]);
  } else {
    for (int half = 0; half < 2; ++half) {
      P::template DotPair<4>(sub.line + 4 * half, pair + 2 * half,
                             Start<Fmt::kShift>(a.neg_half_sum[half]),
                             Start<Fmt::kShift>(b.neg_half_sum[half]), &sum_a[half], &sum_b[half]);
    }
  }
  *acc_a = AddSums<Fmt>(sub, a, sum_a, *acc_a);
  *acc_b = AddSums<Fmt>(sub, b, sum_b, *acc_b);
}

// Column block i of M rows times a sub-block, whose planes are at p.
template <class P, class Fmt, int M>
inline __attribute__((always_inline)) void AddSubBlock(const typename Fmt::Head& head,
                                                       const uint8_t* p, int s,
                                                       const Q8Block* const* rows, int64_t i,
                                                       F acc[M][kParts]) {
  constexpr int kPaired = P::kPairs ? M & ~1 : 0;
  I pairs[kPaired / 2 + 1][4];
  if constexpr (kPaired > 0) {
    for (int m = 0; m < kPaired; m += 2) P::PairRows(rows[m][i].q, rows[m + 1][i].q, pairs[m / 2]);
  }
  for (int part = 0; part < kParts; ++part) {
    Sub sub;
    LoadSub<Fmt>(head, p, s, part, &sub);
#pragma GCC unroll 8
    for (int m = kPaired; m < M; ++m) acc[m][part] = AddRow<Fmt>(sub, rows[m][i], acc[m][part]);
    if constexpr (kPaired > 0) {
      P::PairLines(sub.line);
#pragma GCC unroll 8
      for (int m = 0; m < kPaired; m += 2) {
        AddPair<P, Fmt>(sub, pairs[m / 2], rows[m][i], rows[m + 1][i], &acc[m][part],
                        &acc[m + 1][part]);
      }
    }
  }
}

#include "kernels/cpu/linear_by_lines.h"

// How far ahead of the weights being multiplied the next ones are asked for: the hardware's own
// prefetch stops at page boundaries and starts late in each. First into L2, a page ahead, then into
// L1: asked for at once they would have to share the few fill buffers of L1. Two threads of a
// Sapphire Rapids that read 32 GB/s of plain memory read 30.8 of Q4_0 so, 28.7 with 2 KiB into L1
// alone, 26 with 4 KiB into L1 and 22 without.
constexpr int kL1PrefetchBytes = 1024, kL2PrefetchBytes = 4096;

inline __attribute__((always_inline)) void Prefetch(const uint8_t* p) {
  __builtin_prefetch(p + kL1PrefetchBytes, 0, 3);
  __builtin_prefetch(p + kL2PrefetchBytes, 0, 2);
}

template <class Fmt, int M>
void ProductRows(const PackedShape& shape, const uint8_t* panel, const Q8Block* const* rows,
                 float* tile) {
  F acc[M][kParts];
  for (int m = 0; m < M; ++m) {
    for (int part = 0; part < kParts; ++part) acc[m][part] = Isa::Zero();
  }
  const uint8_t* p = panel;
  const int64_t subs = shape.cols / 32;
  int s = Fmt::kSubs > 1 ? shape.lead : 0;
  typename Fmt::Head head;
  for (int64_t i = 0; i < subs;) {
    Fmt::Header(p, &head);
    // A short header is asked for with its only sub-block.
    constexpr int kHeaderOfSub = Fmt::kSubs == 1 ? Fmt::kHeaderBytes : 0;
    for (int at = kHeaderOfSub; at < Fmt::kHeaderBytes; at += 64) Prefetch(p + at);
    p += Fmt::kHeaderBytes;
    for (; s < Fmt::kSubs && i < subs; ++s, ++i) {
      for (int at = 0; at < Fmt::kSubBytes + kHeaderOfSub; at += 64) Prefetch(p + at);
      if constexpr (Isa::kByLines) {
        AddSubByLines<Isa, Fmt, M>(PackedSub<Fmt>{head, p, s}, rows, i, acc);
      } else {
        AddSubBlock<Isa, Fmt, M>(head, p, s, rows, i, acc);
      }
      p += Fmt::kSubBytes;
    }
    s = 0;
  }
  for (int m = 0; m < M; ++m) {
    for (int part = 0; part < kParts; ++part)
      Isa::StoreF(tile + 16 * m + kLanes * part, acc[m][part]);
  }
}

template <class Fmt>
void Product(const PackedShape& shape, const uint8_t* panel, const Q8Block* const* rows, int m,
             float* tile) {
  if constexpr (Isa::kByLines) {
    if (m > Isa::kTileRows) return ProductUnpacked<Fmt>(shape, panel, rows, m, tile);
  }
  while (m > 0) {
    const int n = m < Isa::kTileRows ? m : Isa::kTileRows;
    switch (n) {
      case 1:
        ProductRows<Fmt, 1>(shape, panel, rows, tile);
        break;
      case 2:
        ProductRows<Fmt, 2>(shape, panel, rows, tile);
        break;
      case 3:
        ProductRows<Fmt, 3>(shape, panel, rows, tile);
        break;
      case 4:
        ProductRows<Fmt, 4>(shape, panel, rows, tile);
        break;
      default:
        if constexpr (Isa::kTileRows > 4) {
          switch (n) {
            case 5:
              ProductRows<Fmt, 5>(shape, panel, rows, tile);
              break;
            case 6:
              ProductRows<Fmt, 6>(shape, panel, rows, tile);
              break;
            case 7:
              ProductRows<Fmt, 7>(shape, panel, rows, tile);
              break;
            default:
              ProductRows<Fmt, 8>(shape, panel, rows, tile);
              break;
          }
        }
    }
    m -= n;
    rows += n;
    tile += 16 * n;
  }
}

// ---- The products with f32 activations.

template <int M>
void ProductF32Rows(int64_t cols, const uint8_t* panel, const float* const* rows, float* tile) {
  F acc[M][kParts];
  for (int m = 0; m < M; ++m) {
    for (int part = 0; part < kParts; ++part) acc[m][part] = Isa::Zero();
  }
  const float* w = reinterpret_cast<const float*>(panel);
  for (int64_t k = 0; k < cols; ++k, w += kPanelRows) {
    Prefetch(reinterpret_cast<const uint8_t*>(w));
    for (int part = 0; part < kParts; ++part) {
      const F x = Isa::LoadF(w + kLanes * part);
      for (int m = 0; m < M; ++m)
        acc[m][part] = Isa::Fma(x, Isa::Broadcast(rows[m][k]), acc[m][part]);
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int part = 0; part < kParts; ++part)
      Isa::StoreF(tile + 16 * m + kLanes * part, acc[m][part]);
  }
}

// Even and odd columns have their own sums: one chain of additions would be slower than memory.
template <int M>
void ProductBf16Rows(int64_t cols, const uint8_t* panel, const float* const* rows, float* tile) {
  F acc[M][2][kParts];
  for (int m = 0; m < M; ++m) {
    for (int part = 0; part < kParts; ++part) acc[m][0][part] = acc[m][1][part] = Isa::Zero();
  }
  for (int64_t k = 0; k < cols; k += 2, panel += 64) {
    Prefetch(panel);
    for (int part = 0; part < kParts; ++part) {
      const I both = Isa::Load(panel + kPartBytes * part);
      const F even = Isa::AsFloat(Isa::Shl32(both, 16));
      const F odd = Isa::AsFloat(Isa::And(both, Isa::Set32(static_cast<int32_t>(0xffff0000u))));
      for (int m = 0; m < M; ++m) {
        acc[m][0][part] = Isa::Fma(even, Isa::Broadcast(rows[m][k]), acc[m][0][part]);
        acc[m][1][part] = Isa::Fma(odd, Isa::Broadcast(rows[m][k + 1]), acc[m][1][part]);
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int part = 0; part < kParts; ++part) {
      Isa::StoreF(tile + 16 * m + kLanes * part, Isa::Add(acc[m][0][part], acc[m][1][part]));
    }
  }
}

// F16 lines are widened as they lie, two columns of a row side by side, and meet a pair of
// activations; even and odd columns are added at the end.
template <int M>
void ProductF16Rows(int64_t cols, const uint8_t* panel, const float* const* rows, float* tile) {
  constexpr int kVectors = 32 / kLanes;
  F acc[M][kVectors];
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < kVectors; ++v) acc[m][v] = Isa::Zero();
  }
  for (int64_t k = 0; k < cols; k += 2, panel += 64) {
    Prefetch(panel);
    F w[kVectors];
    for (int v = 0; v < kVectors; ++v) w[v] = Isa::LoadHalf(panel + 2 * kLanes * v);
    for (int m = 0; m < M; ++m) {
      const F a = Isa::Pair(rows[m] + k);
      for (int v = 0; v < kVectors; ++v) acc[m][v] = Isa::Fma(w[v], a, acc[m][v]);
    }
  }
  for (int m = 0; m < M; ++m) {
    alignas(64) float both[32];
    for (int v = 0; v < kVectors; ++v) Isa::StoreF(both + kLanes * v, acc[m][v]);
    for (int r = 0; r < kPanelRows; ++r) tile[16 * m + r] = both[2 * r] + both[2 * r + 1];
  }
}

template <DType kType, int M>
void FloatRows(int64_t cols, const uint8_t* panel, const float* const* rows, float* tile) {
  if constexpr (kType == DType::kF32) ProductF32Rows<M>(cols, panel, rows, tile);
  if constexpr (kType == DType::kF16) ProductF16Rows<M>(cols, panel, rows, tile);
  if constexpr (kType == DType::kBF16) ProductBf16Rows<M>(cols, panel, rows, tile);
}

template <DType kType>
void FloatProduct(const PackedShape& shape, const uint8_t* panel, const float* const* rows, int m,
                  float* tile) {
  // F16 rows have sums of 32 columns side by side, BF16 rows two of 16.
  constexpr bool kTwice =
      (kType == DType::kF16 && kLanes < 16) || (kType == DType::kBF16 && kLanes < 8);
  constexpr int kMost = kTwice ? 2 : Isa::kFloatRows;
  while (m > 0) {
    const int n = m < kMost ? m : kMost;
    switch (n) {
      case 1:
        FloatRows<kType, 1>(shape.cols, panel, rows, tile);
        break;
      case 2:
        FloatRows<kType, 2>(shape.cols, panel, rows, tile);
        break;
      case 3:
        FloatRows<kType, 3>(shape.cols, panel, rows, tile);
        break;
      case 4:
        FloatRows<kType, 4>(shape.cols, panel, rows, tile);
        break;
      default:
        if constexpr (kMost > 4) {
          switch (n) {
            case 5:
              FloatRows<kType, 5>(shape.cols, panel, rows, tile);
              break;
            case 6:
              FloatRows<kType, 6>(shape.cols, panel, rows, tile);
              break;
            case 7:
              FloatRows<kType, 7>(shape.cols, panel, rows, tile);
              break;
            default:
              FloatRows<kType, 8>(shape.cols, panel, rows, tile);
              break;
          }
        }
    }
    m -= n;
    rows += n;
    tile += 16 * n;
  }
}

// ---- Activations.

void Quantize(const float* x, int64_t blocks, Q8Block* out) {
  constexpr int kVectors = 32 / kLanes;
  for (int64_t b = 0; b < blocks; ++b, x += 32, ++out) {
    F v[kVectors];
    F most = Isa::Zero();
    for (int i = 0; i < kVectors; ++i) {
      v[i] = Isa::LoadF(x + kLanes * i);
      most = Isa::Max(most, Isa::Abs(v[i]));
    }
    const float extreme = Isa::MaxLane(most);
    // Below this the reciprocal would overflow; such a block is zero beside anything a model
    // computes.
    const bool zero = !(extreme > 1e-30f);
    const float scale = zero ? 0 : extreme / 127;
    const F inverse = Isa::Broadcast(zero ? 0 : 127 / extreme);
    for (int i = 0; i < kVectors; ++i) Isa::StoreInt8(out->q + kLanes * i, Isa::Mul(v[i], inverse));
    int32_t sum[2] = {0, 0};
    for (int i = 0; i < 16; ++i) {
      sum[0] += out->q[i];
      sum[1] += out->q[16 + i];
    }
    out->scale = scale;
    out->sum = scale * static_cast<float>(sum[0] + sum[1]);
    out->neg_sum = -(sum[0] + sum[1]);
    for (int i = 0; i < 2; ++i) {
      out->half_sum[i] = scale * static_cast<float>(sum[i]);
      out->neg_half_sum[i] = -sum[i];
    }
    out->unused = 0;
  }
}

float SumSquares(const float* x, int64_t n) {
  F acc[4] = {Isa::Zero(), Isa::Zero(), Isa::Zero(), Isa::Zero()};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int j = 0; j < 4; ++j) {
      const F v = Isa::LoadF(x + i + kLanes * j);
      acc[j] = Isa::Fma(v, v, acc[j]);
    }
  }
  alignas(64) float lanes[4 * kLanes];
  for (int j = 0; j < 4; ++j) Isa::StoreF(lanes + kLanes * j, acc[j]);
  float sum = 0;
  for (int j = 0; j < 4 * kLanes; ++j) sum += lanes[j];
  for (; i < n; ++i) sum += x[i] * x[i];
  return sum;
}

void Scale(const float* x, const float* weight, float factor, int64_t n, float* out) {
  const F f = Isa::Broadcast(factor);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Isa::StoreF(out + i, Isa::Mul(Isa::Mul(Isa::LoadF(x + i), f), Isa::LoadF(weight + i)));
  }
  for (; i < n; ++i) out[i] = x[i] * factor * weight[i];
}

#include "kernels/cpu/linear_activation.h"

template <Activation kActivation>
void Gated(const float* gate, const float* up, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Isa::StoreF(out + i, GatedOf<kActivation>(Isa::LoadF(gate + i), Isa::LoadF(up + i)));
  }
  if (i == n) return;
  // The rest goes through the same code: a value must not depend on where its column stands.
  alignas(64) float g[kLanes] = {}, u[kLanes] = {}, o[kLanes];
  for (int64_t j = i; j < n; ++j) {
    g[j - i] = gate[j];
    u[j - i] = up[j];
  }
  Isa::StoreF(o, GatedOf<kActivation>(Isa::LoadF(g), Isa::LoadF(u)));
  for (int64_t j = i; j < n; ++j) out[j] = o[j - i];
}

// Round to nearest even. No NaN comes out of NaN with a mantissa of ones only; activations hold
// none.
void ToBf16(const float* x, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    union {
      float f;
      uint32_t u;
    } v{x[i]};
    out[i] = static_cast<uint16_t>((v.u + 0x7fff + ((v.u >> 16) & 1)) >> 16);
  }
}

// ---- Peaks.

#if defined(__x86_64__)
#define SHOAL_OPAQUE(x) __asm__ volatile("" : "+x"(x))
#else
#define SHOAL_OPAQUE(x) __asm__ volatile("" : "+w"(x))
#endif

int64_t Int8Peak(int64_t loops) {
  constexpr int kChains = 8;
  alignas(64) int8_t a[32];
  for (int i = 0; i < 32; ++i) a[i] = static_cast<int8_t>(i);
  I line[8], sum[kChains];
  for (int g = 0; g < 8; ++g) line[g] = Isa::Set8(g);
  for (int c = 0; c < kChains; ++c) sum[c] = Isa::ZeroI();
  for (int64_t i = 0; i < loops; ++i) {
#pragma GCC unroll 8
    for (int c = 0; c < kChains; ++c) {
      sum[c] = Isa::template Dot<Kind::kU4, 8>(line, a, sum[c]);
      // The compiler must not know that the operands stay the same.
#pragma GCC unroll 8
      for (int g = 0; g < 8; ++g) SHOAL_OPAQUE(line[g]);
    }
  }
  for (int c = 1; c < kChains; ++c) sum[0] = Isa::Add32(sum[0], sum[c]);
  alignas(64) uint8_t sink[64];
  Isa::Store(sink, sum[0]);
  __asm__ volatile("" : : "m"(sink));
  return loops * kChains * 8 * 4 * kLanes * 2;
}

int64_t F32Peak(int64_t loops) {
  constexpr int kChains = 12;
  F sum[kChains];
  F x = Isa::Broadcast(0.5f);
  for (int c = 0; c < kChains; ++c) sum[c] = Isa::Zero();
  for (int64_t i = 0; i < loops; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) sum[c] = Isa::Fma(x, x, sum[c]);
  }
  for (int c = 1; c < kChains; ++c) sum[0] = Isa::Fma(x, sum[0], sum[c]);
  alignas(64) float sink[16];
  Isa::StoreF(sink, sum[0]);
  __asm__ volatile("" : : "m"(sink));
  return loops * kChains * kLanes * 2;
}

constexpr LinearKernels MakeTable() {
  LinearKernels k = {};
  k.int8[static_cast<int>(DType::kQ4_0)] = Product<FmtQ4_0>;
  k.int8[static_cast<int>(DType::kQ4_1)] = Product<FmtQ4_1>;
  k.int8[static_cast<int>(DType::kQ5_0)] = Product<FmtQ5_0>;
  k.int8[static_cast<int>(DType::kQ5_1)] = Product<FmtQ5_1>;
  k.int8[static_cast<int>(DType::kQ8_0)] = Product<FmtQ8_0>;
  k.int8[static_cast<int>(DType::kQ2_K)] = Product<FmtQ2_K>;
  k.int8[static_cast<int>(DType::kQ3_K)] = Product<FmtQ3_K>;
  k.int8[static_cast<int>(DType::kQ4_K)] = Product<FmtQ4_K>;
  k.int8[static_cast<int>(DType::kQ5_K)] = Product<FmtQ5_K>;
  k.int8[static_cast<int>(DType::kQ6_K)] = Product<FmtQ6_K>;
  k.int8[static_cast<int>(DType::kIQ4_NL)] = Product<FmtIQ4_NL>;
  k.int8[static_cast<int>(DType::kIQ4_XS)] = Product<FmtIQ4_XS>;
  k.int8[static_cast<int>(DType::kMXFP4)] = Product<FmtMXFP4>;
  k.int8_rows = Isa::kByLines ? kMaxTileRows : kFewRows;
  k.f32[static_cast<int>(DType::kF32)] = FloatProduct<DType::kF32>;
  k.f32[static_cast<int>(DType::kF16)] = FloatProduct<DType::kF16>;
  k.f32[static_cast<int>(DType::kBF16)] = FloatProduct<DType::kBF16>;
  k.bf16 = nullptr;
  k.quantize = Quantize;
  k.to_bf16 = ToBf16;
  k.sum_squares = SumSquares;
  k.scale = Scale;
  k.gated[static_cast<int>(Activation::kSwiGlu)] = Gated<Activation::kSwiGlu>;
  k.gated[static_cast<int>(Activation::kClampedSwiGlu)] = Gated<Activation::kClampedSwiGlu>;
  k.gated[static_cast<int>(Activation::kGeGlu)] = Gated<Activation::kGeGlu>;
  k.int8_peak = Int8Peak;
  k.f32_peak = F32Peak;
  return k;
}
