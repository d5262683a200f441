#include "kernels/row_planes.h"

#include <cstring>

#include "kernels/row_planes_inline.h"

namespace shoal {

const int8_t kLevelsIq4[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                               1,    13,   25,  38,  53,  69,  89,  113};
const int8_t kLevelsMxfp4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

const PlaneInfo& Planes(DType type) { return row_planes::PlanesOf(type); }

RowHeader ReadHeader(DType type, const uint8_t* block) { return row_planes::Header(type, block); }

void ReadPlanes(DType type, const uint8_t* block, int s, RowPlanes* planes) {
  row_planes::Read(type, block, s, planes);
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
