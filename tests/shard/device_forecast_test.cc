// What the plan says of a GPU's speed, for made-up machines.
#include "shard/device_forecast.h"

#include "gtest/gtest.h"

namespace shoal {
namespace {

constexpr double kGB = 1e9;
constexpr int kLayers = 32;
constexpr int64_t kAttention = 50'000'000, kFfn = 180'000'000, kHead = 140'000'000;

// About an 8B model in Q8_0.
WeightLayout Layout() {
  WeightLayout layout;
  const auto add = [&](WeightUnit::Kind kind, int layer, int64_t bytes) {
    WeightUnit u;
    u.kind = kind;
    u.layer = layer;
    u.bytes = bytes;
    if (kind == WeightUnit::Kind::kHead) u.extents.push_back({Role::kHead, "", 0, 0, 0, {}, 0, 0});
    if (kind == WeightUnit::Kind::kEmbedding) {
      const PackedShape shape = MakePackedShape(DType::kQ8_0, 32000, 0, 4096);
      u.extents.push_back({Role::kEmbedding, "", 0, 0, 0, shape, 0, shape.bytes()});
    }
    layout.units.push_back(u);
    layout.bytes += bytes;
  };
  add(WeightUnit::Kind::kEmbedding, -1, kHead);
  for (int l = 0; l < kLayers; ++l) {
    add(WeightUnit::Kind::kAttention, l, kAttention);
    add(WeightUnit::Kind::kFfn, l, kFfn);
  }
  add(WeightUnit::Kind::kHead, -1, kHead);
  return layout;
}
constexpr double kMultiplied = kLayers * (kAttention + kFfn) + kHead;

// A GPU of 1 TB/s, 160 TFLOP/s on 16 PCIe lanes of the fourth generation.
constexpr DeviceSpeed kGpu = {1000 * kGB, 160e12, 25 * kGB};
constexpr DeviceWork kWork = {1.0625, 131072, 4.0 * 4096 * kLayers};
constexpr double kDisk = 2 * kGB;

Forecast At(int64_t vram, int64_t ram, const Workload& work = {}) {
  const WeightLayout layout = Layout();
  ModelConfig config;
  const auto placement = PlaceOnDevice(layout, config, vram, ram, 512);
  EXPECT_TRUE(placement.ok()) << placement.status();
  return PredictOnDevice(layout, config, *placement, kGpu, kWork, kDisk, work);
}

TEST(DeviceForecast, WhatFitsIsBoundByTheGpusMemory) {
  const Forecast f = At(int64_t{24} << 30, int64_t{16} << 30);
  EXPECT_EQ(f.stream_s, 0);
  EXPECT_EQ(f.bound, "the GPU's memory");
  EXPECT_NEAR(f.decode_s, kMultiplied / (0.8 * 1000 * kGB) + kLayers * 33e-6, 1e-6);
}

TEST(DeviceForecast, WhatDoesNotFitIsBoundByTheLink) {
  const int64_t vram = int64_t{4} << 30;
  const Forecast f = At(vram, int64_t{16} << 30);
  EXPECT_EQ(f.bound, "the link to the GPU");
  EXPECT_NEAR(f.stream_s, f.decode_s, 0.02 * f.decode_s);  // computing hides behind it
  const double sent = f.stream_s * kGpu.link_bytes_per_s;
  EXPECT_GT(sent, kMultiplied - static_cast<double>(vram));
  EXPECT_LT(sent, kMultiplied - static_cast<double>(vram) + 3 * kFfn + kHead);
  EXPECT_LT(f.decode_s, At(int64_t{3} << 30, int64_t{16} << 30).decode_s);
}

TEST(DeviceForecast, WhatFitsInNeitherIsBoundByTheDisk) {
  const Forecast f = At(int64_t{4} << 30, int64_t{1} << 30);
  EXPECT_EQ(f.bound, "reading weights");
  EXPECT_GT(f.stream_s, 1.0);  // more than 2 GB from a disk of 2 GB/s
  EXPECT_GE(f.decode_s, f.stream_s * 0.99);
  EXPECT_LT(At(int64_t{4} << 30, int64_t{2} << 30).decode_s, f.decode_s);
}

TEST(DeviceForecast, PromptsAreBoundByTheProductsAndStreamOncePerChunk) {
  Workload work;
  work.rows = 512;
  const double whole = At(int64_t{24} << 30, int64_t{16} << 30, work).prefill_s;
  const double weights = kLayers * (kAttention + kFfn) / kWork.bytes_per_weight;
  EXPECT_NEAR(whole, 2 * weights * work.rows / (0.47 * 160e12), 0.1 * whole);
  const Forecast streamed = At(int64_t{4} << 30, int64_t{16} << 30, work);
  EXPECT_GE(streamed.prefill_s, streamed.stream_s * 0.99);
  EXPECT_GE(streamed.prefill_s, whole);
  // What the rows attend to is f16 products too.
  work.prefill_kv_bytes = 512 * 8192 * kWork.kv_bytes_per_token;
  EXPECT_NEAR(At(int64_t{24} << 30, int64_t{16} << 30, work).prefill_s - whole,
              512.0 * 8192 * kWork.attention_operations / (0.12 * 160e12), 1e-6);
}

TEST(DeviceForecast, AContextIsReadFromTheGpusMemory) {
  Workload work;
  const double empty = At(int64_t{24} << 30, int64_t{16} << 30, work).decode_s;
  work.kv_bytes = 32768 * kWork.kv_bytes_per_token;
  EXPECT_NEAR(At(int64_t{24} << 30, int64_t{16} << 30, work).decode_s - empty,
              work.kv_bytes / (0.3 * 1000 * kGB), 1e-6);
}

// The tables of kernels/cuda/README.md: tokens per second of an H200.
TEST(DeviceForecast, IsNearWhatAnH200Did) {
  const DeviceSpeed h200 = {4536 * kGB, 757e12, 55.4 * kGB};
  const WeightLayout q8 = Layout();
  WeightLayout q4 = q8;
  for (WeightUnit& u : q4.units) u.bytes = u.bytes * 18 / 34;
  ModelConfig config;
  Workload work;
  work.rows = 512;
  work.prefill_kv_bytes = 512.0 * 512 / 2 * kWork.kv_bytes_per_token;
  const auto predict = [&](const WeightLayout& layout, int64_t vram, double bytes_per_weight) {
    const auto placement = *PlaceOnDevice(layout, config, vram, int64_t{64} << 30, 512);
    const DeviceWork device_work = {bytes_per_weight, kWork.kv_bytes_per_token,
                                    kWork.attention_operations};
    return PredictOnDevice(layout, config, placement, h200, device_work, 0, work);
  };
  const Forecast large = predict(q8, int64_t{100} << 30, 1.0625),
                 small = predict(q4, int64_t{100} << 30, 0.5625);
  EXPECT_NEAR(1 / large.decode_s, 350, 0.1 * 350);
  EXPECT_NEAR(1 / small.decode_s, 433, 0.1 * 433);
  EXPECT_NEAR(512 / large.prefill_s, 21742, 0.1 * 21742);
  EXPECT_NEAR(512 / small.prefill_s, 23234, 0.1 * 23234);
}

}  // namespace
}  // namespace shoal
