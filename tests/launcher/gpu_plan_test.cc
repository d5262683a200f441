// What --device, -ngl and --gpu-speed say, and what is remembered of a GPU.
#include <cstdlib>

#include "gtest/gtest.h"
#include "launcher/device.h"
#include "launcher/machine_speed.h"
#include "tests/shard/temp_dir.h"

namespace shoal {
namespace {

TEST(GpuPlan, SpeedsAreThreeNumbers) {
  const auto speed = ParseGpuSpeed("1008,165.5,25");
  ASSERT_TRUE(speed.ok()) << speed.status();
  EXPECT_DOUBLE_EQ(speed->read_bytes_per_s, 1008e9);
  EXPECT_DOUBLE_EQ(speed->operations_per_s, 165.5e12);
  EXPECT_DOUBLE_EQ(speed->link_bytes_per_s, 25e9);
  for (const char* bad : {"", "1", "1,2", "1,2,3,4", "1,2,x", "1,,3", "0,2,3", "1,-2,3", "1,2,nan",
                          "1,2,inf", "1,2,1e30"}) {
    EXPECT_FALSE(ParseGpuSpeed(bad).ok()) << bad;
  }
}

TEST(GpuPlan, TheLastLayersAreAStageOfTheirOwn) {
  ShardRequest shard;
  EXPECT_EQ(KeepOnGpu(0, 4, shard), "cpu");
  EXPECT_EQ(KeepOnGpu(4, 4, shard), "cuda");
  EXPECT_EQ(KeepOnGpu(99, 4, shard), "cuda");
  EXPECT_EQ(shard.pp, 1);
  EXPECT_EQ(KeepOnGpu(3, 4, shard), "cpu,cuda");
  EXPECT_EQ(shard.pp, 2);
  EXPECT_EQ(shard.stage_layers, (std::vector<int>{1, 3}));
}

TEST(GpuPlan, ListsNameTheRanksOfAHostInTurn) {
  EXPECT_TRUE(WantsGpu("cuda", 5, false));
  EXPECT_FALSE(WantsGpu("cpu", 0, true));
  EXPECT_TRUE(WantsGpu("cpu,cuda:1", 1, false));
  EXPECT_FALSE(WantsGpu("cpu,cuda:1", 2, true));
  EXPECT_TRUE(WantsGpu("auto", 0, true));
  EXPECT_FALSE(WantsGpu("auto", 0, false));
}

TEST(GpuPlan, AGpuIsMeasuredOnce) {
  const TempDir temp;
  setenv("XDG_CACHE_HOME", temp.File("cache").c_str(), 1);
  int measured = 0;
  const auto measure = [&measured]() -> absl::StatusOr<DeviceSpeed> {
    ++measured;
    return DeviceSpeed{1e12 + measured, 2e14, 3e10};
  };
  const auto first = *MeasureDevice("a card", false, measure);
  EXPECT_EQ(first.speed.read_bytes_per_s, 1e12 + 1);
  const auto again = *MeasureDevice("a card", false, measure);
  EXPECT_EQ(measured, 1);
  EXPECT_EQ(again.speed.read_bytes_per_s, 1e12 + 1);
  EXPECT_EQ(again.speed.operations_per_s, 2e14);
  EXPECT_EQ(again.speed.link_bytes_per_s, 3e10);
  EXPECT_EQ(again.date, first.date);
  EXPECT_EQ(MeasureDevice("another card", false, measure)->speed.read_bytes_per_s, 1e12 + 2);
  EXPECT_EQ(MeasureDevice("a card", true, measure)->speed.read_bytes_per_s, 1e12 + 3);
  const auto failed = MeasureDevice("no card", false, []() -> absl::StatusOr<DeviceSpeed> {
    return absl::UnavailableError("no driver");
  });
  EXPECT_EQ(failed.status().message(), "no driver");
  unsetenv("XDG_CACHE_HOME");
}

}  // namespace
}  // namespace shoal
