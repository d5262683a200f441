#include "kernels/dtype.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

namespace shoal {
namespace {

void PutHalf(std::vector<uint8_t>* block, int at, float f) {
  const uint16_t h = FloatToHalf(f);
  std::memcpy(block->data() + at, &h, 2);
}

std::vector<float> Dequantize(DType type, const std::vector<uint8_t>& block, int elems) {
  std::vector<float> out(elems);
  DequantizeRow(type, block.data(), out.data(), elems);
  return out;
}

TEST(DType, NamesAndIdsAreFound) {
  for (int i = 0; i < kNumDTypes; ++i) {
    const DType type = static_cast<DType>(i);
    EXPECT_EQ(DTypeFromName(Info(type).name), type);
    EXPECT_EQ(DTypeFromGgml(Info(type).ggml_id), type);
    EXPECT_NE(KnownDTypes().find(Info(type).name), std::string::npos);
  }
  EXPECT_FALSE(DTypeFromGgml(4).has_value());  // Q4_2, removed from GGUF
  EXPECT_FALSE(DTypeFromName("q4_k_m").has_value());
  EXPECT_EQ(RowBytes(DType::kQ4_K, 512), 288);
  EXPECT_EQ(RowBytes(DType::kF16, 5), 10);
}

TEST(Half, KnownValues) {
  EXPECT_EQ(HalfToFloat(0x3c00), 1.0f);
  EXPECT_EQ(HalfToFloat(0xc000), -2.0f);
  EXPECT_EQ(HalfToFloat(0x7bff), 65504.0f);
  EXPECT_EQ(HalfToFloat(0x0001), 0x1p-24f);
  EXPECT_EQ(HalfToFloat(0x03ff), 1023 * 0x1p-24f);
  EXPECT_TRUE(std::isinf(HalfToFloat(0xfc00)));
  EXPECT_TRUE(std::isnan(HalfToFloat(0x7e01)));
  EXPECT_EQ(FloatToHalf(65519.0f), 0x7bff);  // just under halfway to 65536
  EXPECT_EQ(FloatToHalf(65520.0f), 0x7c00);
  EXPECT_EQ(FloatToHalf(1.0f + 0x1p-11f), 0x3c00);  // tie: to even
  EXPECT_EQ(FloatToHalf(1.0f + 3 * 0x1p-11f), 0x3c02);
  EXPECT_EQ(FloatToHalf(-0.0f), 0x8000);
  EXPECT_EQ(FloatToHalf(0x1p-25f), 0x0000);  // tie between 0 and the smallest subnormal
  EXPECT_EQ(FloatToHalf(std::nextafter(0x1p-25f, 1.0f)), 0x0001);
}

TEST(Half, EveryValueSurvivesTheRoundTrip) {
  for (uint32_t h = 0; h < 0x10000; ++h) {
    const float f = HalfToFloat(static_cast<uint16_t>(h));
    if (std::isnan(f)) continue;
    ASSERT_EQ(FloatToHalf(f), h);
  }
}

TEST(BFloat16, RoundsToNearestEven) {
  EXPECT_EQ(FloatToBFloat16(1.0f), 0x3f80);
  EXPECT_EQ(FloatToBFloat16(1.0f + 0x1p-8f), 0x3f80);  // tie
  EXPECT_EQ(FloatToBFloat16(1.0f + 3 * 0x1p-8f), 0x3f82);
  EXPECT_EQ(FloatToBFloat16(std::numeric_limits<float>::max()), 0x7f80);
  EXPECT_TRUE(std::isnan(BFloat16ToFloat(FloatToBFloat16(NAN))));
  EXPECT_EQ(BFloat16ToFloat(0xc040), -3.0f);
}

TEST(Dequantize, Q4_0) {
  std::vector<uint8_t> block(18, 0x88);
  PutHalf(&block, 0, 0.5f);
  block[2] = 0xf0;  // element 0: 0, element 16: 15
  block[17] = 0x19;
  const auto x = Dequantize(DType::kQ4_0, block, 32);
  EXPECT_EQ(x[0], -4.0f);
  EXPECT_EQ(x[16], 3.5f);
  EXPECT_EQ(x[15], 0.5f);
  EXPECT_EQ(x[31], -3.5f);
  EXPECT_EQ(x[1], 0.0f);
}

TEST(Dequantize, Q4_1AndQ5) {
  std::vector<uint8_t> block(20, 0);
  PutHalf(&block, 0, 0.25f);
  PutHalf(&block, 2, -1.0f);
  block[4] = 0x3a;
  auto x = Dequantize(DType::kQ4_1, block, 32);
  EXPECT_EQ(x[0], 1.5f);     // 10 / 4 - 1
  EXPECT_EQ(x[16], -0.25f);  // 3 / 4 - 1
  EXPECT_EQ(x[31], -1.0f);

  block.assign(22, 0);
  PutHalf(&block, 0, 2.0f);
  block[2] = 0x01;  // fifth bit of element 0
  block[5] = 0x80;  // and of element 31
  block[6] = 0x02;
  x = Dequantize(DType::kQ5_0, block, 32);
  EXPECT_EQ(x[0], 4.0f);  // 2 (2 + 16 - 16)
  EXPECT_EQ(x[1], -32.0f);
  EXPECT_EQ(x[31], 0.0f);

  block.assign(24, 0);
  PutHalf(&block, 0, 1.0f);
  PutHalf(&block, 2, 0.5f);
  block[4] = 0x02;  // element 1
  block[9] = 0x07;
  x = Dequantize(DType::kQ5_1, block, 32);
  EXPECT_EQ(x[1], 23.5f);
  EXPECT_EQ(x[0], 0.5f);
}

TEST(Dequantize, Q8_0AndTables) {
  std::vector<uint8_t> block(34, 0);
  PutHalf(&block, 0, 0.125f);
  block[2] = 0x80;
  block[33] = 127;
  auto x = Dequantize(DType::kQ8_0, block, 32);
  EXPECT_EQ(x[0], -16.0f);
  EXPECT_EQ(x[31], 15.875f);

  block.assign(18, 0x80);
  PutHalf(&block, 0, 1.0f);
  x = Dequantize(DType::kIQ4_NL, block, 32);
  EXPECT_EQ(x[0], -127.0f);
  EXPECT_EQ(x[16], 1.0f);

  block.assign(17, 0xf5);  // 5 -> 3, 15 -> -6
  block[0] = 128;
  x = Dequantize(DType::kMXFP4, block, 32);
  EXPECT_EQ(x[0], 6.0f);
  EXPECT_EQ(x[16], -12.0f);
  block[0] = 0;
  EXPECT_EQ(Dequantize(DType::kMXFP4, block, 32)[0], 3 * 0x1p-127f);
}

TEST(Dequantize, Q4KAndQ5K) {
  std::vector<uint8_t> block(144, 0);
  PutHalf(&block, 0, 0.5f);
  PutHalf(&block, 2, 0.25f);
  uint8_t* scales = block.data() + 4;
  scales[1] = 3 | (2 << 6);    // sc[1] = 3; two high bits of sc[5]
  scales[5] = 7 | (1 << 6);    // mn[1] = 7; two high bits of mn[5]
  scales[9] = 9 | (4 << 4);    // low nibbles of sc[5], mn[5]
  block[16] = 0x5a;            // sub-blocks 0 and 1, element 0
  block[16 + 64 + 31] = 0xc0;  // sub-block 5, element 31
  auto x = Dequantize(DType::kQ4_K, block, 256);
  EXPECT_EQ(x[0], 0.0f);                       // sc[0] = mn[0] = 0
  EXPECT_EQ(x[32], 0.5f * 3 * 5 - 0.25f * 7);  // sc[1], mn[1]
  EXPECT_EQ(x[32 + 1], -0.25f * 7);
  EXPECT_EQ(x[5 * 32 + 31], 0.5f * (9 + 32) * 12 - 0.25f * (4 + 16));

  block.insert(block.begin() + 16, 32, 0);  // qh
  block[16] = 1 << 1;                       // element 0 of sub-block 1
  x = Dequantize(DType::kQ5_K, block, 256);
  EXPECT_EQ(x[32], 0.5f * 3 * (5 + 16) - 0.25f * 7);
  EXPECT_EQ(x[5 * 32 + 31], 0.5f * (9 + 32) * 12 - 0.25f * (4 + 16));
}

TEST(Dequantize, Q6K) {
  std::vector<uint8_t> block(210, 0);
  PutHalf(&block, 208, 0.5f);
  block[192 + 8 + 5] = static_cast<uint8_t>(-3);  // half 1, elements 80..95 of it
  block[64 + 16] = 0x7b;                          // half 1, l = 16: elements 16 (low), 80 (high)
  block[128 + 32 + 16] = 0x20;                    // high bits 2 of element 80
  auto x = Dequantize(DType::kQ6_K, block, 256);
  EXPECT_EQ(x[128 + 80], 0.5f * -3 * (7 + 32 - 32));
  EXPECT_EQ(x[128 + 81], 0.5f * -3 * -32);
  EXPECT_EQ(x[128 + 16], 0.0f);  // its scale is 0
}

TEST(Dequantize, Q2KAndQ3K) {
  std::vector<uint8_t> block(84, 0);
  PutHalf(&block, 80, 2.0f);
  PutHalf(&block, 82, 1.0f);
  block[15] = 0x53;         // scale 3, min 5 of the last 16 elements
  block[16 + 63] = 2 << 6;  // element 255
  auto x = Dequantize(DType::kQ2_K, block, 256);
  EXPECT_EQ(x[255], 2.0f * 3 * 2 - 5);
  EXPECT_EQ(x[254], -5.0f);
  EXPECT_EQ(x[0], 0.0f);

  block.assign(110, 0);
  PutHalf(&block, 108, 1.0f);
  block[96 + 1] = 0xb4;        // low nibbles of scales 1 (4) and 9 (11)
  block[104 + 1] = 0x10 | 2;   // high bits of scale 1: 2, of scale 9: 1
  block[32 + 16] = 0x03;       // sub-block 0, element 16: scale 1
  block[16] = 1;               // its high bit
  block[32 + 32 + 16] = 0x02;  // sub-block 4, element 16 (index 144): scale 9
  x = Dequantize(DType::kQ3_K, block, 256);
  EXPECT_EQ(x[16], (4.0f + 32 - 32) * 3);
  EXPECT_EQ(x[17], (4.0f + 32 - 32) * -4);
  EXPECT_EQ(x[144], (11.0f + 16 - 32) * (2 - 4));
  EXPECT_EQ(x[0], -32.0f * -4);
}

TEST(Dequantize, Iq4Xs) {
  std::vector<uint8_t> block(136, 0);
  PutHalf(&block, 0, 0.5f);
  block[3] = 0x80;      // scales_h: 2 for sub-block 7
  block[4 + 3] = 0x90;  // low nibble 9
  block[8 + 7 * 16 + 15] = 0xf8;
  const auto x = Dequantize(DType::kIQ4_XS, block, 256);
  EXPECT_EQ(x[7 * 32 + 15], 0.5f * 9);  // 9 + 32 - 32, level 1
  EXPECT_EQ(x[7 * 32 + 31], 0.5f * 9 * 113);
  EXPECT_EQ(x[0], 0.5f * -32 * -127);
}

// A quantizer's error relative to the signal, on Gaussian weights: the rate each format is known
// for.
double NormalizedError(DType type, float scale) {
  std::mt19937 rng(7);
  std::normal_distribution<float> gauss(0, scale);
  const int n = 256 * 64;
  std::vector<float> x(n), y(n);
  for (float& v : x) v = gauss(rng);
  std::vector<uint8_t> packed(RowBytes(type, n));
  QuantizeRow(type, x.data(), packed.data(), n);
  DequantizeRow(type, packed.data(), y.data(), n);
  double error = 0, signal = 0;
  for (int i = 0; i < n; ++i) {
    error += (x[i] - y[i]) * static_cast<double>(x[i] - y[i]);
    signal += x[i] * static_cast<double>(x[i]);
  }
  return error / signal;
}

TEST(Quantize, ErrorIsWithinWhatTheFormatAllows) {
  const struct {
    DType type;
    double nmse;
  } limits[] = {
      {DType::kF32, 0},         {DType::kF16, 1e-7},    {DType::kBF16, 4e-6},
      {DType::kQ8_0, 3.5e-5},   {DType::kQ4_0, 0.0085}, {DType::kQ4_1, 0.0075},
      {DType::kQ5_0, 0.0021},   {DType::kQ5_1, 0.0018}, {DType::kIQ4_NL, 0.0065},
      {DType::kMXFP4, 0.0165},  {DType::kQ2_K, 0.09},   {DType::kQ3_K, 0.03},
      {DType::kQ4_K, 0.0062},   {DType::kQ5_K, 0.0016}, {DType::kQ6_K, 0.0005},
      {DType::kIQ4_XS, 0.0065},
  };
  for (const auto& limit : limits) {
    EXPECT_LE(NormalizedError(limit.type, 0.02f), limit.nmse) << Info(limit.type).name;
    EXPECT_LE(NormalizedError(limit.type, 3.0f), limit.nmse) << Info(limit.type).name;
  }
}

TEST(Quantize, ZerosAndConstantsStayFinite) {
  for (int t = 0; t < kNumDTypes; ++t) {
    const DType type = static_cast<DType>(t);
    for (float value : {0.0f, 1.5f, -1.5f}) {
      std::vector<float> x(256, value), y(256);
      std::vector<uint8_t> packed(RowBytes(type, 256));
      QuantizeRow(type, x.data(), packed.data(), 256);
      DequantizeRow(type, packed.data(), y.data(), 256);
      for (float v : y) ASSERT_NEAR(v, value, 0.35) << Info(type).name << " of " << value;
    }
  }
}

}  // namespace
}  // namespace shoal
