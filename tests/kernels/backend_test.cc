#include "kernels/backend.h"

#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/features.h"

namespace shoal {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

std::unique_ptr<Backend> MakeBackend(int threads, const std::string& level = "") {
  return MakeCpuBackend({.threads = threads, .level = level, .pin = false}).value();
}

Backend::Limits SmallLimits() {
  return {.rows = 700,
          .cols = 64,
          .out_rows = 64,
          .heads = 4,
          .head_dim = 16,
          .context = 128,
          .experts_used = 4,
          .expert_cols = 64};
}

// [rows, cols] in F32, packed.
std::vector<uint8_t> Pack(const PackedShape& shape, const std::vector<float>& x) {
  std::vector<uint8_t> packed(shape.bytes());
  for (int64_t panel = 0; panel < shape.panels(); ++panel) {
    const uint8_t* src[kPanelRows];
    for (int r = 0; r < kPanelRows; ++r) {
      const int64_t row = panel * kPanelRows + r;
      src[r] = row < shape.rows ? reinterpret_cast<const uint8_t*>(&x[row * shape.cols]) : nullptr;
    }
    PackPanel(shape, src, packed.data() + panel * shape.panel_bytes());
  }
  return packed;
}

TEST(MakeCpuBackend, EveryLevelOfThisMachineCanBeForcedAndDescribesItself) {
  const CpuFeatures features = DetectCpuFeatures();
  for (int i = 0; i < kNumCpuLevels; ++i) {
    const CpuLevel level = static_cast<CpuLevel>(i);
    const auto backend = MakeCpuBackend({.threads = 2, .level = CpuLevelName(level), .pin = false});
    EXPECT_EQ(backend.ok(), features.Has(level)) << backend.status();
    if (backend.ok()) {
      EXPECT_THAT((*backend)->Describe(), HasSubstr(CpuLevelName(level)));
      EXPECT_THAT((*backend)->Describe(), HasSubstr("2 threads"));
    } else {
      EXPECT_THAT(std::string(backend.status().message()), HasSubstr("it has: scalar"));
    }
  }
}

TEST(MakeCpuBackend, AnUnknownLevelNamesTheOnesThereAre) {
  const auto backend = MakeCpuBackend({.threads = 1, .level = "sse9"});
  ASSERT_EQ(backend.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(backend.status().message()), HasSubstr("this machine has: scalar"));
}

TEST(MakeCpuBackend, TheEnvironmentChoosesWhenTheOptionsDoNot) {
  const char* before = std::getenv("SHOAL_CPU");
  const std::string saved = before == nullptr ? "" : before;
  setenv("SHOAL_CPU", "scalar", 1);
  EXPECT_THAT(MakeBackend(1)->Describe(), HasSubstr("scalar"));
  setenv("SHOAL_CPU", "fast", 1);
  EXPECT_THAT(std::string(MakeCpuBackend({.threads = 1, .level = ""}).status().message()),
              HasSubstr("SHOAL_CPU: unknown CPU level \"fast\""));
  if (before == nullptr) {
    unsetenv("SHOAL_CPU");
  } else {
    setenv("SHOAL_CPU", saved.c_str(), 1);
  }
}

TEST(CpuBackend, EmbedsRowsAndLeavesZerosForOtherRanksRows) {
  const PackedShape shape = MakePackedShape(DType::kF32, 20, 0, 6);
  std::vector<float> table(20 * 6);
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<float>(i);
  const std::vector<uint8_t> packed = Pack(shape, table);
  const std::vector<int32_t> ids = {19, -1, 0};
  std::vector<float> out(3 * 6, -7);
  MakeBackend(2)->Embed({shape, packed.data()}, ids, 3, out.data());
  for (int c = 0; c < 6; ++c) {
    EXPECT_EQ(out[c], 3 * table[19 * 6 + c]);
    EXPECT_EQ(out[6 + c], 0);
    EXPECT_EQ(out[12 + c], 3 * table[c]);
  }
}

TEST(CpuBackend, NormsDivideByTheRootOfTheMeanSquare) {
  constexpr int kRows = 700, kCols = 67,
                kStride = 70;  // enough rows to use all threads, an odd tail
  std::mt19937 rng(3);
  std::normal_distribution<float> normal;
  std::vector<float> x(kRows * kStride), weight(kCols);
  for (float& v : x) v = normal(rng);
  for (float& v : weight) v = normal(rng);
  for (const NormKind kind : {NormKind::kRms, NormKind::kLayer}) {
    LinearInput input = LinearInput::Norm(kind, x.data(), kStride, weight.data(), 1e-5f);
    input.scale = 0.75f;
    std::vector<float> one(kRows * kCols), three(kRows * kCols);
    MakeBackend(1)->Norm(input, kRows, kCols, one.data(), kCols);
    MakeBackend(3)->Norm(input, kRows, kCols, three.data(), kCols);
    EXPECT_EQ(one, three);
    for (int r = 0; r < kRows; ++r) {
      const float* row = &x[r * kStride];
      double mean = 0, squares = 0;
      for (int c = 0; c < kCols && kind == NormKind::kLayer; ++c) mean += row[c] / double{kCols};
      for (int c = 0; c < kCols; ++c) squares += std::pow(row[c] - mean, 2);
      const double inverse = 1 / std::sqrt(squares / kCols + 1e-5);
      for (int c = 0; c < kCols; ++c) {
        const double factor = 0.75 * inverse * weight[c];
        // Sums of 67 squares, a root, a quotient and three products, in float; and a mean of values
        // of about 1.
        const double size = std::fabs(row[c]) + (kind == NormKind::kLayer ? 1 : 0);
        ASSERT_NEAR(one[r * kCols + c], (row[c] - mean) * factor,
                    12 * 0x1p-24 * std::fabs(factor) * size)
            << r << " " << c;
      }
    }
  }
}

TEST(CpuBackend, AddAddsWhatLiesInTheRowsOnly) {
  std::vector<float> x = {1, 2, 100, 3, 4, 100}, y = {10, 20, 30, 40};
  MakeBackend(2)->Add(x.data(), 3, y.data(), 2, 2, 2);
  EXPECT_THAT(x, ElementsAre(11, 22, 100, 33, 44, 100));
}

class Routing : public testing::Test {
 protected:
  // Softmax of {0, ln 2, ln 4, ln 1} is {1, 2, 4, 1} / 8.
  void Route(bool softmax_all, bool renormalize, float scale) {
    const float logits[] = {0, std::log(2.0f), std::log(4.0f), 0};
    auto backend = MakeBackend(1);
    ASSERT_TRUE(backend->Reserve(SmallLimits()).ok());
    backend->Route({logits, 4, 3, softmax_all, renormalize, scale}, 1, ids_, weights_);
    EXPECT_THAT(ids_, ElementsAre(2, 1, 0));  // the lower id first among equals
  }
  int32_t ids_[3];
  float weights_[3];
};

TEST_F(Routing, SoftmaxOverAllKeepsTheSharesOfTheUnchosen) {
  Route(true, false, 1);
  EXPECT_THAT(weights_, ElementsAre(testing::FloatEq(4 / 8.0f), testing::FloatEq(2 / 8.0f),
                                    testing::FloatEq(1 / 8.0f)));
}

TEST_F(Routing, RenormalizedWeightsSumToTheScale) {
  Route(true, true, 2.5);
  EXPECT_THAT(weights_, ElementsAre(testing::FloatEq(10 / 7.0f), testing::FloatEq(5 / 7.0f),
                                    testing::FloatEq(2.5f / 7)));
}

TEST_F(Routing, SoftmaxOverTheChosenIsTheSameAsRenormalizing) {
  Route(false, false, 1);
  EXPECT_THAT(weights_, ElementsAre(testing::FloatEq(4 / 7.0f), testing::FloatEq(2 / 7.0f),
                                    testing::FloatEq(1 / 7.0f)));
}

TEST(CpuBackend, AWorkspaceThatDoesNotFitIsRefusedWithItsSize) {
  Backend::Limits limits = SmallLimits();
  limits.context = std::numeric_limits<int>::max() - 1000;
  limits.heads = 100000;
  auto backend = MakeBackend(1);
  EXPECT_GT(backend->WorkspaceBytes(limits), int64_t{1} << 40);
  EXPECT_EQ(backend->Reserve(limits).code(), absl::StatusCode::kResourceExhausted);
}

TEST(CpuBackendDeathTest, OpsRefuseWhatIsBeyondTheLimits) {
  auto backend = MakeBackend(1);
  ASSERT_TRUE(backend->Reserve(SmallLimits()).ok());
  std::vector<float> x(1000 * 64);
  EXPECT_DEATH(backend->Linear(LinearInput::Plain(x.data(), 64), 64, {0, 701}, {}),
               "more rows than Limits");
  EXPECT_DEATH(backend->Linear(LinearInput::Plain(x.data(), 96), 96, {1, 0}, {}),
               "more columns than Limits");
}

}  // namespace
}  // namespace shoal
