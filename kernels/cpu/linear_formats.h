// The packed formats, unpacked in vector registers: written once for every vector instruction set.
//
// An ISA file defines `Isa` in an anonymous namespace and includes this file inside the same
// namespace. Nothing here has external linkage or calls library code, so no function compiled for
// one instruction set can be linked into another's path. `Isa` gives:
//
// - kLanes: 32-bit lanes of a vector (16, 8 or 4); kTileRows: most rows of one pass over a panel;
//   kFloatRows: the same of f32 activations; kSignedShift: signed weights are stored +
//   2^kSignedShift (0: dot products take them as they are).
// - I, F: integer and float vectors, with the plain operations named as what they do. Shr16<n> and
//   Shl16<n> shift 16-bit elements, Shr32 and Shl32 32-bit ones; WidenU8, WidenI8, WidenU16 and
//   LoadHalf make kLanes 32-bit values of narrower ones; StoreInt8 rounds and narrows.
// - Pair: two neighbouring floats, repeated. MxScale: kLanes exponents as 2^(e - 128).
// - AddHi<v>: adds v to the bytes whose bit is set.
// - Signed: signed weights to the dot product's form. Table, Lookup: 16 levels by code.
// - Dot<kind, n>: start + sums of n lines (4 or 8) with 4 n activations.
// - kByLines: few registers (linear_by_lines.h). Then also Products, SumsThatFit, LinesOfStep,
//   Add16, Widen: pairs of 16-bit sums become 32-bit ones, Settle: what came so far is computed
//   first.
// - kPairs: an instruction multiplies with two rows of activations. Then also PairLines: a
//   sub-block's lines in the order it wants, in place; PairRows: 32 columns of two rows in that
//   order; DotPair<n>: as Dot, for both rows.

using Kind = CodeKind;
using I = Isa::I;
using F = Isa::F;
constexpr int kLanes = Isa::kLanes;
constexpr int kParts = kPanelRows / kLanes;  // vectors of one panel's line
constexpr int kPartBytes = 4 * kLanes;

// 32 columns of kLanes rows, ready for dot products: group g of 4 columns is line[g].
struct Sub {
  I line[8];
  F scale[2];
  F bias[2];
};

template <class Fmt>
inline __attribute__((always_inline)) void LoadSub(const typename Fmt::Head& head, const uint8_t* p,
                                                   int s, int part, Sub* sub) {
#pragma GCC unroll 8
  for (int g = 0; g < 8; ++g) sub->line[g] = Fmt::Line(p, g, part);
  Fmt::Scales(head, p, s, part, sub);
}

// Line g of a plane of 4 bits: two lines lie in one vector.
inline __attribute__((always_inline)) I Nibbles(const uint8_t* p, int g) {
  const I x = Isa::Load(p + 64 * (g % 4));
  return Isa::And(g < 4 ? x : Isa::template Shr16<4>(x), Isa::Set8(15));
}

// Line g of a plane of 2 bits, moved to bits kAt, kAt + 1.
template <int kAt>
inline __attribute__((always_inline)) I TwoBits(const uint8_t* p, int g) {
  I x = Isa::Load(p + 64 * (g / 4));
  const int shift = kAt - 2 * (g % 4);
  if (shift == 4) x = Isa::template Shl16<4>(x);
  if (shift == 2) x = Isa::template Shl16<2>(x);
  if (shift == -2) x = Isa::template Shr16<2>(x);
  if (shift == -4) x = Isa::template Shr16<4>(x);
  if (shift == -6) x = Isa::template Shr16<6>(x);
  return Isa::And(x, Isa::Set8(static_cast<int8_t>(3 << kAt)));
}

// kParts vectors of f16 numbers, one for each row of the panel.
inline __attribute__((always_inline)) void LoadHalves(const uint8_t* p, F x[kParts]) {
  for (int part = 0; part < kParts; ++part) x[part] = Isa::LoadHalf(p + 2 * kLanes * part);
}
inline __attribute__((always_inline)) void LoadNegatedHalves(const uint8_t* p, F x[kParts]) {
  LoadHalves(p, x);
  for (int part = 0; part < kParts; ++part) x[part] = Isa::Mul(x[part], Isa::Broadcast(-1.0f));
}

// ---- Formats. p: a packed header or the planes of a sub-block; part: which lanes. Header() does
// what all sub-blocks of a block and all parts have in common. Line() gives the codes of columns
// 4 g .. 4 g + 3, Scales() what their sums are multiplied by. g and part are constants when
// inlined.

// Codes of 4 bits, or of 5 whose last stand in a plane of their own behind.
template <bool kFifth>
inline __attribute__((always_inline)) I NibblesAndFifth(const uint8_t* p, int g, int part) {
  const I x = Nibbles(p + kPartBytes * part, g);
  if constexpr (kFifth) return Isa::template AddHi<16>(x, p + 256 + 8 * g, part);
  return x;
}

// Blocks of 32 with an f16 scale and perhaps an f16 minimum.
template <Kind kKindOf, int kOffsetShift, bool kMin, bool kFifth>
struct Simple {
  static constexpr Kind kKind = kKindOf;
  static constexpr int kSubs = 1, kScales = 1, kShift = kOffsetShift;
  static constexpr bool kBias = kMin;
  static constexpr int kHeaderBytes = kMin ? 64 : 32;
  static constexpr int kSubBytes = kKind == Kind::kS8 ? 512 : 256 + (kFifth ? 64 : 0);
  struct Head {
    F d[kParts], m[kParts];
  };
  static inline __attribute__((always_inline)) void Header(const uint8_t* p, Head* h) {
    LoadHalves(p, h->d);
    if constexpr (kMin) LoadHalves(p + 32, h->m);
  }
  static inline __attribute__((always_inline)) I Line(const uint8_t* p, int g, int part) {
    if constexpr (kKind == Kind::kS8) {
      return Isa::Signed(Isa::Load(p + 64 * g + kPartBytes * part));
    }
    return NibblesAndFifth<kFifth>(p, g, part);
  }
  static inline __attribute__((always_inline)) void Scales(const Head& h, const uint8_t*, int,
                                                           int part, Sub* sub) {
    sub->scale[0] = h.d[part];
    if constexpr (kMin) sub->bias[0] = h.m[part];
  }
};
using FmtQ4_0 = Simple<Kind::kU4, 3, false, false>;
using FmtQ4_1 = Simple<Kind::kU4, 0, true, false>;
using FmtQ5_0 = Simple<Kind::kU5, 4, false, true>;
using FmtQ5_1 = Simple<Kind::kU5, 0, true, true>;
using FmtQ8_0 = Simple<Kind::kS8, Isa::kSignedShift, false, false>;

inline __attribute__((always_inline)) I Iq4Line(const uint8_t* p, int g, int part) {
  const I table = Isa::Signed(Isa::Table(kLevelsIq4));
  return Isa::Lookup(table, Nibbles(p + kPartBytes * part, g));
}

struct FmtIQ4_NL {
  static constexpr Kind kKind = Kind::kS8;
  static constexpr int kSubs = 1, kScales = 1, kShift = Isa::kSignedShift;
  static constexpr bool kBias = false;
  static constexpr int kHeaderBytes = 32, kSubBytes = 256;
  struct Head {
    F d[kParts];
  };
  static inline __attribute__((always_inline)) void Header(const uint8_t* p, Head* h) {
    LoadHalves(p, h->d);
  }
  static inline __attribute__((always_inline)) I Line(const uint8_t* p, int g, int part) {
    return Iq4Line(p, g, part);
  }
  static inline __attribute__((always_inline)) void Scales(const Head& h, const uint8_t*, int,
                                                           int part, Sub* sub) {
    sub->scale[0] = h.d[part];
  }
};

// Levels up to +-12, which with an offset are codes of 5 bits.
struct FmtMXFP4 {
  static constexpr Kind kKind = Kind::kU5;
  static constexpr int kSubs = 1, kScales = 1, kShift = 4;
  static constexpr bool kBias = false;
  static constexpr int kHeaderBytes = 16, kSubBytes = 256;
  struct Head {
    F d[kParts];
  };
  static inline __attribute__((always_inline)) void Header(const uint8_t* p, Head* h) {
    for (int part = 0; part < kParts; ++part) h->d[part] = Isa::MxScale(p + kLanes * part);
  }
  static inline __attribute__((always_inline)) I Line(const uint8_t* p, int g, int part) {
    const I table = Isa::Sub8(Isa::Table(kLevelsMxfp4), Isa::Set8(-(1 << kShift)));
    return Isa::Lookup(table, Nibbles(p + kPartBytes * part, g));
  }
  static inline __attribute__((always_inline)) void Scales(const Head& h, const uint8_t*, int,
                                                           int part, Sub* sub) {
    sub->scale[0] = h.d[part];
  }
};

struct FmtIQ4_XS {
  static constexpr Kind kKind = Kind::kS8;
  static constexpr int kSubs = 8, kScales = 1, kShift = Isa::kSignedShift;
  static constexpr bool kBias = false;
  static constexpr int kHeaderBytes = 128, kSubBytes = 256;
  struct Head {
    F d[kParts];
    I high[kParts];      // scales_h of each lane
    const uint8_t* low;  // scales_l
  };
  static inline __attribute__((always_inline)) void Header(const uint8_t* p, Head* h) {
    LoadHalves(p, h->d);
    for (int part = 0; part < kParts; ++part) {
      h->high[part] = Isa::WidenU16(p + 32 + 2 * kLanes * part);
    }
    h->low = p + 64;
  }
  static inline __attribute__((always_inline)) I Line(const uint8_t* p, int g, int part) {
    return Iq4Line(p, g, part);
  }
  static inline __attribute__((always_inline)) void Scales(const Head& h, const uint8_t*, int s,
                                                           int part, Sub* sub) {
    const I both = Isa::WidenU8(h.low + 16 * (s / 2) + kLanes * part);
    const I low = Isa::And(Isa::Shr32(both, 4 * (s % 2)), Isa::Set32(15));
    const I high = Isa::And(Isa::Shl32(Isa::Shr32(h.high[part], 2 * s), 4), Isa::Set32(0x30));
    sub->scale[0] =
        Isa::Mul(h.d[part], Isa::ToFloat(Isa::Add32(Isa::Or(low, high), Isa::Set32(-32))));
  }
};

// Q4_K and Q5_K: 6-bit scales and minimums of 8 sub-blocks in 12 bytes a row; 4 bytes of 16 rows
// are a line.
template <bool kFifth>
struct ScaleMinK {
  static constexpr Kind kKind = kFifth ? Kind::kU5 : Kind::kU4;
  static constexpr int kSubs = 8, kScales = 1, kShift = 0;
  static constexpr bool kBias = true;
  static constexpr int kHeaderBytes = 256, kSubBytes = 256 + (kFifth ? 64 : 0);
  struct Head {
    F d[kParts], neg_dmin[kParts];
    alignas(64) uint8_t scale[8 * kPanelRows], min[8 * kPanelRows];  // [sub-block][lane]
  };
  static inline __attribute__((always_inline)) void Header(const uint8_t* p, Head* h) {
    LoadHalves(p, h->d);
    LoadNegatedHalves(p + 32, h->neg_dmin);
    const I six = Isa::Set8(63), four = Isa::Set8(15), high = Isa::Set8(0x30);
    for (int i = 0; i < 64; i += kPartBytes) {
      const I a = Isa::Load(p + 64 + i), b = Isa::Load(p + 128 + i), c = Isa::Load(p + 192 + i);
      Isa::Store(h->scale + i, Isa::And(a, six));
      Isa::Store(h->min + i, Isa::And(b, six));
      Isa::Store(h->scale + 64 + i,
                 Isa::Or(Isa::And(c, four), Isa::And(Isa::template Shr16<2>(a), high)));
      Isa::Store(h->min + 64 + i, Isa::Or(Isa::And(Isa::template Shr16<4>(c), four),
                                          Isa::And(Isa::template Shr16<2>(b), high)));
    }
  }
  static inline __attribute__((always_inline)) I Line(const uint8_t* p, int g, int part) {
    return NibblesAndFifth<kFifth>(p, g, part);
  }
  static inline __attribute__((always_inline)) void Scales(const Head& h, const uint8_t*, int s,
                                                           int part, Sub* sub) {
    const int at = 16 * s + kLanes * part;
    sub->scale[0] = Isa::Mul(h.d[part], Isa::ToFloat(Isa::WidenU8(h.scale + at)));
    sub->bias[0] = Isa::Mul(h.neg_dmin[part], Isa::ToFloat(Isa::WidenU8(h.min + at)));
  }
};
using FmtQ4_K = ScaleMinK<false>;
using FmtQ5_K = ScaleMinK<true>;

struct FmtQ6_K {
  static constexpr Kind kKind = Kind::kU6;
  static constexpr int kSubs = 8, kScales = 2, kShift = 5;
  static constexpr bool kBias = false;
  static constexpr int kHeaderBytes = 288, kSubBytes = 384;
  struct Head {
    F d[kParts];
    const uint8_t* scales;
  };
  static inline __attribute__((always_inline)) void Header(const uint8_t* p, Head* h) {
    LoadHalves(p, h->d);
    h->scales = p + 32;
  }
  static inline __attribute__((always_inline)) I Line(const uint8_t* p, int g, int part) {
    p += kPartBytes * part;
    return Isa::Or(Nibbles(p, g), TwoBits<4>(p + 256, g));
  }
  static inline __attribute__((always_inline)) void Scales(const Head& h, const uint8_t*, int s,
                                                           int part, Sub* sub) {
    for (int i = 0; i < 2; ++i) {
      sub->scale[i] = Isa::Mul(
          h.d[part], Isa::ToFloat(Isa::WidenI8(h.scales + 16 * (2 * s + i) + kLanes * part)));
    }
  }
};

struct FmtQ2_K {
  static constexpr Kind kKind = Kind::kU2;
  static constexpr int kSubs = 8, kScales = 2, kShift = 0;
  static constexpr bool kBias = true;
  static constexpr int kHeaderBytes = 320, kSubBytes = 128;
  struct Head {
    F d[kParts], neg_dmin[kParts];
    const uint8_t* scales;
  };
  static inline __attribute__((always_inline)) void Header(const uint8_t* p, Head* h) {
    LoadHalves(p, h->d);
    LoadNegatedHalves(p + 32, h->neg_dmin);
    h->scales = p + 64;
  }
  static inline __attribute__((always_inline)) I Line(const uint8_t* p, int g, int part) {
    return TwoBits<0>(p + kPartBytes * part, g);
  }
  static inline __attribute__((always_inline)) void Scales(const Head& h, const uint8_t*, int s,
                                                           int part, Sub* sub) {
    for (int i = 0; i < 2; ++i) {
      const I b = Isa::WidenU8(h.scales + 16 * (2 * s + i) + kLanes * part);
      sub->scale[i] = Isa::Mul(h.d[part], Isa::ToFloat(Isa::And(b, Isa::Set32(15))));
      sub->bias[i] = Isa::Mul(h.neg_dmin[part], Isa::ToFloat(Isa::Shr32(b, 4)));
    }
  }
};

struct FmtQ3_K {
  static constexpr Kind kKind = Kind::kU3;
  static constexpr int kSubs = 8, kScales = 2, kShift = 2;
  static constexpr bool kBias = false;
  static constexpr int kHeaderBytes = 224, kSubBytes = 192;
  struct Head {
    F d[kParts];
    alignas(64) uint8_t scale[16 * kPanelRows];  // [16-element run][lane], signed
  };
  static inline __attribute__((always_inline)) void Header(const uint8_t* p, Head* h) {
    LoadHalves(p, h->d);
    const I four = Isa::Set8(15), high = Isa::Set8(0x30), offset = Isa::Set8(32);
    for (int i = 0; i < 64; i += kPartBytes) {
      const I a = Isa::Load(p + 32 + i), b = Isa::Load(p + 96 + i), c = Isa::Load(p + 160 + i);
      const I h0 = Isa::And(Isa::template Shl16<4>(c), high);
      const I h1 = Isa::And(Isa::template Shl16<2>(c), high);
      const I h2 = Isa::And(c, high);
      const I h3 = Isa::And(Isa::template Shr16<2>(c), high);
      const I a1 = Isa::And(Isa::template Shr16<4>(a), four);
      const I b1 = Isa::And(Isa::template Shr16<4>(b), four);
      Isa::Store(h->scale + i, Isa::Sub8(Isa::Or(Isa::And(a, four), h0), offset));
      Isa::Store(h->scale + 64 + i, Isa::Sub8(Isa::Or(Isa::And(b, four), h1), offset));
      Isa::Store(h->scale + 128 + i, Isa::Sub8(Isa::Or(a1, h2), offset));
      Isa::Store(h->scale + 192 + i, Isa::Sub8(Isa::Or(b1, h3), offset));
    }
  }
  static inline __attribute__((always_inline)) I Line(const uint8_t* p, int g, int part) {
    const I x = TwoBits<0>(p + kPartBytes * part, g);
    return Isa::template AddHi<4>(x, p + 128 + 8 * g, part);
  }
  static inline __attribute__((always_inline)) void Scales(const Head& h, const uint8_t*, int s,
                                                           int part, Sub* sub) {
    for (int i = 0; i < 2; ++i) {
      const uint8_t* at = h.scale + 16 * (2 * s + i) + kLanes * part;
      sub->scale[i] = Isa::Mul(h.d[part], Isa::ToFloat(Isa::WidenI8(at)));
    }
  }
};
