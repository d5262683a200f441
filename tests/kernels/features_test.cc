// Levels of this CPU: names, the choice among them, and what is refused.
#include "kernels/cpu/features.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <string>

namespace shoal {
namespace {

// The emulated CPUs of an aarch64 build say which levels each must be found to have.
TEST(CpuFeatures, AreThoseOfTheCpu) {
  const char* expected = std::getenv("SHOAL_EXPECT_LEVELS");
  if (expected == nullptr) GTEST_SKIP() << "nobody said what this CPU has";
  EXPECT_EQ(CpuLevelNames(DetectCpuFeatures()), expected);
}

TEST(CpuFeatures, TheBestLevelIsTheLastNamed) {
  const std::string names = CpuLevelNames(DetectCpuFeatures());
  EXPECT_THAT(names, testing::StartsWith("scalar"));
  unsetenv("SHOAL_CPU");
  const auto best = ChooseCpuLevel("");
  ASSERT_TRUE(best.ok()) << best.status();
  EXPECT_THAT(names, testing::EndsWith(CpuLevelName(*best)));
}

TEST(CpuFeatures, EveryNameIsTakenOrRefusedWithTheLevelsThereAre) {
  const CpuFeatures features = DetectCpuFeatures();
  for (int i = 0; i < kNumCpuLevels; ++i) {
    const CpuLevel level = static_cast<CpuLevel>(i);
    const std::string name = CpuLevelName(level);
    setenv("SHOAL_CPU", name.c_str(), 1);
    const auto chosen = ChooseCpuLevel("");
    if (features.Has(level)) {
      ASSERT_TRUE(chosen.ok()) << chosen.status();
      EXPECT_EQ(*chosen, level);
      continue;
    }
    EXPECT_EQ(chosen.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(chosen.status().message(),
              "SHOAL_CPU: this machine has no " + name + "; it has: " + CpuLevelNames(features));
  }
  unsetenv("SHOAL_CPU");
}

}  // namespace
}  // namespace shoal
