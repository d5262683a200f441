// The packed formats (kernels/README.md, "Packed layout") in the registers of a warp, as the A
// operand of an mma: a panel's 16 rows are the 16 rows of the tile and 32 columns its depth.
//
// Lane 4 g + t holds rows 2 g and 2 g + 1 of the panel, columns 4 t .. 4 t + 3 and 16 + 4 t .. 16 +
// 4 t + 3 of the 32: in every plane those are neighbouring bytes, so a warp reads whole lines with
// loads of 8 bytes, and nothing has to pass through shared memory. A tile's row g is row 2 g of the
// panel, its row g + 8 row 2 g + 1.
#pragma once

#include "kernels/cuda/launch.cuh"
#include "kernels/dtype.h"
#include "kernels/row_planes_inline.h"

namespace shoal::cuda {

// The lane's place in the tile.
struct TileLane {
  int lane, g, t;
};
__device__ __forceinline__ TileLane ThisTileLane() {
  const int lane = threadIdx.x % 32;
  return {lane, lane / 4, lane % 4};
}

__device__ __forceinline__ float LowHalf(uint32_t v) {
  return __half2float(__ushort_as_half(static_cast<uint16_t>(v)));
}
__device__ __forceinline__ float HighHalf(uint32_t v) {
  return __half2float(__ushort_as_half(static_cast<uint16_t>(v >> 16)));
}

// Bit b of n goes to bit 8 b: the product puts it to b + 7 j for j = 0 .. 3, all of them apart.
__device__ __forceinline__ uint32_t SpreadBits(uint32_t n) {
  return (n * 0x00204081u) & 0x01010101u;
}

// Levels by code for eight nibbles: low[b] by the low nibble of byte b, high[b] by its high one.
__device__ __forceinline__ void LookupNibbles(const uint32_t table[4], uint32_t codes,
                                              uint32_t* low, uint32_t* high) {
  const uint32_t index = codes & 0x77777777u;
  const uint32_t half = 0x32103210u | (codes & 0x88888888u) >> 1;  // which half of the table
  uint32_t out[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t a = __byte_perm(table[0], table[1], index >> (16 * i));
    const uint32_t b = __byte_perm(table[2], table[3], index >> (16 * i));
    out[i] = __byte_perm(a, b, half >> (16 * i));
  }
  *low = __byte_perm(out[0], out[1], 0x6420);
  *high = __byte_perm(out[0], out[1], 0x7531);
}

// Scale and minimum of the lane's two rows, for both halves of the 32 columns where the type has
// two: value = scale * level + bias.
struct TileScales {
  float scale[2][2];  // [row][half]
  float bias[2][2];
};

template <DType kType>
struct Packed {
  static constexpr PlaneInfo kInfo = row_planes::kPlanes[row_planes::Index(kType)];
  static constexpr bool kSuper = kInfo.super;
  static constexpr bool kHalves =
      kType == DType::kQ2_K || kType == DType::kQ3_K || kType == DType::kQ6_K;
  static constexpr bool kBias = kInfo.m && kType != DType::kIQ4_XS;
  static constexpr bool kTable =
      kType == DType::kIQ4_NL || kType == DType::kIQ4_XS || kType == DType::kMXFP4;
  // Codes whose level is code - 2^(bits - 1) stand in the top bits of a byte with the highest one
  // inverted, which is that level as a signed byte times this.
  static constexpr int kLevelFactor = kType == DType::kQ4_0   ? 16
                                      : kType == DType::kQ5_0 ? 8
                                      : kType == DType::kQ3_K ? 32
                                      : kType == DType::kQ6_K ? 4
                                                              : 1;
  static constexpr bool kSigned = kLevelFactor > 1 || kTable || kInfo.i8;
  static constexpr int kHeaderBytes =
      16 * (2 * kInfo.d + 2 * kInfo.m + kInfo.e + kInfo.scale_bytes);
  static constexpr int kSubBytes =
      16 * (16 * kInfo.nib + 8 * kInfo.two + 4 * kInfo.hi + 32 * kInfo.i8);
  static constexpr int kScalesAt = 32 * kInfo.d + 32 * kInfo.m;

  // Of a super-block. Lane t keeps the scales of sub-blocks t and t + 4 (IQ4_XS: 2 t and 2 t + 1)
  // and hands them to the lanes of its g.
  struct Head {
    uint32_t d, m;           // two f16, of the lane's rows
    uint32_t first, second;  // bytes: Q4_K, Q5_K scale scale min min, else by half: row row row row
  };
  struct Raw {
    uint2 nib, two[2], i8[2];
    uint8_t hi[2];
    uint32_t d, m;  // types without super-blocks; MXFP4: d holds two exponent bytes
  };

  // Byte offset in a panel of the super-block (or run of eight blocks) `unit`.
  static __device__ __forceinline__ int64_t UnitAt(int unit, int lead) {
    const int64_t subs = unit == 0 ? 0 : 8 * int64_t{unit} - lead;
    return kSuper ? int64_t{unit} * kHeaderBytes + subs * kSubBytes
                  : subs * (kHeaderBytes + kSubBytes);
  }
  // Of the sub-block `index` (counted from the unit's first one held) behind UnitAt.
  static __device__ __forceinline__ int SubAt(int index) {
    return kSuper ? kHeaderBytes + index * kSubBytes : index * (kHeaderBytes + kSubBytes);
  }

  static __device__ __forceinline__ Head LoadHead(const uint8_t* p, const TileLane& at);
  // Of the sub-block at p: its planes, and with them the scales of a type without super-blocks.
  static __device__ __forceinline__ Raw LoadRaw(const uint8_t* p, const TileLane& at) {
    Raw raw = {};
    LoadPlanes(p, at, &raw);
    LoadScales(p, at, &raw);
    return raw;
  }
  static __device__ __forceinline__ void LoadPlanes(const uint8_t* p, const TileLane& at, Raw* raw);
  static __device__ __forceinline__ void LoadScales(const uint8_t* p, const TileLane& at, Raw* raw);
  // level[2 h + r]: four columns of half h of row 2 g + r, as signed bytes times kLevelFactor.
  static __device__ __forceinline__ void Levels(const Raw& raw, const TileLane& at,
                                                uint32_t level[4]);
  // Of sub-block s (0..7); the scales are for the levels times kLevelFactor. All lanes must call.
  static __device__ __forceinline__ TileScales Scales(const Head& head, const Raw& raw, int s,
                                                      const TileLane& at);
};

template <DType kType>
__device__ __forceinline__ typename Packed<kType>::Head Packed<kType>::LoadHead(
    const uint8_t* p, const TileLane& at) {
  Head h = {};
  if constexpr (kSuper) {
    h.d = LoadStream<uint32_t>(p + 4 * at.g);
    if constexpr (kInfo.m) h.m = LoadStream<uint32_t>(p + 32 + 4 * at.g);
    const uint8_t* scales = p + kScalesAt + 2 * at.g;  // bytes of the lane's two rows side by side
    const auto pair = [&](int i) -> uint32_t { return LoadStream<uint16_t>(scales + 16 * i); };
    if constexpr (kType == DType::kQ4_K || kType == DType::kQ5_K) {
      const uint32_t a = pair(at.t), b = pair(at.t + 4), c = pair(at.t + 8);
      h.first = (a & 0x3F3Fu) | (b & 0x3F3Fu) << 16;
      h.second = ((c & 0x0F0Fu) | (a >> 2 & 0x3030u)) | ((c >> 4 & 0x0F0Fu) | (b >> 2 & 0x3030u))
                                                            << 16;
    } else if constexpr (kType == DType::kQ3_K) {
      const uint32_t low = pair(2 * at.t) | pair(2 * at.t + 1) << 16;
      const uint32_t high =
          (pair(8 + at.t % 2 * 2) | pair(9 + at.t % 2 * 2) << 16) >> (at.t / 2 * 2);
      h.first = (low & 0x0F0F0F0Fu) | (high & 0x03030303u) << 4;
      h.second = (low >> 4 & 0x0F0F0F0Fu) | (high >> 4 & 0x03030303u) << 4;
    } else if constexpr (kType == DType::kIQ4_XS) {
      h.first = pair(at.t);
    } else {
      h.first = pair(2 * at.t) | pair(2 * at.t + 1) << 16;
      h.second = pair(2 * at.t + 8) | pair(2 * at.t + 9) << 16;
    }
  }
  return h;
}

template <DType kType>
__device__ __forceinline__ void Packed<kType>::LoadScales(const uint8_t* p, const TileLane& at,
                                                          Raw* raw) {
  if constexpr (kSuper) return;
  if constexpr (kInfo.e) {
    raw->d = LoadStream<uint16_t>(p + 2 * at.g);
  } else {
    raw->d = LoadStream<uint32_t>(p + 4 * at.g);
    if constexpr (kInfo.m) raw->m = LoadStream<uint32_t>(p + 32 + 4 * at.g);
  }
}

template <DType kType>
__device__ __forceinline__ void Packed<kType>::LoadPlanes(const uint8_t* p, const TileLane& at,
                                                          Raw* raw) {
  if constexpr (!kSuper) p += kHeaderBytes;
  if constexpr (kInfo.nib) {
    raw->nib = LoadStream<uint2>(p + 64 * at.t + 8 * at.g);
    p += 256;
  }
  if constexpr (kInfo.two) {
#pragma unroll
    for (int h = 0; h < 2; ++h) raw->two[h] = LoadStream<uint2>(p + 64 * h + 8 * at.g);
    p += 128;
  }
  if constexpr (kInfo.hi) {
#pragma unroll
    for (int h = 0; h < 2; ++h) raw->hi[h] = LoadStream<uint8_t>(p + 8 * (at.t + 4 * h) + at.g);
  }
  if constexpr (kInfo.i8) {
#pragma unroll
    for (int h = 0; h < 2; ++h) raw->i8[h] = LoadStream<uint2>(p + 64 * (at.t + 4 * h) + 8 * at.g);
  }
}

template <DType kType>
__device__ __forceinline__ void Packed<kType>::Levels(const Raw& raw, const TileLane& at,
                                                      uint32_t level[4]) {
  constexpr uint32_t kTop = 0x80808080u;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const uint32_t nib = r == 0 ? raw.nib.x : raw.nib.y;
    if constexpr (kInfo.i8) {
      level[r] = r == 0 ? raw.i8[0].x : raw.i8[0].y;
      level[2 + r] = r == 0 ? raw.i8[1].x : raw.i8[1].y;
    } else if constexpr (kTable) {
      // kLevelsIq4 and kLevelsMxfp4 of row_planes.cc, four to a word.
      constexpr bool kMx = kType == DType::kMXFP4;
      const uint32_t table[4] = {kMx ? 0x03020100u : 0xBFAD9881u, kMx ? 0x0C080604u : 0xF6EADDCFu,
                                 kMx ? 0xFDFEFF00u : 0x26190D01u, kMx ? 0xF4F8FAFCu : 0x71594535u};
      LookupNibbles(table, nib, &level[r], &level[2 + r]);
    } else if constexpr (kType == DType::kQ4_0) {
      level[r] = (nib << 4 & 0xF0F0F0F0u) ^ kTop;
      level[2 + r] = (nib & 0xF0F0F0F0u) ^ kTop;
    } else {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t code = 0, top = 0;  // code: from bit 0 up; top: the 2-bit plane's or the high bit
        if constexpr (kInfo.nib) code = (h == 0 ? nib : nib >> 4) & 0x0F0F0F0Fu;
        if constexpr (kInfo.two) {
          top = (r == 0 ? raw.two[h].x : raw.two[h].y) >> (2 * at.t) & 0x03030303u;
        }
        uint32_t hi = 0;
        if constexpr (kInfo.hi) hi = SpreadBits(raw.hi[h] >> (4 * r) & 15u);
        uint32_t v;
        if constexpr (kType == DType::kQ5_0) {
          v = (code << 3 | hi << 7) ^ kTop;
        } else if constexpr (kType == DType::kQ6_K) {
          v = (code << 2 | top << 6) ^ kTop;
        } else if constexpr (kType == DType::kQ3_K) {
          v = (top << 5 | hi << 7) ^ kTop;
        } else {
          v = code | top | hi << 4;
        }
        level[2 * h + r] = v;
      }
    }
  }
}

// 2^(e - 128), MXFP4's scale of doubled levels.
__device__ __forceinline__ float ExponentScale(uint32_t e) {
  return __uint_as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23);
}

template <DType kType>
__device__ __forceinline__ TileScales Packed<kType>::Scales(const Head& head, const Raw& raw, int s,
                                                            const TileLane& at) {
  constexpr float kFactor = 1.0f / kLevelFactor;
  TileScales out = {};
  if constexpr (!kSuper) {
    if constexpr (kInfo.e) {
      out.scale[0][0] = ExponentScale(raw.d & 0xFF);
      out.scale[1][0] = ExponentScale(raw.d >> 8);
    } else {
      out.scale[0][0] = kFactor * LowHalf(raw.d);
      out.scale[1][0] = kFactor * HighHalf(raw.d);
      if constexpr (kBias) {
        out.bias[0][0] = LowHalf(raw.m);
        out.bias[1][0] = HighHalf(raw.m);
      }
    }
    return out;
  }
  const float d[2] = {kFactor * LowHalf(head.d), kFactor * HighHalf(head.d)};
  const int from = at.lane - at.t;
  uint32_t word;
  if constexpr (kType == DType::kIQ4_XS) {
    word = __shfl_sync(0xFFFFFFFFu, head.first, from + s / 2) >> (4 * (s % 2));
  } else {
    // s may differ from lane to lane.
    const uint32_t low = __shfl_sync(0xFFFFFFFFu, head.first, from + s % 4);
    const uint32_t high = __shfl_sync(0xFFFFFFFFu, head.second, from + s % 4);
    word = s < 4 ? low : high;
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const uint32_t byte0 = word >> (8 * r) & 0xFF, byte1 = word >> (16 + 8 * r) & 0xFF;
    if constexpr (kType == DType::kIQ4_XS) {
      const int code = (byte0 & 15) | (head.m >> (16 * r + 2 * s) & 3) << 4;
      out.scale[r][0] = d[r] * static_cast<float>(code - 32);
    } else if constexpr (kType == DType::kQ4_K || kType == DType::kQ5_K) {
      const float m = r == 0 ? LowHalf(head.m) : HighHalf(head.m);
      out.scale[r][0] = d[r] * static_cast<float>(byte0);
      out.bias[r][0] = -(m * static_cast<float>(byte1));
    } else {
      const uint32_t byte[2] = {byte0, byte1};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if constexpr (kType == DType::kQ2_K) {
          const float m = r == 0 ? LowHalf(head.m) : HighHalf(head.m);
          out.scale[r][h] = d[r] * static_cast<float>(byte[h] & 15);
          out.bias[r][h] = -(m * static_cast<float>(byte[h] >> 4));
        } else if constexpr (kType == DType::kQ3_K) {
          out.scale[r][h] = d[r] * static_cast<float>(static_cast<int>(byte[h]) - 32);
        } else {
          out.scale[r][h] = d[r] * static_cast<float>(static_cast<int8_t>(byte[h]));
        }
      }
    }
  }
  return out;
}

}  // namespace shoal::cuda
