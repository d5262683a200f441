#include "kernels/dtype.h"

#include <cstring>

#include "kernels/row_planes.h"

namespace shoal {
namespace {

constexpr DTypeInfo kInfo[kNumDTypes] = {
    {"f32", 0, 1, 4, 1},        {"f16", 1, 1, 2, 1},        {"bf16", 30, 1, 2, 1},
    {"q4_0", 2, 32, 18, 32},    {"q4_1", 3, 32, 20, 32},    {"q5_0", 6, 32, 22, 32},
    {"q5_1", 7, 32, 24, 32},    {"q8_0", 8, 32, 34, 32},    {"q2_k", 10, 256, 84, 32},
    {"q3_k", 11, 256, 110, 32}, {"q4_k", 12, 256, 144, 32}, {"q5_k", 13, 256, 176, 32},
    {"q6_k", 14, 256, 210, 32}, {"iq4_nl", 20, 32, 18, 32}, {"iq4_xs", 23, 256, 136, 32},
    {"mxfp4", 39, 32, 17, 32},
};

float FromBits(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

uint32_t ToBits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

}  // namespace

const DTypeInfo& Info(DType type) { return kInfo[static_cast<int>(type)]; }

std::optional<DType> DTypeFromGgml(uint32_t ggml_id) {
  for (int i = 0; i < kNumDTypes; ++i) {
    if (kInfo[i].ggml_id == ggml_id) return static_cast<DType>(i);
  }
  return std::nullopt;
}

std::optional<DType> DTypeFromName(const std::string& name) {
  for (int i = 0; i < kNumDTypes; ++i) {
    if (name == kInfo[i].name) return static_cast<DType>(i);
  }
  return std::nullopt;
}

std::string KnownDTypes() {
  std::string names;
  for (const DTypeInfo& info : kInfo) {
    if (!names.empty()) names += ", ";
    names += info.name;
  }
  return names;
}

int64_t RowBytes(DType type, int64_t elems) {
  const DTypeInfo& info = Info(type);
  return elems / info.block_elems * info.block_bytes;
}

void DequantizeRow(DType type, const void* src, float* dst, int64_t elems) {
  const uint8_t* block = static_cast<const uint8_t*>(src);
  switch (type) {
    case DType::kF32:
      std::memcpy(dst, src, elems * sizeof(float));
      return;
    case DType::kF16:
    case DType::kBF16:
      for (int64_t i = 0; i < elems; ++i) {
        uint16_t h;
        std::memcpy(&h, block + 2 * i, 2);
        dst[i] = type == DType::kF16 ? HalfToFloat(h) : BFloat16ToFloat(h);
      }
      return;
    default:
      break;
  }
  const DTypeInfo& info = Info(type);
  const int subs = info.block_elems / 32;
  RowPlanes planes;
  SubBlockValues v;
  for (int64_t done = 0; done < elems; done += info.block_elems, block += info.block_bytes) {
    const RowHeader header = ReadHeader(type, block);
    for (int s = 0; s < subs; ++s) {
      ReadPlanes(type, block, s, &planes);
      DecodeSubBlock(type, header, planes, s, &v);
      for (int i = 0; i < 32; ++i) {
        *dst++ = v.scale[i / 16] * static_cast<float>(v.level[i]) + v.bias[i / 16];
      }
    }
  }
}

float HalfToFloat(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t exponent = (h >> 10) & 31;
  const uint32_t mantissa = h & 0x3ff;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24 is exact in float
    const float f = static_cast<float>(mantissa) * 0x1p-24f;
    return FromBits(ToBits(f) | sign);
  }
  const uint32_t bias = exponent == 31 ? 255 - 31 : 127 - 15;
  return FromBits(sign | ((exponent + bias) << 23) | (mantissa << 13));
}

uint16_t FloatToHalf(float f) {
  const uint32_t bits = ToBits(f);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;   // NaN
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // rounds to 65536 or more: infinity
  if (magnitude < 0x38800000) {                       // below 2^-14: subnormal, in units of 2^-24
    // Adding 0.5 shifts the units to the last mantissa bits and rounds to nearest even.
    const uint32_t sum = ToBits(FromBits(magnitude) + 0.5f);
    return static_cast<uint16_t>(sign | (sum - 0x3f000000));
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return static_cast<uint16_t>(sign | ((rounded - ((127 - 15) << 23)) >> 13));
}

uint16_t FloatToBFloat16(float f) {
  const uint32_t bits = ToBits(f);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((bits >> 16) | 0x40);  // NaN
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace shoal
