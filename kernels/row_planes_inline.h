// The bit layout of each GGUF block format, inline, so that packing can be compiled for one type at
// a time: with a constant `type` every branch on it goes away.
//
// Internal to kernels/, and not for files that are compiled for one instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/row_planes.h"

namespace shoal::row_planes {

// Byte offsets of the fields in a GGUF block; -1: the type has none.
struct BlockFields {
  int d, m, scales, nib, hi, two;
};

// One row of the table for each quantized type, in the order of DType from kQ4_0.
inline constexpr PlaneInfo kPlanes[] = {
    // nib, two, hi, i8, d, m, e, scale_bytes, super
    {true, false, false, false, true, false, false, 0, false},  // Q4_0
    {true, false, false, false, true, true, false, 0, false},   // Q4_1
    {true, false, true, false, true, false, false, 0, false},   // Q5_0
    {true, false, true, false, true, true, false, 0, false},    // Q5_1
    {false, false, false, true, true, false, false, 0, false},  // Q8_0
    {false, true, false, false, true, true, false, 16, true},   // Q2_K
    {false, true, true, false, true, false, false, 12, true},   // Q3_K
    {true, false, false, false, true, true, false, 12, true},   // Q4_K
    {true, false, true, false, true, true, false, 12, true},    // Q5_K
    {true, true, false, false, true, false, false, 16, true},   // Q6_K
    {true, false, false, false, true, false, false, 0, false},  // IQ4_NL
    {true, false, false, false, true, true, false, 4, true},    // IQ4_XS
    {true, false, false, false, false, false, true, 0, false},  // MXFP4
};

inline constexpr BlockFields kFields[] = {
    // d, m, scales, nib, hi, two
    {0, -1, -1, 2, -1, -1},      // Q4_0
    {0, 2, -1, 4, -1, -1},       // Q4_1
    {0, -1, -1, 6, 2, -1},       // Q5_0
    {0, 2, -1, 8, 4, -1},        // Q5_1
    {0, -1, -1, -1, -1, -1},     // Q8_0
    {80, 82, 0, -1, -1, 16},     // Q2_K
    {108, -1, 96, -1, 0, 32},    // Q3_K
    {0, 2, 4, 16, -1, -1},       // Q4_K
    {0, 2, 4, 48, 16, -1},       // Q5_K
    {208, -1, 192, 0, -1, 128},  // Q6_K
    {0, -1, -1, 2, -1, -1},      // IQ4_NL
    {0, 2, 4, 8, -1, -1},        // IQ4_XS
    {-1, -1, -1, 1, -1, -1},     // MXFP4
};

constexpr int Index(DType type) { return static_cast<int>(type) - static_cast<int>(DType::kQ4_0); }
constexpr const PlaneInfo& PlanesOf(DType type) { return kPlanes[Index(type)]; }

template <typename T>
inline T Load(const uint8_t* p) {
  T v;
  std::memcpy(&v, p, sizeof(T));
  return v;
}

// nib[i] = 4 bits of lo[i] at `shift` | the same bits of hi[i] << 4, eight bytes at a time
inline void Regroup(const uint8_t* lo, const uint8_t* hi, int shift, uint8_t nib[16]) {
  constexpr uint64_t kNibbles = 0x0F0F0F0F0F0F0F0Fu;
  for (int i = 0; i < 16; i += 8) {
    const uint64_t v = ((Load<uint64_t>(lo + i) >> shift) & kNibbles) |
                       (((Load<uint64_t>(hi + i) >> shift) & kNibbles) << 4);
    std::memcpy(nib + i, &v, 8);
  }
}

inline void ReadNib(DType type, const uint8_t* qs, int s, uint8_t nib[16]) {
  switch (type) {
    case DType::kQ4_K:
    case DType::kQ5_K: {  // bytes 32c.. hold sub-block 2c in their low, 2c + 1 in their high
                          // nibbles
      const uint8_t* q = qs + 32 * (s / 2);
      Regroup(q, q + 16, 4 * (s % 2), nib);
      return;
    }
    case DType::kQ6_K: {  // half h, sub-block j of 4: bytes 64h + 32 (j % 2), low nibbles for j < 2
      const uint8_t* q = qs + 64 * (s / 4) + 32 * (s % 2);
      Regroup(q, q + 16, (s % 4) < 2 ? 0 : 4, nib);
      return;
    }
    default:
      std::memcpy(nib, qs + 16 * s, 16);
  }
}

// Two bits of each of 32 elements, from bytes q[0..32) at bit `shift`: two[4h + b] takes bits 2i,
// 2i + 1 from byte 16h + 4i + b, four bytes b at a time.
inline void ReadTwo(const uint8_t* q, int shift, uint8_t two[8]) {
  for (int h = 0; h < 2; ++h) {
    uint32_t v = 0;
    for (int i = 0; i < 4; ++i) {
      v |= ((Load<uint32_t>(q + 16 * h + 4 * i) >> shift) & 0x03030303u) << (2 * i);
    }
    std::memcpy(two + 4 * h, &v, 4);
  }
}

inline uint32_t ReadHi(DType type, const uint8_t* qh, int s) {
  if (!PlanesOf(type).super) return Load<uint32_t>(qh);
  uint32_t hi = 0;
  for (int i = 0; i < 32; i += 8) {
    // The multiplication moves bit 0 of byte j to bit 56 + j.
    const uint64_t bits = (Load<uint64_t>(qh + i) >> s) & 0x0101010101010101u;
    hi |= static_cast<uint32_t>((bits * 0x0102040810204080u) >> 56) << i;
  }
  return hi;
}

// ReadHeader and ReadPlanes of row_planes.h.
inline RowHeader Header(DType type, const uint8_t* block) {
  const BlockFields& f = kFields[Index(type)];
  RowHeader header;
  if (f.d >= 0) header.d = Load<uint16_t>(block + f.d);
  if (f.m >= 0) header.m = Load<uint16_t>(block + f.m);
  if (f.scales >= 0) std::memcpy(header.scales, block + f.scales, PlanesOf(type).scale_bytes);
  if (type == DType::kMXFP4) header.scales[0] = block[0];
  return header;
}

inline void Read(DType type, const uint8_t* block, int s, RowPlanes* planes) {
  const BlockFields& f = kFields[Index(type)];
  const PlaneInfo& info = PlanesOf(type);
  if (info.nib) ReadNib(type, block + f.nib, s, planes->nib);
  // Q2_K, Q3_K, Q6_K: half h of the super-block has 32 bytes, sub-block j of 4 their bits 2j, 2j
  // + 1.
  if (info.two) ReadTwo(block + f.two + 32 * (s / 4), 2 * (s % 4), planes->two);
  if (info.hi) planes->hi = ReadHi(type, block + f.hi, s);
  if (info.i8) std::memcpy(planes->i8, block + 2, 32);
}

}  // namespace shoal::row_planes
