// Attention of kernels/cuda on the CPU stand-in, against the textbook.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
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
  // Of prompts. 0: as on a chip, where a run is longer than most contexts here.
  int run_tokens = 0;
  int resident_blocks = 0;
  int partial_runs = -1;  // what the workspace holds
};

PlanOptions PlanOptionsOf(const AttentionProblem& p, const Options& options) {
  PlanOptions plan = PlanOptionsFor(p.shape.attention, p.shape.kv, {options.shared_bytes, 1},
                                    options.partial_items);
  if (options.run_tokens > 0) plan.run_tokens = options.run_tokens;
  if (options.resident_blocks > 0) plan.resident_blocks = options.resident_blocks;
  if (options.partial_runs >= 0) {
    EXPECT_LE(options.partial_runs, plan.partial_runs);
    plan.partial_runs = options.partial_runs;
  }
  return plan;
}

std::vector<float> Attend(const AttentionProblem& p, absl::Span<const Segment> segments,
                          const Options& options = {}) {
  Planner planner(LimitsFor(p));
  std::vector<uint8_t> memory(planner.MaxBytes(), 0xff);
  const PlanOptions plan_options = PlanOptionsOf(p, options);
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
    AttentionCase shape =
        MakeAttentionCase(type, head_dim, q_heads, group, window, rng() % (2 * group));
    shape.attention.chunked = i % 3 == 0;
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

// The bits of a prompt's rows, whatever cuts the work: tiles that walk over all runs or one block a
// run, in how many passes, in how large chunks.
void ExpectSameRows(const AttentionProblem& p, const std::vector<float>& a,
                    const std::vector<float>& b) {
  const int64_t width = int64_t{p.shape.attention.q_heads} * p.shape.attention.head_dim;
  for (int r = 0; r < p.rows; ++r) {
    const float* row = a.data() + r * p.stride;
    ASSERT_EQ(std::memcmp(row, b.data() + r * p.stride, width * sizeof(float)), 0) << "row " << r;
  }
}

TEST(CudaAttention, PromptsSplitOverTheirContextKeepTheirBits) {
  std::mt19937 rng(11);
  const int head_dims[] = {64, 80, 96, 128, 256, 2, 14, 72};
  const int groups[] = {1, 4, 8, 3, 12};
  for (int i = 0; i < 24; ++i) {
    const KvType type = i % 2 == 0 ? KvType::kF16 : KvType::kQ8_0;
    const int head_dim = head_dims[i / 2 % 8];
    const int group = groups[rng() % 5];
    const int q_heads = 1 + rng() % (group + 2);
    const int window = rng() % 3 > 0 ? 0 : 1 + rng() % 200;
    AttentionCase shape =
        MakeAttentionCase(type, head_dim, q_heads, group, window, rng() % (2 * group));
    shape.attention.chunked = i % 3 == 0;
    AttentionProblem p(shape,
                       {{static_cast<int>(rng() % 400), 1 + static_cast<int>(rng() % 30), false},
                        {static_cast<int>(rng() % 300), 1, true},
                        {static_cast<int>(rng() % 60), 1 + static_cast<int>(rng() % 9), false}},
                       i);
    if (i % 4 < 2) p.AddSinks();
    // A multiple of the tokens of every tile; some cases have whole tiles beside those that are
    // split.
    const int run = 192 * (1 + static_cast<int>(rng() % 2));
    const int resident = i % 3 == 0 ? 6 : 1000;
    SCOPED_TRACE(testing::Message()
                 << KvTypeName(type) << " head_dim " << head_dim << " q_heads " << q_heads
                 << " from " << shape.attention.q_head_begin << " group " << group << " window "
                 << window << " run " << run);
    simt::SetSeed(i);
    const Options walked{.run_tokens = run, .partial_runs = 0};
    const std::vector<float> out = Attend(p, walked);
    Check(p, out, walked);
    if (HasFatalFailure()) return;
    for (const int partial_runs : {20, 1 + static_cast<int>(rng() % 3)}) {
      simt::SetSeed(100 + i + partial_runs);
      ExpectSameRows(p, out,
                     Attend(p, {.partial_items = 2000,
                                .run_tokens = run,
                                .resident_blocks = resident,
                                .partial_runs = partial_runs}));
      if (HasFatalFailure()) FAIL() << partial_runs << " runs a pass";
    }
    // Each row of the first segment as a chunk of its own.
    std::vector<float> rows = out;
    const Segment s = p.segments[0];
    for (int r = 0; r < s.rows; r += 7) {
      const Segment alone = {s.row + r, 1, s.pos + r, s.blocks, false};
      const std::vector<float> one = Attend(
          p, {&alone, 1}, {.partial_items = 400, .run_tokens = run, .resident_blocks = 1000});
      std::copy_n(one.begin() + (s.row + r) * p.stride, p.stride,
                  rows.begin() + (s.row + r) * p.stride);
    }
    ExpectSameRows(p, out, rows);
    if (HasFatalFailure()) FAIL() << "a row alone";
  }
}

TEST(CudaAttention, TilesGoOnInTheNextPassWhileOthersEnd) {
  // 3 tiles of 3 runs, two a pass: one that ends beside one that goes on.
  const AttentionProblem p(MakeAttentionCase(KvType::kF16, 64, 4, 4), {{400, 40, false}}, 9);
  const std::vector<float> out = Attend(p, {.run_tokens = 192, .partial_runs = 0});
  for (int seed = 0; seed < 8; ++seed) {
    simt::SetSeed(seed);
    const Options options{
        .partial_items = 400, .run_tokens = 192, .resident_blocks = 100, .partial_runs = 2};
    ExpectSameRows(p, out, Attend(p, options));
    if (HasFatalFailure()) FAIL() << "seed " << seed;
  }
}

TEST(CudaAttention, TilesOfKvHeadsWithFewerHeadsHereEndLater) {
  // A head of one KV head, four of another: their first tiles have 60 rows and 16, of which the
  // run's border takes the last ones.
  const AttentionProblem p(MakeAttentionCase(KvType::kF16, 64, 5, 4, 0, 3), {{362, 60, false}}, 9);
  const std::vector<float> out = Attend(p, {.run_tokens = 192, .partial_runs = 0});
  Check(p, out);
  for (int seed = 0; seed < 4; ++seed) {
    simt::SetSeed(seed);
    const Options options{.partial_items = 400, .run_tokens = 192, .resident_blocks = 100};
    ExpectSameRows(p, out, Attend(p, options));
    if (HasFatalFailure()) FAIL() << "seed " << seed;
  }
}

TEST(CudaAttention, AShortChunkOverALongContextIsSplitAsOnAChip) {
  for (const KvType type : {KvType::kF16, KvType::kQ8_0}) {
    const AttentionProblem p(MakeAttentionCase(type, 128, 2, 2), {{2500, 3, false}}, 3);
    Planner planner(LimitsFor(p));
    std::vector<uint8_t> memory(planner.MaxBytes());
    PlanOptions options = PlanOptionsFor(p.shape.attention, p.shape.kv, {kSharedBytes, 132}, 400);
    BatchPlan plan =
        planner.Build(p.segments, p.shape.attention, options, memory.data(), memory.data());
    EXPECT_EQ(plan.whole_tiles, 0);
    ASSERT_EQ(plan.prefill_pass_count, 1);
    EXPECT_EQ(plan.prefill_passes[0].item_end, 3);
    EXPECT_EQ(plan.prefill_passes[0].merge_end, 1);
    const std::vector<float> split = Attend(p, {.partial_items = 400, .resident_blocks = 264});
    Check(p, split);
    ExpectSameRows(p, split, Attend(p, {.partial_items = 400, .partial_runs = 0}));
    if (HasFatalFailure()) FAIL() << KvTypeName(type);
  }
}

TEST(CudaAttention, RowsOfNoSegmentAreLeftAlone) {
  AttentionProblem p(MakeAttentionCase(KvType::kF16, 64, 2, 2),
                     {{5, 3, false}, {9, 1, true}, {20, 1, true}}, 1);
  std::vector<Segment> part = {p.segments[0], p.segments[2]};
  const std::vector<float> out = Attend(p, part);
  for (int64_t i = 3 * p.stride; i < 4 * p.stride; ++i) EXPECT_TRUE(std::isnan(out[i]));
  EXPECT_FALSE(std::isnan(out[4 * p.stride]));
}

TEST(Planner, TilesWithMoreThanTheirShareOfRunsAreSplit) {
  std::vector<int32_t> table(1000);
  Backend::Limits limits;
  limits.rows = 200;
  limits.heads = 4;
  limits.context = 16000;
  Planner planner(limits);
  std::vector<uint8_t> memory(planner.MaxBytes());
  const AttentionShape shape{.q_heads = 4, .head_dim = 64, .group = 4, .scale = 1};
  // A chunk over a long context, a decode row, a short prompt.
  const Segment segments[] = {{0, 40, 15000, table.data(), false},
                              {40, 1, 9000, table.data(), true},
                              {41, 100, 0, table.data(), false}};
  PlanOptions options{.prefill_tile = 64,
                      .partial_items = 64,
                      .run_tokens = 1024,
                      .partial_runs = 10,
                      .kv_heads = 1,
                      .resident_blocks = 16};
  const auto build = [&] {
    const BatchPlan plan = planner.Build(segments, shape, options, memory.data(), memory.data());
    EXPECT_LE(planner.UsedBytes(), planner.MaxBytes());
    return plan;
  };
  // 3 tiles of 15 runs, 7 of one: 52 runs on 16 blocks.
  BatchPlan plan = build();
  EXPECT_EQ(plan.whole_tiles, 7);
  ASSERT_EQ(plan.prefill_pass_count, 5);
  int item = plan.whole_tiles, merge = 0, runs_of_tile[3] = {};
  for (int i = 0; i < plan.whole_tiles; ++i) {
    EXPECT_EQ(plan.prefill_items[i].run, kWholeContext);
    EXPECT_EQ(plan.prefill_items[i].segment, 2);
  }
  for (int pass = 0; pass < plan.prefill_pass_count; ++pass) {
    const int first = item;
    for (; merge < plan.prefill_passes[pass].merge_end; ++merge) {
      const PrefillMerge& m = plan.prefill_merges[merge];
      EXPECT_EQ(m.first_item, item - first);
      EXPECT_EQ(m.run_begin, runs_of_tile[m.tile]);
      for (int run = m.run_begin; run < m.run_end; ++run, ++item) {
        EXPECT_EQ(plan.prefill_items[item].segment, 0);
        EXPECT_EQ(plan.prefill_items[item].tile, m.tile);
        EXPECT_EQ(plan.prefill_items[item].run, run);
      }
      runs_of_tile[m.tile] = m.run_end;
      EXPECT_EQ(m.last, m.run_end == 15 ? 1 : 0);
    }
    EXPECT_EQ(item, plan.prefill_passes[pass].item_end);
    EXPECT_LE(item - first, options.partial_runs);
  }
  for (const int runs : runs_of_tile) EXPECT_EQ(runs, 15);
  // Blocks enough for each tile to have no more than its share, and no place for partial results.
  options.resident_blocks = 3;
  EXPECT_EQ(build().whole_tiles, 10);
  options.resident_blocks = 16;
  options.partial_runs = 0;
  EXPECT_EQ(build().whole_tiles, 10);
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
  const BatchPlan plan =
      planner.Build(segments, shape, {.prefill_tile = 64, .partial_items = 9, .run_tokens = 64},
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
  EXPECT_EQ(plan.prefill_pass_count, 0);
}

}  // namespace
}  // namespace shoal::cuda
