// The ring of a device's weights against a device whose two orders, ops and copies, advance in any
// way that the fences allow: every op must see the bytes of its unit.
#include "offload/device_weights.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <vector>

#include "tests/offload/late_device.h"

namespace shoal {
namespace {

// Unit u is full of the byte u + 1; a unit's memory is spoilt when it is released, unless it is
// constant.
class HostUnits final : public WeightSource {
 public:
  HostUnits(std::vector<int64_t> bytes, bool constant) : constant_(constant) {
    for (size_t i = 0; i < bytes.size(); ++i) units_.emplace_back(bytes[i] + 4096, i + 1);
  }
  absl::StatusOr<const uint8_t*> Acquire(int unit) override {
    if (unit == fail) return absl::DataLossError("the disk is broken");
    std::fill(units_[unit].begin(), units_[unit].end(), unit + 1);
    return units_[unit].data();
  }
  void Release(int unit) override {
    if (!constant_) std::fill(units_[unit].begin(), units_[unit].end(), 0xEE);
  }
  int fail = -1;

 private:
  const bool constant_;
  std::vector<std::vector<uint8_t>> units_;
};

using Place = DeviceUnit::Place;

struct Rig {
  Rig(int seed, bool constant, bool may_pin, int slots) : device(seed), backend(device) {
    device.may_pin = may_pin;
    DeviceWeightsOptions o;
    o.units = {{Place::kResident, 5000}, {Place::kStreamed, 9000}, {Place::kStreamed, 20000},
               {Place::kResident, 64},   {Place::kOnDemand, 3000}, {Place::kOnDemand, 3000},
               {Place::kOnDemand, 2000}, {Place::kStreamed, 100},  {Place::kStreamed, 20480}};
    o.cycle = {1, 2, 7, 8};
    o.ring_slots = slots;
    o.expert_slots = 2;
    o.host_is_constant = constant;
    units = o.units;
    std::vector<int64_t> bytes;
    for (const DeviceUnit& u : units) bytes.push_back(u.bytes);
    HostUnits loader(bytes, false);
    auto source = std::make_unique<HostUnits>(bytes, constant);
    host = source.get();
    auto made = DeviceWeights::Create(backend, loader, std::move(source), o);
    EXPECT_TRUE(made.ok()) << made.status();
    weights = *std::move(made);
  }
  // One op that reads the unit, at some time.
  void Use(int unit) {
    const absl::StatusOr<const uint8_t*> at = weights->Acquire(unit);
    ASSERT_TRUE(at.ok()) << at.status();
    device.Op([this, unit, p = *at] {
      for (int64_t i = 0; i < units[unit].bytes; ++i) {
        ASSERT_EQ(p[i], unit + 1) << "unit " << unit << ", byte " << i;
      }
      ++reads;
    });
    weights->Release(unit);
  }

  LateDevice device;
  LateBackend backend;
  std::vector<DeviceUnit> units;
  HostUnits* host = nullptr;
  std::unique_ptr<DeviceWeights> weights;
  int reads = 0;
};

TEST(DeviceWeights, EveryOpSeesItsUnitInAnyOrderThatFencesAllow) {
  for (int seed = 0; seed < 60; ++seed) {
    Rig rig(seed, /*constant=*/seed % 2 == 0, /*may_pin=*/seed % 3 != 0, /*slots=*/1 + seed % 4);
    int uses = 0;
    for (int pass = 0; pass < 4; ++pass) {
      for (const int unit : {0, 1, 3, 2, 4, 6, 5, 7, 8}) {
        if (unit == 8 && pass == 2) continue;  // a chunk of a prompt that needs no head
        rig.Use(unit);
        ++uses;
      }
    }
    rig.device.Finish();
    EXPECT_EQ(rig.reads, uses);
    if (HasFailure()) FAIL() << "seed " << seed;
  }
}

TEST(DeviceWeights, ConstantHostMemoryIsPinnedOncePerUnit) {
  Rig rig(1, true, true, 3);
  for (int pass = 0; pass < 3; ++pass) {
    for (const int unit : {1, 2, 7, 8, 4}) rig.Use(unit);
  }
  EXPECT_EQ(rig.device.pins, 5);
  Rig moving(1, false, true, 3);
  for (const int unit : {1, 2, 7, 8}) moving.Use(unit);
  EXPECT_EQ(moving.device.pins, 0);
}

TEST(DeviceWeights, ExpertsInTheirSlotsAreNotCopiedAgain) {
  Rig rig(2, true, true, 2);
  rig.weights->Prefetch({4, 5});
  rig.Use(4);
  rig.Use(5);
  EXPECT_EQ(rig.weights->bytes_streamed(), 6000);
  rig.Use(4);
  EXPECT_EQ(rig.weights->bytes_streamed(), 6000);
  rig.Use(6);  // in the place of 5, which was used before 4
  rig.Use(4);
  EXPECT_EQ(rig.weights->bytes_streamed(), 8000);
}

TEST(DeviceWeights, AnErrorOfTheHostIsSaidAndTheUnitCanBeAskedForAgain) {
  Rig rig(3, false, false, 1);
  rig.host->fail = 2;
  rig.Use(1);
  EXPECT_EQ(rig.weights->Acquire(2).status().code(), absl::StatusCode::kDataLoss);
  rig.host->fail = -1;
  rig.Use(2);
  EXPECT_EQ(rig.weights->Acquire(1).ok(), true);
  EXPECT_EQ(rig.weights->Acquire(2).status().code(), absl::StatusCode::kResourceExhausted);
  rig.weights->Release(1);
  rig.device.Finish();
}

}  // namespace
}  // namespace shoal
