// Attention of kernels/cuda on the CPU stand-in, against the textbook.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "../kernels/attention_problem.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/planner.h"
#include "simt/runner.h"

namespace shoal::cuda {
namespace {

constexpr int64_t kSharedBytes = 99 << 10;  // of a block on most chips since sm_80

Backend::Limits LimitsFor(const AttentionProblem& p) {
  Backend::Limits limits;
  limits.rows = p.rows;
  limits.heads = p.shape.attention.q_heads;
  limits.head_dim = p.shape.attention.head_dim;
  limits.context = p.context;
  return limits;
}

struct Options {
  int64_t shared_bytes = kSharedBytes;
  int partial_items = 64;
};

std::vector<float> Attend(const AttentionProblem& p, absl::Span<const Segment> segments,
                          const Options& options = {}) {
  Planner planner(LimitsFor(p));
  std::vector<uint8_t> memory(planner.MaxBytes(), 0xff);
  const PlanOptions plan_options{PrefillTile(p.shape.kv, options.shared_bytes),
                                 options.partial_items};
  const BatchPlan plan =
      planner.Build(segments, p.shape.attention, plan_options, memory.data(), memory.data());
  EXPECT_LE(planner.UsedBytes(), planner.MaxBytes());
  const AttentionShape& shape = p.shape.attention;
  std::vector<float> workspace(
      AttentionWorkspaceBytes(shape.q_heads, shape.head_dim, options.partial_items) / sizeof(float),
      std::numeric_limits<float>::quiet_NaN());
  std::vector<float> out(p.rows * p.stride, std::numeric_limits<float>::quiet_NaN());
  Attention(p.q.data(), p.stride, shape, p.cache.layer(), plan,
            reinterpret_cast<uint8_t*>(workspace.data()), out.data(), p.stride, nullptr);
  return out;
}
std::vector<float> Attend(const AttentionProblem& p, const Options& options = {}) {
  return Attend(p, p.segments, options);
}

void Check(const AttentionProblem& p, const std::vector<float>& out, const Options& options = {}) {
  const bool tiles = PrefillTile(p.shape.kv, options.shared_bytes) > 0;
  CheckAttention(p, out, [&](const Segment& s) -> AttentionPrecision {
    // attention_prefill.cuh: q in two f16 numbers, p and v in one each.
    return tiles && !s.decode ? AttentionPrecision{0x1p-22, 0x1p-11, 0x1p-11, 2}
                              : AttentionPrecision{};
  });
  const int64_t width = int64_t{p.shape.attention.q_heads} * p.shape.attention.head_dim;
  for (int r = 0; r < p.rows; ++r) {
    for (int64_t i = width; i < p.stride; ++i) {
      ASSERT_TRUE(std::isnan(out[r * p.stride + i])) << "wrote beyond the row";
    }
  }
}

TEST(CudaAttention, AgreesWithTheTextbookOverShapesWindowsGroupingsAndSinks) {
  std::mt19937 rng(7);
  const int head_dims[] = {64, 80, 96, 128, 256, 2, 14, 72, 288};
  const int groups[] = {1, 4, 8, 3, 7, 12};
  for (int i = 0; i < 27; ++i) {
    simt::SetSeed(i);
    const KvType type = static_cast<KvType>(i / 9);
    const int head_dim = head_dims[i % 9];
    const int group = groups[rng() % 6];
    const int q_heads = 1 + rng() % (group + 2);
    const int window = rng() % 2 == 0 ? 0 : 1 + rng() % 150;
    const AttentionCase shape =
        MakeAttentionCase(type, head_dim, q_heads, group, window, rng() % (2 * group));
    AttentionProblem p(
        shape,
        {{static_cast<int>(rng() % 320), 1, true},
         {static_cast<int>(rng() % 40), 1 + static_cast<int>(rng() % 20), false},
         {0, 1, true},
         {100 + static_cast<int>(rng() % 40), 1 + static_cast<int>(rng() % 10), false}},
        i);
    SCOPED_TRACE(testing::Message() << KvTypeName(type) << " head_dim " << head_dim << " q_heads "
                                    << q_heads << " from " << shape.attention.q_head_begin
                                    << " group " << group << " window " << window);
    if (i % 2 == 0) p.AddSinks();
    Check(p, Attend(p));
    if (HasFatalFailure()) return;
  }
}

TEST(CudaAttention, LargeKeysWhoseProductsCancelStayExact) {
  for (const KvType type : {KvType::kF32, KvType::kF16, KvType::kQ8_0}) {
    for (const int head_dim : {64, 128}) {
      const AttentionProblem p(MakeAttentionCase(type, head_dim, 3, 4),
                               {{80, 6, false}, {100, 1, true}}, 3, AttentionProblem::Keys::kLarge);
      SCOPED_TRACE(testing::Message() << KvTypeName(type) << " head_dim " << head_dim);
      Check(p, Attend(p));
      if (HasFatalFailure()) return;
    }
  }
}

TEST(CudaAttention, QueriesOfAnySizeStayInRange) {
  for (const float factor : {0.0f, 1e-20f, 1e-3f, 1e6f}) {
    AttentionProblem p(MakeAttentionCase(KvType::kF16, 64, 2, 2), {{40, 30, false}, {90, 1, true}},
                       5);
    for (float& x : p.q) x *= factor;
    // Scores in the usual range, whatever the queries'.
    if (factor > 0) p.shape.attention.scale /= factor;
    Check(p, Attend(p));
    if (HasFatalFailure()) FAIL() << factor;
  }
}

TEST(CudaAttention, DecodeRowsAreBitIdenticalWhateverTheBatchAndTheSchedule) {
  for (const KvType type : {KvType::kF32, KvType::kF16, KvType::kQ8_0}) {
    for (const int group : {1, 6}) {
      const AttentionProblem p(MakeAttentionCase(type, 64, group + 1, group),
                               {{520, 1, true}, {3, 1, true}, {255, 2, true}, {40, 9, false}}, 5);
      simt::SetSeed(1);
      const std::vector<float> together = Attend(p);
      const int64_t width = (group + 1) * 64;
      for (const Segment& s : p.segments) {
        if (!s.decode) continue;
        simt::SetSeed(s.row + 2);
        // Alone, and in as many launches as the smallest workspace asks for.
        const std::vector<float> alone = Attend(p, {&s, 1}, {.partial_items = 3});
        for (int r = s.row; r < s.row + s.rows; ++r) {
          const float* expected = together.data() + r * p.stride;
          EXPECT_TRUE(std::equal(expected, expected + width, alone.data() + r * p.stride)) << r;
        }
      }
    }
  }
}

TEST(CudaAttention, APromptInOneChunkAgreesWithTokenByToken) {
  for (const KvType type : {KvType::kF32, KvType::kF16, KvType::kQ8_0}) {
    AttentionProblem p(MakeAttentionCase(type, 64, 3, 2, /*window=*/30), {{0, 66, false}}, 3);
    Check(p, Attend(p));
    p.segments[0].decode = true;
    Check(p, Attend(p, {.partial_items = 5}), {});
    if (HasFatalFailure()) return;
  }
}

TEST(CudaAttention, PromptsTakeTheDecodeKernelWhereTilesDoNotFit) {
  const AttentionProblem p(MakeAttentionCase(KvType::kF16, 256, 2, 2), {{30, 5, false}}, 3);
  const Options small{.shared_bytes = 64 << 10};
  EXPECT_EQ(PrefillTile(p.shape.kv, small.shared_bytes), 0);
  EXPECT_EQ(PrefillTile(p.shape.kv, kSharedBytes), 32);
  Check(p, Attend(p, small), small);
}

TEST(CudaAttention, RowsOfNoSegmentAreLeftAlone) {
  AttentionProblem p(MakeAttentionCase(KvType::kF16, 64, 2, 2),
                     {{5, 3, false}, {9, 1, true}, {20, 1, true}}, 1);
  std::vector<Segment> part = {p.segments[0], p.segments[2]};
  const std::vector<float> out = Attend(p, part);
  for (int64_t i = 3 * p.stride; i < 4 * p.stride; ++i) EXPECT_TRUE(std::isnan(out[i]));
  EXPECT_FALSE(std::isnan(out[4 * p.stride]));
}

TEST(Planner, PassesHoldWholeRowsAndNoMoreThanTheWorkspace) {
  std::mt19937 rng(1);
  std::vector<int32_t> table(100);
  std::vector<Segment> segments;
  for (int i = 0; i < 20; ++i) {
    segments.push_back({i, 1, static_cast<int>(rng() % 1600), table.data(), true});
  }
  Backend::Limits limits;
  limits.rows = 20;
  limits.heads = 2;
  limits.context = 1600;
  Planner planner(limits);
  std::vector<uint8_t> memory(planner.MaxBytes());
  const AttentionShape shape{.q_heads = 2, .head_dim = 64, .group = 2, .scale = 1};
  const BatchPlan plan = planner.Build(segments, shape, {.prefill_tile = 64, .partial_items = 9},
                                       memory.data(), memory.data());
  int row = 0, item = 0;
  for (int i = 0; i < plan.pass_count; ++i) {
    const DecodePass& pass = plan.passes[i];
    EXPECT_LE(pass.item_end - item, 9);
    EXPECT_GT(pass.row_end, row);
    for (; row < pass.row_end; ++row) {
      EXPECT_EQ(plan.decode_rows[row].first_item, item);
      for (int split = 0; split * kSplitTokens <= segments[row].pos; ++split, ++item) {
        EXPECT_EQ(plan.decode_items[item].row, row);
        EXPECT_EQ(plan.decode_items[item].split, split);
      }
    }
    EXPECT_EQ(pass.item_end, item);
  }
  EXPECT_EQ(row, 20);
  EXPECT_GT(plan.pass_count, 1);
  EXPECT_EQ(plan.prefill_count, 0);
}

}  // namespace
}  // namespace shoal::cuda
