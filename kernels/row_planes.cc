#include "kernels/row_planes.h"

#include <cstring>

namespace shoal {
namespace {

// Byte offsets of the fields in a GGUF block; -1: the type has none.
struct BlockFields {
  int d, m, scales, nib, hi, two;
};

// One row of the table for each quantized type, in the order of DType from kQ4_0.
constexpr PlaneInfo kPlanes[] = {
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

constexpr BlockFields kFields[] = {
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

int Index(DType type) { return static_cast<int>(type) - static_cast<int>(DType::kQ4_0); }

uint16_t Load16(const uint8_t* p) {
  uint16_t v;
  std::memcpy(&v, p, 2);
  return v;
}

// nib[i] = 4 bits of lo[i] at `shift` | the same bits of hi[i] << 4
void Regroup(const uint8_t* lo, const uint8_t* hi, int shift, uint8_t nib[16]) {
  for (int i = 0; i < 16; ++i) {
    nib[i] = static_cast<uint8_t>(((lo[i] >> shift) & 15) | (((hi[i] >> shift) & 15) << 4));
  }
}

void ReadNib(DType type, const uint8_t* qs, int s, uint8_t nib[16]) {
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

// Two bits of each of 32 elements, from bytes q[0..32) at bit `shift`.
void ReadTwo(const uint8_t* q, int shift, uint8_t two[8]) {
  for (int h = 0; h < 2; ++h) {
    for (int b = 0; b < 4; ++b) {
      int v = 0;
      for (int i = 0; i < 4; ++i) v |= ((q[16 * h + 4 * i + b] >> shift) & 3) << (2 * i);
      two[4 * h + b] = static_cast<uint8_t>(v);
    }
  }
}

uint32_t ReadHi(DType type, const uint8_t* qh, int s) {
  uint32_t hi = 0;
  if (!Planes(type).super) {
    std::memcpy(&hi, qh, 4);
    return hi;
  }
  for (int i = 0; i < 32; ++i) hi |= static_cast<uint32_t>((qh[i] >> s) & 1) << i;
  return hi;
}

}  // namespace

const int8_t kLevelsIq4[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                               1,    13,   25,  38,  53,  69,  89,  113};
const int8_t kLevelsMxfp4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

const PlaneInfo& Planes(DType type) { return kPlanes[Index(type)]; }

RowHeader ReadHeader(DType type, const uint8_t* block) {
  const BlockFields& f = kFields[Index(type)];
  RowHeader header;
  if (f.d >= 0) header.d = Load16(block + f.d);
  if (f.m >= 0) header.m = Load16(block + f.m);
  if (f.scales >= 0) std::memcpy(header.scales, block + f.scales, Planes(type).scale_bytes);
  if (type == DType::kMXFP4) header.scales[0] = block[0];
  return header;
}

void ReadPlanes(DType type, const uint8_t* block, int s, RowPlanes* planes) {
  const BlockFields& f = kFields[Index(type)];
  const PlaneInfo& info = Planes(type);
  if (info.nib) ReadNib(type, block + f.nib, s, planes->nib);
  // Q2_K, Q3_K, Q6_K: half h of the super-block has 32 bytes, sub-block j of 4 their bits 2j, 2j
  // + 1.
  if (info.two) ReadTwo(block + f.two + 32 * (s / 4), 2 * (s % 4), planes->two);
  if (info.hi) planes->hi = ReadHi(type, block + f.hi, s);
  if (info.i8) std::memcpy(planes->i8, block + 2, 32);
}

void ScaleMinK4(const uint8_t b[12], int s, int* scale, int* min) {
  if (s < 4) {
    *scale = b[s] & 63;
    *min = b[s + 4] & 63;
  } else {
    *scale = (b[s + 4] & 15) | ((b[s - 4] >> 6) << 4);
    *min = (b[s + 4] >> 4) | ((b[s] >> 6) << 4);
  }
}

int ScaleQ3K(const uint8_t b[12], int i) {
  const int low = i < 8 ? b[i] & 15 : b[i - 8] >> 4;
  return low | (((b[8 + i % 4] >> (2 * (i / 4))) & 3) << 4);
}

float HalfE8M0(uint8_t e) {
  const uint32_t bits = e < 2 ? 0x00200000u << e : static_cast<uint32_t>(e - 1) << 23;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

namespace {

void DecodeScales(DType type, const RowHeader& h, int s, SubBlockValues* v) {
  const float d = HalfToFloat(h.d);
  for (int half = 0; half < 2; ++half) {
    float scale = d;
    float bias = 0;
    switch (type) {
      case DType::kQ4_1:
      case DType::kQ5_1:
        bias = HalfToFloat(h.m);
        break;
      case DType::kQ2_K: {
        const uint8_t b = h.scales[2 * s + half];
        scale = d * static_cast<float>(b & 15);
        bias = -(HalfToFloat(h.m) * static_cast<float>(b >> 4));
        break;
      }
      case DType::kQ3_K:
        scale = d * static_cast<float>(ScaleQ3K(h.scales, 2 * s + half) - 32);
        break;
      case DType::kQ4_K:
      case DType::kQ5_K: {
        int sc, mn;
        ScaleMinK4(h.scales, s, &sc, &mn);
        scale = d * static_cast<float>(sc);
        bias = -(HalfToFloat(h.m) * static_cast<float>(mn));
        break;
      }
      case DType::kQ6_K:
        scale = d * static_cast<float>(static_cast<int8_t>(h.scales[2 * s + half]));
        break;
      case DType::kIQ4_XS: {
        const int low = (h.scales[s / 2] >> (4 * (s % 2))) & 15;
        scale = d * static_cast<float>((low | (((h.m >> (2 * s)) & 3) << 4)) - 32);
        break;
      }
      case DType::kMXFP4:
        scale = HalfE8M0(h.scales[0]);
        break;
      default:
        break;
    }
    v->scale[half] = scale;
    v->bias[half] = bias;
  }
}

int Level(DType type, int code) {
  switch (type) {
    case DType::kQ4_0:
      return code - 8;
    case DType::kQ5_0:
      return code - 16;
    case DType::kQ3_K:
      return code - 4;
    case DType::kQ6_K:
      return code - 32;
    case DType::kIQ4_NL:
    case DType::kIQ4_XS:
      return kLevelsIq4[code];
    case DType::kMXFP4:
      return kLevelsMxfp4[code];
    default:
      return code;
  }
}

}  // namespace

void DecodeSubBlock(DType type, const RowHeader& header, const RowPlanes& planes, int s,
                    SubBlockValues* values) {
  const PlaneInfo& info = Planes(type);
  DecodeScales(type, header, s, values);
  if (info.i8) {
    std::memcpy(values->level, planes.i8, 32);
    return;
  }
  for (int i = 0; i < 32; ++i) {
    int code = 0, bits = 0;
    if (info.nib) {
      code = i < 16 ? planes.nib[i] & 15 : planes.nib[i - 16] >> 4;
      bits = 4;
    }
    if (info.two) {
      code |= ((planes.two[4 * (i / 16) + i % 4] >> (2 * ((i / 4) % 4))) & 3) << bits;
      bits += 2;
    }
    if (info.hi) code |= static_cast<int>((planes.hi >> i) & 1) << bits;
    values->level[i] = static_cast<int8_t>(Level(type, code));
  }
}

}  // namespace shoal
