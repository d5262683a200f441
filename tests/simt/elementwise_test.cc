// Row operations of kernels/cuda on the CPU stand-in, against the CPU's.
#include <gtest/gtest.h>

#include <cmath>
#include <set>
#include <vector>

#include "../kernels/random_matrix.h"
#include "kernels/cpu/elementwise.h"
#include "kernels/cuda/ops.h"
#include "simt/runner.h"

namespace shoal::cuda {
namespace {

std::vector<float> Gaussian(int64_t n, uint32_t seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> gauss(0, 2);
  std::vector<float> x(n);
  for (float& v : x) v = gauss(rng);
  return x;
}

class CudaRows : public testing::Test {
 protected:
  std::unique_ptr<ThreadPool> pool_ = ThreadPool::Create({.threads = 1, .pin = false}).value();
};

TEST_F(CudaRows, Norm) {
  int seed = 0;
  for (const NormKind kind : {NormKind::kRms, NormKind::kLayer}) {
    for (const int cols : {1, 31, 256, 1000, 4096}) {
      simt::SetSeed(seed++);
      constexpr int kRows = 3;
      const int64_t stride = cols + 3, out_stride = cols + 1;
      const auto x = Gaussian(kRows * stride, cols), weight = Gaussian(cols, 1);
      std::vector<float> out(kRows * out_stride, NAN), expected = out;
      LinearInput input = LinearInput::Norm(kind, x.data(), stride, weight.data(), 1e-5f);
      input.scale = 0.75f;
      const std::vector<float> row_scale = {0.5f, 1, 3};
      input.row_scale = row_scale.data();
      Norm(input, kRows, cols, out.data(), out_stride, nullptr);
      NormRows(pool_.get(), input, kRows, cols, expected.data(), out_stride);
      for (int64_t i = 0; i < kRows * out_stride; ++i) {
        if (i % out_stride == cols) {
          ASSERT_TRUE(std::isnan(out[i]));
          continue;
        }
        // A sum of `cols` squares is good to that many roundings, its root to half of them; so is a
        // mean, of values that are some deviations at most.
        const float relative = (static_cast<float>(cols) + 8) * 0x1p-24f;
        const float mean = kind == NormKind::kLayer ? std::fabs(weight[i % out_stride]) : 0;
        ASSERT_NEAR(out[i], expected[i], relative * (std::fabs(expected[i]) + mean)) << i;
      }
    }
  }
}

TEST_F(CudaRows, SumSquares) {
  constexpr int kRows = 5, kStride = 2000;
  const auto x = Gaussian(kRows * kStride, 1);
  for (const auto& [split, end] : {std::pair{700, 1990}, {1, 1}, {33, 40}}) {
    const ColumnRun runs[2] = {{0, split}, {split, end}};
    std::vector<float> out(2 * kRows, NAN), expected = out;
    SumSquares(x.data(), kStride, runs, kRows, out.data(), nullptr);
    SumRowSquares(pool_.get(), x.data(), kStride, runs, kRows, expected.data());
    for (int i = 0; i < 2 * kRows; ++i) {
      double sum = 0;
      for (int c = runs[i % 2].begin; c < runs[i % 2].end; ++c) {
        sum += std::pow(double{x[i / 2 * kStride + c]}, 2);
      }
      ASSERT_NEAR(expected[i], sum, 2000 * 0x1p-24 * sum);
      ASSERT_NEAR(out[i], sum, 2000 * 0x1p-24 * sum);
    }
  }
}

TEST_F(CudaRows, Add) {
  constexpr int kRows = 3, kCols = 700;
  const auto x = Gaussian(kRows * 704, 1), y = Gaussian(kRows * 701, 2);
  std::vector<float> out = x, expected = x;
  Add(out.data(), 704, y.data(), 701, kRows, kCols, nullptr);
  AddRows(pool_.get(), expected.data(), 704, y.data(), 701, kRows, kCols);
  EXPECT_EQ(out, expected);
}

TEST_F(CudaRows, EmbedReadsEveryType) {
  for (int type = 0; type < kNumDTypes; ++type) {
    const DType dtype = static_cast<DType>(type);
    const bool blocks = Info(dtype).block_elems > 1;
    // Slices that begin and end inside a super-block, and an odd number of columns for floats.
    for (const int64_t begin : {int64_t{0}, int64_t{blocks ? 96 : 5}}) {
      const RandomMatrix table(dtype, 37, blocks ? 736 : 301, begin, type);
      const int64_t cols = table.packed.shape.cols;
      const std::vector<int32_t> ids = {0, -1, 36, 15, 16, 31, -1};
      std::vector<float> out(ids.size() * cols, NAN);
      Embed(table.packed, ids.data(), static_cast<int>(ids.size()), 3, out.data(), nullptr);
      for (size_t i = 0; i < ids.size(); ++i) {
        for (int64_t c = 0; c < cols; ++c) {
          const float expected = ids[i] < 0 ? 0 : 3 * table.values[ids[i] * cols + c];
          // Where a scale and a minimum are added, the sum may be fused.
          ASSERT_NEAR(out[i * cols + c], expected, 1e-6f * std::fabs(expected) + 1e-6f)
              << Info(dtype).name << " row " << ids[i] << " column " << c;
        }
      }
    }
  }
}

TEST_F(CudaRows, RouteChoosesAsTheCpu) {
  std::mt19937 rng(3);
  for (int i = 0; i < 12; ++i) {
    simt::SetSeed(i);
    constexpr int kRows = 11;
    const int experts = 1 + static_cast<int>(rng() % 130);
    const int used = 1 + static_cast<int>(rng() % std::min(experts, 10));
    std::vector<float> logits = Gaussian(int64_t{kRows} * experts, i);
    for (float& x : logits) x = std::round(x * 2) / 2;  // many ties
    RouterArgs args{logits.data(), experts, used, i % 2 == 0, i % 3 == 0, 2.5f};
    const std::vector<float> bias = Gaussian(experts, 100 + i);
    args.sigmoid = i % 4 >= 2;
    if (i % 4 == 3) args.choice_bias = bias.data();
    std::vector<int32_t> ids(kRows * used), expected_ids(kRows * used);
    std::vector<float> weights(kRows * used), expected(kRows * used);
    Route(args, kRows, nullptr, ids.data(), weights.data(), nullptr);
    RouteRows(pool_.get(), args, kRows, expected_ids.data(), expected.data());
    ASSERT_EQ(ids, expected_ids);
    for (int j = 0; j < kRows * used; ++j) {
      ASSERT_NEAR(weights[j], expected[j], (experts + 8) * 0x1p-23f * expected[j]) << j;
    }
  }
}

TEST_F(CudaRows, RouteKeepsToTheBestGroups) {
  std::mt19937 rng(4);
  for (int i = 0; i < 12; ++i) {
    simt::SetSeed(i);
    constexpr int kRows = 11;
    const int size = 2 + static_cast<int>(rng() % 9);
    RouterArgs args;
    args.sigmoid = true;
    args.groups = i == 0 ? kMaxExpertGroups : 2 + static_cast<int>(rng() % 7);
    args.groups_used = 1 + static_cast<int>(rng() % args.groups);
    args.experts = args.groups * size;
    args.used = 1 + static_cast<int>(rng() % std::min(args.groups_used * size, 10));
    std::vector<float> logits = Gaussian(int64_t{kRows} * args.experts, i);
    for (float& x : logits) x = std::round(x * 2) / 2;  // many ties
    args.logits = logits.data();
    const std::vector<float> bias = Gaussian(args.experts, 100 + i);
    if (i % 2 == 1) args.choice_bias = bias.data();
    std::vector<int32_t> ids(kRows * args.used), expected_ids(kRows * args.used);
    std::vector<float> weights(kRows * args.used), expected(kRows * args.used);
    Route(args, kRows, nullptr, ids.data(), weights.data(), nullptr);
    RouteRows(pool_.get(), args, kRows, expected_ids.data(), expected.data());
    ASSERT_EQ(ids, expected_ids);
    for (int row = 0; row < kRows; ++row) {
      std::set<int> groups;
      for (int j = 0; j < args.used; ++j) groups.insert(ids[row * args.used + j] / size);
      ASSERT_LE(groups.size(), args.groups_used);
    }
  }
}

TEST_F(CudaRows, RouteGivesExpertsEvenWithoutNumbers) {
  const std::vector<float> logits(9, NAN);
  const RouterArgs args{logits.data(), 9, 3, true, true, 1};
  std::vector<int32_t> ids(3, -1);
  std::vector<float> weights(3);
  Route(args, 1, nullptr, ids.data(), weights.data(), nullptr);
  EXPECT_EQ(ids, (std::vector<int32_t>{0, 1, 2}));
}

TEST_F(CudaRows, RouteGivesRowsThatFillAStepNoExperts) {
  const std::vector<float> logits = {1, 3, 2, 6, 5, 4};
  const RouterArgs args{logits.data(), 3, 2, true, true, 1};
  const std::vector<RowPlace> places = {{-1, 0}, {7, 0}};
  std::vector<int32_t> ids(4, 9);
  std::vector<float> weights(4, NAN);
  Route(args, 2, places.data(), ids.data(), weights.data(), nullptr);
  EXPECT_EQ(ids, (std::vector<int32_t>{-1, -1, 0, 1}));
  EXPECT_EQ(weights[0], 0);
  EXPECT_EQ(weights[1], 0);
  EXPECT_FLOAT_EQ(weights[2] + weights[3], 1);
}

}  // namespace
}  // namespace shoal::cuda
