// Wire formats: round-trip error within the bound that wire.h states, and one result on every
// instruction set.
#include "comm/wire.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

namespace shoal {
namespace {

constexpr int64_t kCounts[] = {1, 2, 7, 8, 31, 32, 33, 63, 64, 100, 1024, 4097};

// Values over many magnitudes, with zeros, and whole blocks of tiny ones.
std::vector<float> Values(int64_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::uniform_int_distribution<int> exponent(-30, 14);
  std::vector<float> values(count);
  float scale = 1;
  for (int64_t i = 0; i < count; ++i) {
    if (i % 32 == 0) scale = std::ldexp(1.0f, exponent(random));
    values[i] = i % 13 == 5 ? 0.0f : scale * normal(random);
  }
  return values;
}

std::vector<float> RoundTrip(Wire wire, const std::vector<float>& in) {
  const int64_t count = static_cast<int64_t>(in.size());
  // Exactly as long as the encoding, so that the address sanitizer sees an overrun.
  std::vector<uint8_t> encoded(EncodedBytes(wire, count));
  Encode(wire, in.data(), count, encoded.data());
  std::vector<float> out(count);
  Decode(wire, encoded.data(), count, out.data());
  return out;
}

TEST(Wire, F32IsExact) {
  for (int64_t count : kCounts) {
    const std::vector<float> in = Values(count, count);
    EXPECT_EQ(RoundTrip(Wire::kF32, in), in) << count;
  }
}

TEST(Wire, F16ErrorIsWithinHalfAUnitInTheLastPlace) {
  for (int64_t count : kCounts) {
    const std::vector<float> in = Values(count, count);
    const std::vector<float> out = RoundTrip(Wire::kF16, in);
    for (int64_t i = 0; i < count; ++i) {
      EXPECT_LE(std::abs(out[i] - in[i]), std::abs(in[i]) * 0x1p-11f + 0x1p-25f) << in[i];
    }
  }
}

TEST(Wire, Q8ErrorIsWithinHalfAStep) {
  for (int64_t count : kCounts) {
    const std::vector<float> in = Values(count, count);
    const std::vector<float> out = RoundTrip(Wire::kQ8, in);
    for (int64_t begin = 0; begin < count; begin += kWireBlock) {
      const int64_t end = std::min(begin + kWireBlock, count);
      float largest = 0;
      for (int64_t i = begin; i < end; ++i) largest = std::max(largest, std::abs(in[i]));
      const float d = largest / 127 * (1 + 0x1p-10f) + 0x1p-24f;
      for (int64_t i = begin; i < end; ++i) {
        // The product x * (1/d) rounds twice before it is rounded to a whole number.
        EXPECT_LE(std::abs(out[i] - in[i]), d / 2 * (1 + 0x1p-14f)) << in[i] << " of " << largest;
      }
    }
  }
}

TEST(Wire, F16SaturatesAndKeepsNan) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> in = {1e6f,     -1e6f,    nan,   65504.0f, 65520.0f,
                                 0x1p-24f, 0x1p-26f, -0.0f, 1};
  const std::vector<float> out = RoundTrip(Wire::kF16, in);
  EXPECT_EQ(out[0], 65504.0f);
  EXPECT_EQ(out[1], -65504.0f);
  EXPECT_TRUE(std::isnan(out[2]));
  EXPECT_EQ(out[3], 65504.0f);
  EXPECT_EQ(out[4], 65504.0f);
  EXPECT_EQ(out[5], 0x1p-24f);
  EXPECT_EQ(out[6], 0.0f);
  EXPECT_TRUE(std::signbit(out[7]));
}

TEST(Wire, Q8CarriesNonFiniteBlocksAsNanAndLeavesTheOthers) {
  std::vector<float> in(96, 1.0f);
  in[40] = std::numeric_limits<float>::infinity();
  in[70] = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> out = RoundTrip(Wire::kQ8, in);
  EXPECT_NEAR(out[0], 1.0f, 1.0f / 254 * 1.01f);
  EXPECT_TRUE(std::isnan(out[32]));
  EXPECT_TRUE(std::isnan(out[64]));
}

TEST(Wire, HalvesMatchTheirDefinitionForEveryBitPattern) {
  std::vector<uint8_t> halves(2 * 65536);
  for (uint32_t h = 0; h < 65536; ++h) {
    const uint16_t bits = static_cast<uint16_t>(h);
    std::memcpy(&halves[2 * h], &bits, 2);
  }
  std::vector<float> decoded(65536);
  wire_internal::ScalarOps().decode_f16(halves.data(), 65536, decoded.data());
  for (uint32_t h = 0; h < 65536; ++h) {
    const int exponent = (h >> 10) & 31;
    const float mantissa = static_cast<float>(h & 1023);
    if (exponent == 31) {
      EXPECT_EQ(std::isnan(decoded[h]), (h & 1023) != 0) << h;
      continue;
    }
    const float magnitude =
        exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
    EXPECT_EQ(decoded[h], h & 0x8000 ? -magnitude : magnitude) << h;
  }
  std::vector<uint8_t> back(2 * 65536);
  wire_internal::ScalarOps().encode_f16(decoded.data(), 65536, back.data());
  for (uint32_t h = 0; h < 65536; ++h) {
    if (((h >> 10) & 31) == 31) continue;
    EXPECT_EQ(std::memcmp(&back[2 * h], &halves[2 * h], 2), 0) << h;
  }
}

TEST(Wire, TheCpusFastestPathGivesTheScalarBits) {
  const wire_internal::Ops& scalar = wire_internal::ScalarOps();
  const wire_internal::Ops& best = wire_internal::BestOps();
  for (int64_t count : kCounts) {
    std::vector<float> in = Values(count, 77 + count);
    in[0] = 3e30f;  // saturates
    std::vector<uint8_t> a(count * 2), b(count * 2);
    scalar.encode_f16(in.data(), count, a.data());
    best.encode_f16(in.data(), count, b.data());
    EXPECT_EQ(a, b);
    std::vector<float> x = in, y = in;
    scalar.decode_add_f16(a.data(), count, x.data());
    best.decode_add_f16(a.data(), count, y.data());
    EXPECT_EQ(x, y);

    const int64_t blocks = count / kWireBlock;
    a.assign(blocks * kQ8BlockBytes, 0);
    b = a;
    scalar.encode_q8(in.data(), blocks, a.data());
    best.encode_q8(in.data(), blocks, b.data());
    EXPECT_EQ(a, b);
    scalar.decode_q8(a.data(), blocks, x.data());
    best.decode_q8(a.data(), blocks, y.data());
    EXPECT_EQ(x, y);
    scalar.decode_add_q8(a.data(), blocks, x.data());
    best.decode_add_q8(a.data(), blocks, y.data());
    EXPECT_EQ(x, y);
  }
}

}  // namespace
}  // namespace shoal
