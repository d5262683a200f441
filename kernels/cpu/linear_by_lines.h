// The product with int8 activations for few vector registers (Isa::kByLines): lines are unpacked
// where they are multiplied, and many rows share what was unpacked once. Included by linear_simd.h.

// A sub-block as it is packed.
template <class Fmt>
struct PackedSub {
  const typename Fmt::Head& head;
  const uint8_t* p;
  int s;
  inline __attribute__((always_inline)) I Line(int g, int part) const {
    return Fmt::Line(p, g, part);
  }
  inline __attribute__((always_inline)) void Scales(int part, Sub* sub) const {
    Fmt::Scales(head, p, s, part, sub);
  }
};

// A sub-block unpacked in memory.
template <class Fmt>
struct UnpackedSub {
  alignas(64) uint8_t line[8][64];
  float scale[Fmt::kScales][kPanelRows];
  float bias[Fmt::kBias ? Fmt::kScales : 1][kPanelRows];

  template <class From>
  inline __attribute__((always_inline)) void Set(const From& from) {
    for (int part = 0; part < kParts; ++part) {
#pragma GCC unroll 8
      for (int g = 0; g < 8; ++g) Isa::Store(line[g] + kPartBytes * part, from.Line(g, part));
      Sub sub;
      from.Scales(part, &sub);
      for (int i = 0; i < Fmt::kScales; ++i) {
        Isa::StoreF(scale[i] + kLanes * part, sub.scale[i]);
        if constexpr (Fmt::kBias) Isa::StoreF(bias[i] + kLanes * part, sub.bias[i]);
      }
    }
  }
  inline __attribute__((always_inline)) I Line(int g, int part) const {
    return Isa::Load(line[g] + kPartBytes * part);
  }
  inline __attribute__((always_inline)) void Scales(int part, Sub* sub) const {
    for (int i = 0; i < Fmt::kScales; ++i) {
      sub->scale[i] = Isa::LoadF(scale[i] + kLanes * part);
      if constexpr (Fmt::kBias) sub->bias[i] = Isa::LoadF(bias[i] + kLanes * part);
    }
  }
};

// Column block i of M rows times a sub-block, as AddSubBlock: the same integers, so the same bits.
template <class P, class Fmt, int M, class From>
inline __attribute__((always_inline)) void AddSubByLines(const From& from,
                                                         const Q8Block* const* rows, int64_t i,
                                                         F acc[M][kParts]) {
  constexpr int kStep = P::LinesOfStep(Fmt::kKind);
  constexpr int kHalf = 8 / Fmt::kScales;  // lines of a sum
  constexpr bool kAllFit = P::SumsThatFit(Fmt::kKind) == 8;
  I sum[M][kParts][Fmt::kScales];
#pragma GCC unroll 8
  for (int step = 0; step < 8; step += kStep) {
    int g[kStep];
    I line[kStep][kParts];
#pragma GCC unroll 4
    for (int l = 0; l < kStep; ++l) {
      // Two lines of one vector of nibbles together, if one sum has both.
      g[l] = Fmt::kScales == 1 && kStep > 1 ? step / 2 + l / 2 + 4 * (l % 2) : step + l;
#pragma GCC unroll 2
      for (int part = 0; part < kParts; ++part) line[l][part] = from.Line(g[l], part);
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      I x[kParts];
#pragma GCC unroll 4
      for (int l = 0; l < kStep; ++l) {
        const I a = P::Four(rows[m][i].q + 4 * g[l]);
#pragma GCC unroll 2
        for (int part = 0; part < kParts; ++part) {
          const I y = P::template Products<Fmt::kKind>(line[l][part], a);
          x[part] = l == 0 ? y : P::Add16(x[part], y);
        }
      }
#pragma GCC unroll 2
      for (int part = 0; part < kParts; ++part) {
        I& to = sum[m][part][step / kHalf];
        const bool begins = step % kHalf == 0;
        if constexpr (kAllFit) {
          to = begins ? x[part] : P::Add16(to, x[part]);
        } else {
          const I wide = P::Widen(x[part]);
          to = begins ? wide : Isa::Add32(to, wide);
        }
        if constexpr (M > 1) P::Settle(&to);
      }
    }
  }
#pragma GCC unroll 2
  for (int part = 0; part < kParts; ++part) {
    Sub sub;
    from.Scales(part, &sub);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const Q8Block& a = rows[m][i];
      I total[2];
      for (int j = 0; j < Fmt::kScales; ++j) {
        total[j] = kAllFit ? P::Widen(sum[m][part][j]) : sum[m][part][j];
        if constexpr (Fmt::kShift > 0) {
          const int32_t neg_sum = Fmt::kScales == 1 ? a.neg_sum : a.neg_half_sum[j];
          total[j] = Isa::Add32(total[j], Start<Fmt::kShift>(neg_sum));
        }
      }
      acc[m][part] = AddSums<Fmt>(sub, a, total, acc[m][part]);
    }
  }
}

// A block of columns is unpacked once for all rows. The sums of a row go on in the tile, in the
// order of columns, so it has the same bits as alone.
template <class Fmt, int M>
void UnpackedRows(const UnpackedSub<Fmt>* unpacked, int64_t begin, int64_t count,
                  const Q8Block* const* rows, float* tile) {
  F acc[M][kParts];
  for (int m = 0; m < M; ++m) {
    for (int part = 0; part < kParts; ++part) {
      acc[m][part] = begin == 0 ? Isa::Zero() : Isa::LoadF(tile + 16 * m + kLanes * part);
    }
  }
  for (int64_t i = 0; i < count; ++i) AddSubByLines<Isa, Fmt, M>(unpacked[i], rows, begin + i, acc);
  for (int m = 0; m < M; ++m) {
    for (int part = 0; part < kParts; ++part)
      Isa::StoreF(tile + 16 * m + kLanes * part, acc[m][part]);
  }
}

template <class Fmt>
void ProductUnpacked(const PackedShape& shape, const uint8_t* panel, const Q8Block* const* rows,
                     int m, float* tile) {
  constexpr int kBlock = 16;  // sub-blocks: 8 to 12 KiB, which L1 holds beside the rows
  UnpackedSub<Fmt> unpacked[kBlock];
  const uint8_t* p = panel;
  const int64_t subs = shape.cols / 32;
  int s = Fmt::kSubs > 1 ? shape.lead : 0;
  typename Fmt::Head head;
  Fmt::Header(p, &head);
  p += Fmt::kHeaderBytes;
  for (int64_t begin = 0; begin < subs; begin += kBlock) {
    const int64_t count = subs - begin < kBlock ? subs - begin : kBlock;
    for (int64_t i = 0; i < count; ++i) {
      unpacked[i].Set(PackedSub<Fmt>{head, p, s});
      p += Fmt::kSubBytes;
      if (++s < Fmt::kSubs) continue;
      s = 0;
      if (begin + i + 1 == subs) break;
      Fmt::Header(p, &head);
      p += Fmt::kHeaderBytes;
    }
    int r = 0;
    for (; r + 4 <= m; r += 4) {
      UnpackedRows<Fmt, 4>(unpacked, begin, count, rows + r, tile + 16 * r);
    }
    if (r + 2 <= m) {
      UnpackedRows<Fmt, 2>(unpacked, begin, count, rows + r, tile + 16 * r);
      r += 2;
    }
    if (r < m) UnpackedRows<Fmt, 1>(unpacked, begin, count, rows + r, tile + 16 * r);
  }
}
