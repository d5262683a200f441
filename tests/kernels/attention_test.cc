#include "kernels/cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "attention_problem.h"
#include "gtest/gtest.h"

namespace shoal {
namespace {

std::vector<CpuLevel> LevelsHere() {
  std::vector<CpuLevel> levels;
  const CpuFeatures features = DetectCpuFeatures();
  for (int i = 0; i < kNumCpuLevels; ++i) {
    const CpuLevel level = static_cast<CpuLevel>(i);
    // Attention has nothing to gain from AVX-VNNI and I8MM: those levels use the kernels of AVX2
    // and NEON.
    const bool own = level != CpuLevel::kAvxVnni && level != CpuLevel::kI8mm;
    if (features.Has(level) && own) levels.push_back(level);
  }
  return levels;
}

Backend::Limits LimitsFor(const AttentionCase& shape, int rows, int context) {
  return {.rows = rows,
          .cols = 1,
          .out_rows = 1,
          .heads = shape.attention.q_heads,
          .head_dim = shape.attention.head_dim,
          .context = context};
}

std::vector<float> Attend(const AttentionProblem& p, CpuLevel level, int threads,
                          absl::Span<const Segment> part) {
  auto pool = ThreadPool::Create({.threads = threads, .pin = false}).value();
  AttentionEngine engine(level, pool.get());
  EXPECT_TRUE(engine.Reserve(LimitsFor(p.shape, p.rows, p.context)).ok());
  std::vector<float> out(p.rows * p.stride, std::numeric_limits<float>::quiet_NaN());
  engine.Run(p.q.data(), p.stride, p.shape.attention, p.cache.layer(), part, out.data(), p.stride);
  return out;
}
std::vector<float> Attend(const AttentionProblem& p, CpuLevel level, int threads) {
  return Attend(p, level, threads, p.segments);
}

void CheckAll(const AttentionProblem& p, const std::vector<float>& out, CpuLevel level) {
  CheckAttention(p, out, [&](const Segment& s) -> AttentionPrecision {
    const bool tiles = level == CpuLevel::kAmx && !s.decode && p.shape.kv.type != KvType::kF32;
    // Two bf16 numbers for q, k and v, the product of the low parts left out; one for p: see
    // attention_kernels.h.
    return tiles ? AttentionPrecision{0x1p-15, 0x1p-9, 0x1p-14} : AttentionPrecision{};
  });
}

class AttentionAt : public testing::TestWithParam<CpuLevel> {};
INSTANTIATE_TEST_SUITE_P(Levels, AttentionAt, testing::ValuesIn(LevelsHere()),
                         [](const auto& level) { return CpuLevelName(level.param); });

TEST_P(AttentionAt, AgreesWithTheTextbookOverShapesWindowsGroupingsAndSinks) {
  std::mt19937 rng(11);
  const int head_dims[] = {2, 8, 14, 32, 64, 72, 80, 96, 128, 256};
  const int groups[] = {1, 2, 3, 4, 5, 7, 8, 12, 16, 20};
  for (int i = 0; i < 40; ++i) {
    const KvType type = static_cast<KvType>(i % 3);
    const int group = groups[rng() % 10];
    const int q_heads = 1 + rng() % (2 * group);
    const int window = rng() % 2 == 0 ? 0 : 1 + rng() % 300;
    AttentionCase shape =
        MakeAttentionCase(type, head_dims[i % 10], q_heads, group, window, rng() % (3 * group));
    shape.attention.chunked = i % 3 == 0;
    AttentionProblem p(
        shape,
        {{static_cast<int>(rng() % 600), 1, true},
         {static_cast<int>(rng() % 40), 1 + static_cast<int>(rng() % 70), false},
         {0, 1, true},
         {250 + static_cast<int>(rng() % 20), 1 + static_cast<int>(rng() % 20), false}},
        i);
    SCOPED_TRACE(testing::Message()
                 << KvTypeName(type) << " head_dim " << shape.attention.head_dim << " q_heads "
                 << q_heads << " from " << shape.attention.q_head_begin << " group " << group
                 << " window " << window);
    if (i % 4 == 1) p.AddSinks();
    CheckAll(p, Attend(p, GetParam(), 2), GetParam());
    if (HasFatalFailure()) return;
  }
}

TEST_P(AttentionAt, DecodeRowsAreBitIdenticalWhateverTheThreadsAndNeighbours) {
  for (const KvType type : {KvType::kF32, KvType::kF16, KvType::kQ8_0}) {
    for (const int group : {1, 4, 7}) {
      AttentionProblem p(MakeAttentionCase(type, 64, 2 * group, group),
                         {{700, 1, true}, {3, 1, true}, {255, 2, true}, {100, 9, false}}, 5);
      if (group == 4) p.AddSinks();
      const std::vector<float> one = Attend(p, GetParam(), 1);   // walks
      const std::vector<float> many = Attend(p, GetParam(), 9);  // splits by runs
      const int width = 2 * group * 64;
      for (const Segment& s : p.segments) {
        const std::vector<float> alone = Attend(p, GetParam(), 3, {&s, 1});
        for (int r = s.row; r < s.row + s.rows; ++r) {
          const float* expected = one.data() + r * p.stride;
          EXPECT_TRUE(std::equal(expected, expected + width, many.data() + r * p.stride)) << r;
          EXPECT_TRUE(std::equal(expected, expected + width, alone.data() + r * p.stride)) << r;
        }
      }
    }
  }
}

// Items of several KV heads: a long row, split by runs, and many rows that walk. The slice of heads
// starts inside a group.
TEST_P(AttentionAt, KvHeadsThatShareAnItemGetWhatTheyGetAlone) {
  for (const KvType type : {KvType::kF32, KvType::kF16, KvType::kQ8_0}) {
    for (const int window : {0, 600}) {
      const AttentionCase shape = MakeAttentionCase(type, 32, 23, 2, window, 1);
      const AttentionProblem p(shape, {{1500, 1, true}, {690, 9, true}}, 6);
      const std::vector<float> together = Attend(p, GetParam(), 2);
      CheckAll(p, together, GetParam());
      const std::vector<float> long_row = Attend(p, GetParam(), 1, {p.segments.data(), 1});
      const std::vector<float> scattered = Attend(p, GetParam(), 40);
      const int width = 23 * 32;
      EXPECT_TRUE(std::equal(together.begin(), together.begin() + width, long_row.begin()));
      for (int r = 0; r < p.rows; ++r) {
        const float* expected = together.data() + r * p.stride;
        EXPECT_TRUE(std::equal(expected, expected + width, scattered.data() + r * p.stride)) << r;
      }
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(AttentionAt, APromptInOneChunkAgreesWithTokenByToken) {
  for (const KvType type : {KvType::kF32, KvType::kF16, KvType::kQ8_0}) {
    AttentionProblem p(MakeAttentionCase(type, 64, 4, 2), {{0, 300, false}}, 3);
    CheckAll(p, Attend(p, GetParam(), 2), GetParam());
    p.segments[0].decode = true;
    CheckAll(p, Attend(p, GetParam(), 2), GetParam());
    if (HasFatalFailure()) return;
  }
}

TEST_P(AttentionAt, LargeScoresDoNotOverflow) {
  AttentionCase shape = MakeAttentionCase(KvType::kF32, 64, 4, 2);
  AttentionProblem p(shape, {{400, 1, true}, {300, 20, false}}, 9);
  for (float& x : p.q) x *= 1000;  // scores of several thousands
  const std::vector<float> out = Attend(p, GetParam(), 2);
  for (int r = 0; r < p.rows; ++r) {
    for (int i = 0; i < 4 * 64; ++i) ASSERT_LT(std::fabs(out[r * p.stride + i]), 10) << r;
  }
}

TEST_P(AttentionAt, HalvesAreThoseOfTheOracle) {
  auto pool = ThreadPool::Create({.threads = 1, .pin = false}).value();
  const AttentionEngine engine(GetParam(), pool.get());
  std::mt19937 rng(4);
  for (int n = 1; n <= 200; ++n) {
    std::vector<float> x = {1e6f, -1e6f, 65504, 65520, 0x1p-24f, 0x1.8p-25f, 0x1p-25f, -0.0f};
    // Any exponent that a half has, and a few beyond.
    while (static_cast<int>(x.size()) < n) {
      x.push_back(
          std::ldexp(1 + static_cast<float>(rng()) * 0x1p-32f, static_cast<int>(rng() % 46) - 28) *
          (rng() % 2 == 0 ? 1 : -1));
    }
    std::vector<uint16_t> out(n, 7), expected(n, 8);
    engine.kernels().to_half(x.data(), out.data(), n);
    ScalarAttentionKernels().to_half(x.data(), expected.data(), n);
    ASSERT_EQ(out, expected) << n;
  }
}

TEST(AttentionEngine, WorkspaceIsWhatReserveTakesAndGrowsWithTheLimits) {
  auto pool = ThreadPool::Create({.threads = 2, .pin = false}).value();
  const AttentionEngine engine(CpuLevel::kScalar, pool.get());
  const AttentionCase shape = MakeAttentionCase(KvType::kF16, 64, 32, 4);
  const int64_t small = engine.WorkspaceBytes(LimitsFor(shape, 1, 256));
  const int64_t large = engine.WorkspaceBytes(LimitsFor(shape, 512, 131072));
  EXPECT_GT(small, 0);
  EXPECT_GT(large, small);
  EXPECT_LT(large, 64 << 20);
}

TEST(AttentionEngineDeathTest, RefusesWhatIsBeyondTheLimits) {
  auto pool = ThreadPool::Create({.threads = 1, .pin = false}).value();
  AttentionEngine engine(CpuLevel::kScalar, pool.get());
  const AttentionCase shape = MakeAttentionCase(KvType::kF32, 8, 2, 1);
  const AttentionProblem p(shape, {{10, 2, false}}, 1);
  std::vector<float> out(p.rows * p.stride);
  const auto run = [&] {
    engine.Run(p.q.data(), p.stride, shape.attention, p.cache.layer(), p.segments, out.data(),
               p.stride);
  };
  EXPECT_DEATH(run(), "call Reserve");
  ASSERT_TRUE(engine.Reserve(LimitsFor(shape, 2, 11)).ok());
  EXPECT_DEATH(run(), "positions are beyond Limits");
}

}  // namespace
}  // namespace shoal
