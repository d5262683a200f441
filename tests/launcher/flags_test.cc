#include "launcher/flags.h"

#include <cstdio>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "launcher/exit_code.h"
#include "launcher/session.h"
#include "offload/memory_budget.h"

namespace shoal {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

constexpr int64_t kTib = int64_t{1} << 40;

TEST(RankMemoryLimit, NeverMoreThanIsFree) {
  const auto free = ReadFreeMemory();
  ASSERT_TRUE(free.ok()) << free.status();
  ASSERT_LT(free->available, 500 * kTib);
  // What is free changes between the two readings, but not by terabytes.
  EXPECT_LT(*RankMemoryLimit("1000T", 1, 1), free->available + kTib);
  EXPECT_GT(*RankMemoryLimit("1000T", 1, 1, /*hypothetical=*/true), 900 * kTib);
}

TEST(RankMemoryLimit, LessThanIsFreeIsKept) {
  const int64_t alone = *RankMemoryLimit("600M", 1, 1);
  EXPECT_LE(alone, 600'000'000);
  EXPECT_GT(alone, 300'000'000);
  EXPECT_LT(*RankMemoryLimit("600M", 2, 1), alone);
}

TEST(ToEngineOptions, LayersOfStages) {
  ModelFlags flags;
  flags.pp = 2;
  flags.stage_layers = "20,12";
  EXPECT_EQ(ToEngineOptions(flags)->shard.stage_layers, (std::vector<int>{20, 12}));
  for (const char* bad : {"20", "20,12,1", "20,x", "20,0", "20,-1"}) {
    flags.stage_layers = bad;
    const absl::Status status = ToEngineOptions(flags).status();
    EXPECT_EQ(ExitCodeOf(status), kExitUsage) << bad;
    EXPECT_THAT(std::string(status.message()), HasSubstr(std::string("--pp-layers ") + bad));
  }
}

TEST(ToEngineOptions, SplitAutoIsLeftToTheRanks) {
  ModelFlags flags;
  flags.tp = 2;
  flags.split = "auto";
  ASSERT_TRUE(ToEngineOptions(flags).ok());
  EXPECT_TRUE(ToEngineOptions(flags)->shard.split.empty());
}

TEST(ToEngineOptions, GpuLayersAreForOneProcess) {
  ModelFlags flags;
  flags.gpu_layers = 3;
  EXPECT_TRUE(ToEngineOptions(flags).ok());
  flags.pp = 2;
  EXPECT_EQ(ExitCodeOf(ToEngineOptions(flags).status()), kExitUsage);
  flags.pp = 1;
  flags.device = "cuda";
  EXPECT_THAT(std::string(ToEngineOptions(flags).status().message()), HasSubstr("-ngl 3"));
}

TEST(FormatReports, PointsFromAGgufToShards) {
  RankReport report;
  report.read_bytes = 1000;
  snprintf(report.reader, sizeof report.reader, "repacked from the checkpoint");
  EXPECT_THAT(FormatReports({report}), HasSubstr("shoal shard"));
  snprintf(report.reader, sizeof report.reader, "io_uring");
  EXPECT_THAT(FormatReports({report}), Not(HasSubstr("shoal shard")));
}

}  // namespace
}  // namespace shoal
