// Levels of this CPU: names, the choice among them, and what is refused.
#include "kernels/cpu/features.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <initializer_list>
#include <iterator>
#include <set>
#include <sstream>
#include <string>

namespace shoal {
namespace {

// The levels that the kernel's words for this CPU promise.
std::string LevelsOfProcCpuinfo() {
  std::ifstream file("/proc/cpuinfo");
  std::set<std::string> words;
  for (std::string line; words.empty() && std::getline(file, line);) {
    if (line.rfind("flags", 0) != 0 && line.rfind("Features", 0) != 0) continue;
    std::istringstream stream(line);
    words.insert(std::istream_iterator<std::string>(stream), {});
  }
  const auto has = [&](std::initializer_list<const char*> all) {
    return std::all_of(all.begin(), all.end(), [&](const char* w) { return words.count(w) > 0; });
  };
  CpuFeatures f;
  f.avx2 = has({"avx2", "fma", "f16c"});
  f.avxvnni = f.avx2 && has({"avx_vnni"});
  f.avx512 = f.avx2 && has({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"});
  f.amx = f.avx512 && has({"avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"});
  f.neon = has({"asimddp"});
  f.i8mm = f.neon && has({"i8mm"});
  return CpuLevelNames(f);
}

// An emulator passes the host's /proc/cpuinfo on, so for its CPUs the build says what must be
// found.
TEST(CpuFeatures, AreThoseOfTheCpu) {
  const char* emulated = std::getenv("SHOAL_EXPECT_LEVELS");
  EXPECT_EQ(CpuLevelNames(DetectCpuFeatures()),
            emulated != nullptr ? emulated : LevelsOfProcCpuinfo());
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
