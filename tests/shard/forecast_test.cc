// What the plan says of speed, against what can be worked out by hand.
#include "shard/forecast.h"

#include "gtest/gtest.h"

namespace shoal {
namespace {

constexpr double kMB = 1e6;
constexpr int kLayers = 10;
constexpr int64_t kFfn = 100'000'000, kAttention = 20'000'000, kExpert = 50'000'000;

WeightLayout Layout(int experts = 0) {
  WeightLayout layout;
  const auto add = [&](WeightUnit::Kind kind, int layer, int64_t bytes) {
    WeightUnit u;
    u.kind = kind;
    u.layer = layer;
    u.bytes = bytes;
    if (kind == WeightUnit::Kind::kHead) u.extents.push_back({Role::kHead, "", 0, 0, 0, {}, 0, 0});
    layout.units.push_back(u);
    layout.bytes += bytes;
  };
  add(WeightUnit::Kind::kEmbedding, -1, kFfn);
  for (int l = 0; l < kLayers; ++l) {
    add(WeightUnit::Kind::kAttention, l, kAttention);
    add(experts > 0 ? WeightUnit::Kind::kRouter : WeightUnit::Kind::kFfn, l,
        experts > 0 ? 1000 : kFfn);
    for (int e = 0; e < experts; ++e) add(WeightUnit::Kind::kExpert, l, kExpert);
  }
  add(WeightUnit::Kind::kHead, -1, kFfn);
  return layout;
}

ModelConfig Config(int experts = 0) {
  ModelConfig c;
  c.experts = experts;
  c.experts_used = experts / 4;
  return c;
}

// Every FFN part streams, the rest stays.
Placement FfnStreams(const WeightLayout& layout, int64_t ring_bytes) {
  Placement p;
  for (const WeightUnit& u : layout.units) {
    const bool streams = u.kind == WeightUnit::Kind::kFfn;
    p.tiers.push_back(streams ? Tier::kStreamed : Tier::kResident);
    if (streams) p.streamed_bytes += u.bytes;
  }
  p.ring_bytes = ring_bytes;
  return p;
}

MachineSpeed Speed(double read, double decode) {
  MachineSpeed s;
  s.read_bytes_per_s = read;
  s.decode_bytes_per_s = decode;
  s.prefill_bytes_per_s = 100 * decode;
  return s;
}

// Multiplied for a token: all but the embedding.
constexpr double kUsed = kLayers * (kFfn + kAttention) + kFfn;

TEST(Forecast, TakesTheLongerOfReadingAndComputing) {
  const WeightLayout layout = Layout();
  const Placement p = FfnStreams(layout, 3 * kFfn);
  const Forecast reading = Predict(layout, Config(), p, Speed(1000 * kMB, 20000 * kMB), {});
  EXPECT_NEAR(reading.decode_s, kLayers * kFfn / (1000 * kMB), 1e-3);
  EXPECT_EQ(reading.bound, "reading weights");
  const Forecast computing = Predict(layout, Config(), p, Speed(20000 * kMB, 1000 * kMB), {});
  EXPECT_NEAR(computing.decode_s, kUsed / (1000 * kMB), 1e-3);
  EXPECT_EQ(computing.bound, "computing");
}

TEST(Forecast, ARingOfOnePartOverlapsNothingOfIt) {
  const WeightLayout layout = Layout();
  const MachineSpeed speed = Speed(1000 * kMB, 1000 * kMB);
  const double read_s = kLayers * kFfn / (1000 * kMB);
  const double one = Predict(layout, Config(), FfnStreams(layout, kFfn), speed, {}).decode_s;
  const double two = Predict(layout, Config(), FfnStreams(layout, 2 * kFfn), speed, {}).decode_s;
  // While an FFN part is multiplied, nothing is read: both times add up. Between the last and the
  // first one stand the head and an attention part, longer than reading the next.
  EXPECT_NEAR(one, read_s + (kLayers * kFfn + kAttention) / (1000 * kMB), 1e-3);
  EXPECT_NEAR(two, kUsed / (1000 * kMB), 1e-3);
}

TEST(Forecast, SlowdownCountsOnlyWhileBothGoOn) {
  const WeightLayout layout = Layout();
  MachineSpeed speed = Speed(1000 * kMB, 20000 * kMB);
  speed.decode_slowdown = speed.read_slowdown = 2;
  const double decode_s =
      Predict(layout, Config(), FfnStreams(layout, 3 * kFfn), speed, {}).decode_s;
  // For twice the time of computing the disk is at half its speed.
  const double read_s = kLayers * kFfn / (1000 * kMB), compute_s = kUsed / (20000 * kMB);
  EXPECT_NEAR(decode_s, read_s + compute_s, 2e-3);
}

TEST(Forecast, ContextCosts) {
  const WeightLayout layout = Layout();
  Placement p = FfnStreams(layout, 0);
  p.tiers.assign(layout.units.size(), Tier::kResident);
  p.streamed_bytes = 0;
  MachineSpeed speed = Speed(1000 * kMB, 10000 * kMB);
  speed.kv_bytes_per_s = 5000 * kMB;
  Workload work;
  work.kv_bytes = 1000 * kMB;
  EXPECT_NEAR(Predict(layout, Config(), p, speed, work).decode_s, kUsed / (10000 * kMB) + 0.2,
              1e-6);
}

TEST(Forecast, APromptAttendsToItself) {
  const WeightLayout layout = Layout();
  Placement p = FfnStreams(layout, 0);
  p.tiers.assign(layout.units.size(), Tier::kResident);
  p.streamed_bytes = 0;
  MachineSpeed speed = Speed(1000 * kMB, 10000 * kMB);
  speed.prefill_kv_bytes_per_s = 4000 * kMB;
  Workload work;
  work.rows = 100;
  const double without = Predict(layout, Config(), p, speed, work).prefill_s;
  work.prefill_kv_bytes = 1000 * kMB;
  const Forecast with = Predict(layout, Config(), p, speed, work);
  EXPECT_NEAR(with.prefill_s - without, 0.25, 1e-9);
  EXPECT_NEAR(with.decode_s, kUsed / (10000 * kMB), 1e-6);
}

TEST(Forecast, ExpertsAreWaitedFor) {
  const WeightLayout layout = Layout(8);
  Placement p;
  for (const WeightUnit& u : layout.units) {
    p.tiers.push_back(u.kind == WeightUnit::Kind::kExpert ? Tier::kOnDemand : Tier::kResident);
  }
  p.demand_bytes = int64_t{kLayers} * 2 * kExpert;
  Workload work;
  work.rows = 64;
  const Forecast f = Predict(layout, Config(8), p, Speed(1000 * kMB, 10000 * kMB), work);
  const double compute_s = kLayers * (kAttention + 1000 + 2 * kExpert) + kFfn;
  EXPECT_NEAR(f.decode_s, compute_s / (10000 * kMB) + kLayers * 2 * kExpert / (1000 * kMB), 1e-6);
  // A chunk of a prompt chooses them all.
  EXPECT_GT(f.prefill_s, kLayers * 8.0 * kExpert / (1000 * kMB));
}

TEST(Forecast, AStageReadsOnWhileItWaits) {
  const WeightLayout layout = Layout();
  const Placement p = FfnStreams(layout, 3 * kFfn);
  const MachineSpeed speed = Speed(1000 * kMB, 20000 * kMB);
  Workload work;
  work.idle_s_before = 10;
  // The ring is full when its turn comes.
  EXPECT_NEAR(Predict(layout, Config(), p, speed, {}).decode_s -
                  Predict(layout, Config(), p, speed, work).decode_s,
              3 * kFfn / (1000 * kMB), 0.05);
}

}  // namespace
}  // namespace shoal
