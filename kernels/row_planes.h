// One row's share of a quantized block in a form that the GGUF and the packed layout have in
// common.
//
// Internal to kernels/: packing, unpacking, the scalar oracle and the quantizers all speak through
// it, so each format's bit layout is written down once. Plain data, no state.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

namespace shoal {

// Which planes (kernels/README.md, "Packed layout") a sub-block of 32 elements has, and its header
// fields.
struct PlaneInfo {
  bool nib, two, hi, i8;  // planes, in packed order
  bool d, m, e;     // header: f16 scale; f16 min (IQ4_XS: u16 scales_h); MXFP4's exponent byte
  int scale_bytes;  // bytes of the scale array in the header
  bool super;       // 8 sub-blocks share a header

  int header_bytes() const { return 2 * d + 2 * m + e + scale_bytes; }     // of one row
  int sub_bytes() const { return 16 * nib + 8 * two + 4 * hi + 32 * i8; }  // of one row
};
// REQUIRES: a quantized type (Info(type).block_elems > 1).
const PlaneInfo& Planes(DType type);

// Header of one row's block, bits as in the file.
struct RowHeader {
  uint16_t d = 0;
  uint16_t m = 0;
  uint8_t scales[16] = {};  // MXFP4: scales[0] is the exponent
};

// Bits of 32 elements. Element i's code is nib (4 bits), or i8, or two (2 bits), extended by the
// others.
struct RowPlanes {
  uint8_t nib[16];  // low nibble: element i; high nibble: element 16 + i
  uint8_t two[8];   // two[4h + b], bits 2i and 2i + 1: element 4 (4h + i) + b
  uint8_t i8[32];
  uint32_t hi;  // bit i: element i
};

// Reads block `block` (GGUF layout); s (0..7) picks the sub-block, 0 for types without
// super-blocks.
RowHeader ReadHeader(DType type, const uint8_t* block);
void ReadPlanes(DType type, const uint8_t* block, int s, RowPlanes* planes);

// value of element i = scale[i / 16] * level[i] + bias[i / 16]
struct SubBlockValues {
  int8_t level[32];
  float scale[2];
  float bias[2];
};
void DecodeSubBlock(DType type, const RowHeader& header, const RowPlanes& planes, int s,
                    SubBlockValues* values);
// The same from a packed block: lane (0..15) of `header` and of the planes of sub-block s.
void DecodePackedSubBlock(DType type, const uint8_t* header, const uint8_t* planes, int lane, int s,
                          SubBlockValues* values);

// 6-bit scale and min of sub-block s of Q4_K and Q5_K; 6-bit scale i (0..15) of Q3_K.
void ScaleMinK4(const uint8_t scales[12], int s, int* scale, int* min);
int ScaleQ3K(const uint8_t scales[12], int i);

// The 16 levels of IQ4_NL and IQ4_XS, and the doubled ones of MXFP4.
extern const int8_t kLevelsIq4[16];
extern const int8_t kLevelsMxfp4[16];
// 2^(e - 128), the scale of MXFP4's doubled levels.
float HalfE8M0(uint8_t e);

}  // namespace shoal
