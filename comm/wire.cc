#include "comm/wire.h"

#include <bit>
#include <cmath>
#include <cstring>

namespace shoal {
namespace wire_internal {
namespace {

constexpr float kF16Max = 65504.0f;

float F16ToF32(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t rest = h & 0x7fffu;
  if (rest >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  if (rest < 0x0400u) {  // subnormal: a count of 2^-24, exact in f32
    return std::bit_cast<float>(sign |
                                std::bit_cast<uint32_t>(static_cast<float>(rest) * 0x1p-24f));
  }
  return std::bit_cast<float>(sign | ((rest + ((127 - 15) << 10)) << 13));
}

// Rounds to nearest even, or up for a positive value when `up`. |x| is at most kF16Max or NaN.
uint16_t F32ToF16(float x, bool up) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {  // quiet, payload's upper bits kept, as F16C does
    return static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  }
  const bool subnormal = magnitude < 0x38800000u;  // below 2^-14
  uint32_t whole, lost, half;
  if (subnormal) {
    const uint32_t exponent = magnitude >> 23;
    const uint32_t mantissa = (magnitude & 0x7fffffu) | (exponent == 0 ? 0 : 0x800000u);
    const uint32_t shift = 126 - (exponent == 0 ? 1 : exponent);  // result counts units of 2^-24
    if (shift > 24) return static_cast<uint16_t>(sign | (up && magnitude != 0 ? 1 : 0));
    whole = mantissa >> shift;
    lost = mantissa & ((1u << shift) - 1);
    half = 1u << (shift - 1);
  } else {
    whole = (magnitude >> 13) - ((127 - 15) << 10);
    lost = magnitude & 0x1fffu;
    half = 0x1000u;
  }
  if (up ? lost != 0 : (lost > half || (lost == half && (whole & 1)))) ++whole;
  return static_cast<uint16_t>(sign | whole);
}

uint16_t Load16(const uint8_t* p) {
  uint16_t v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

void Store16(uint16_t v, uint8_t* p) { std::memcpy(p, &v, sizeof v); }

void EncodeF16(const float* in, int64_t count, uint8_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    float x = in[i];
    if (x > kF16Max) x = kF16Max;
    if (x < -kF16Max) x = -kF16Max;
    Store16(F32ToF16(x, false), out + 2 * i);
  }
}

void DecodeF16(const uint8_t* in, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = F16ToF32(Load16(in + 2 * i));
}

void DecodeAddF16(const uint8_t* in, int64_t count, float* sum) {
  for (int64_t i = 0; i < count; ++i) sum[i] += F16ToF32(Load16(in + 2 * i));
}

}  // namespace

// A block of 1 to 32 elements: also the tail of every instruction set.
void EncodeQ8Block(const float* in, int64_t count, uint8_t* out) {
  uint32_t largest = 0;  // as integers, magnitudes order the same, and NaN comes above infinity
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = std::bit_cast<uint32_t>(in[i]) & 0x7fffffffu;
    if (magnitude > largest) largest = magnitude;
  }
  if (largest >= 0x7f800000u) {
    Store16(0x7e00u, out);
    std::memset(out + 2, 0, count);
    return;
  }
  float scale = std::bit_cast<float>(largest) * (1.0f / 127.0f);
  if (scale > kF16Max) scale = kF16Max;
  const uint16_t d = F32ToF16(scale, true);
  Store16(d, out);
  const float inverse = d == 0 ? 0.0f : 1.0f / F16ToF32(d);
  for (int64_t i = 0; i < count; ++i) {
    float q = std::nearbyintf(in[i] * inverse);
    if (q > 127.0f) q = 127.0f;
    if (q < -127.0f) q = -127.0f;
    out[2 + i] = static_cast<uint8_t>(static_cast<int8_t>(q));
  }
}

void DecodeQ8Block(const uint8_t* in, int64_t count, float* out) {
  const float d = F16ToF32(Load16(in));
  for (int64_t i = 0; i < count; ++i)
    out[i] = d * static_cast<float>(static_cast<int8_t>(in[2 + i]));
}

void DecodeAddQ8Block(const uint8_t* in, int64_t count, float* sum) {
  const float d = F16ToF32(Load16(in));
  for (int64_t i = 0; i < count; ++i) {
    sum[i] += d * static_cast<float>(static_cast<int8_t>(in[2 + i]));
  }
}

namespace {

void EncodeQ8(const float* in, int64_t blocks, uint8_t* out) {
  for (int64_t b = 0; b < blocks; ++b) {
    EncodeQ8Block(in + b * kWireBlock, kWireBlock, out + b * kQ8BlockBytes);
  }
}

void DecodeQ8(const uint8_t* in, int64_t blocks, float* out) {
  for (int64_t b = 0; b < blocks; ++b) {
    DecodeQ8Block(in + b * kQ8BlockBytes, kWireBlock, out + b * kWireBlock);
  }
}

void DecodeAddQ8(const uint8_t* in, int64_t blocks, float* sum) {
  for (int64_t b = 0; b < blocks; ++b) {
    DecodeAddQ8Block(in + b * kQ8BlockBytes, kWireBlock, sum + b * kWireBlock);
  }
}

}  // namespace

const Ops& ScalarOps() {
  static constexpr Ops kOps = {EncodeF16, DecodeF16, DecodeAddF16, EncodeQ8, DecodeQ8, DecodeAddQ8};
  return kOps;
}

const Ops& BestOps() {
  static const Ops& best = []() -> const Ops& {
#if defined(__x86_64__)
    const Ops* avx2 = Avx2Ops();
    if (avx2 != nullptr && __builtin_cpu_supports("avx2")) {  // all of them have F16C
      return *avx2;
    }
#endif
    return ScalarOps();
  }();
  return best;
}

}  // namespace wire_internal

namespace {

using wire_internal::BestOps;

struct Q8Split {
  int64_t blocks;  // whole ones
  int64_t tail;    // elements of the last, partial block
};

Q8Split SplitQ8(int64_t count) { return {count / kWireBlock, count % kWireBlock}; }

}  // namespace

int64_t EncodedBytes(Wire wire, int64_t count) {
  switch (wire) {
    case Wire::kF32:
      return count * 4;
    case Wire::kF16:
      return count * 2;
    case Wire::kQ8:
      break;
  }
  const auto [blocks, tail] = SplitQ8(count);
  return blocks * kQ8BlockBytes + (tail > 0 ? 2 + tail : 0);
}

void Encode(Wire wire, const float* in, int64_t count, uint8_t* out) {
  if (wire == Wire::kF32) {
    std::memcpy(out, in, count * sizeof(float));
  } else if (wire == Wire::kF16) {
    BestOps().encode_f16(in, count, out);
  } else {
    const auto [blocks, tail] = SplitQ8(count);
    BestOps().encode_q8(in, blocks, out);
    if (tail > 0) {
      wire_internal::EncodeQ8Block(in + blocks * kWireBlock, tail, out + blocks * kQ8BlockBytes);
    }
  }
}

void Decode(Wire wire, const uint8_t* in, int64_t count, float* out) {
  if (wire == Wire::kF32) {
    std::memcpy(out, in, count * sizeof(float));
  } else if (wire == Wire::kF16) {
    BestOps().decode_f16(in, count, out);
  } else {
    const auto [blocks, tail] = SplitQ8(count);
    BestOps().decode_q8(in, blocks, out);
    if (tail > 0) {
      wire_internal::DecodeQ8Block(in + blocks * kQ8BlockBytes, tail, out + blocks * kWireBlock);
    }
  }
}

void DecodeAdd(Wire wire, const uint8_t* in, int64_t count, float* sum) {
  if (wire == Wire::kF32) {
    for (int64_t i = 0; i < count; ++i) {
      float x;
      std::memcpy(&x, in + i * sizeof x, sizeof x);
      sum[i] += x;
    }
  } else if (wire == Wire::kF16) {
    BestOps().decode_add_f16(in, count, sum);
  } else {
    const auto [blocks, tail] = SplitQ8(count);
    BestOps().decode_add_q8(in, blocks, sum);
    if (tail > 0) {
      wire_internal::DecodeAddQ8Block(in + blocks * kQ8BlockBytes, tail, sum + blocks * kWireBlock);
    }
  }
}

const char* WireName(Wire wire) {
  switch (wire) {
    case Wire::kF32:
      return "f32";
    case Wire::kF16:
      return "f16";
    case Wire::kQ8:
      break;
  }
  return "q8";
}

}  // namespace shoal
