// Steps as graphs: when they are recorded, how many are kept, what happens where streams cannot be
// captured.
#include "kernels/cuda/graphs.h"

#include <gtest/gtest.h>

#include <optional>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "kernels/cuda/launch.cuh"
#include "simt/api.h"

namespace shoal::cuda {
namespace {

__global__ void Add(int* sum, int value) {
  if (threadIdx.x == 0) *sum += value;
}

class Graphs : public testing::Test {
 protected:
  Graphs() : queue_(*OwnedStream::Create(), ""), memory_(*AllocateDevice(sizeof(int))) {}

  // What a step of `shape` adds; `calls` counts how often it was enqueued.
  absl::Status Step(StepGraphs& graphs, const StepShape& shape, int value) {
    return graphs.Run(shape, [&] {
      ++calls_;
      Launch(Add, 1, 32, 0, queue_.stream(), memory_.as<int>(), value);
      return absl::OkStatus();
    });
  }
  int Sum() {
    EXPECT_TRUE(queue_.Wait().ok());
    return *memory_.as<int>();
  }

  CudaQueue queue_;
  DeviceMemory memory_;
  int calls_ = 0;
};

TEST_F(Graphs, ASecondStepIsRecordedAndLaterOnesReplayed) {
  StepGraphs graphs(queue_);
  for (int i = 0; i < 5; ++i) ASSERT_TRUE(Step(graphs, {1, 1}, 1).ok());
  EXPECT_EQ(Sum(), 5);
  EXPECT_EQ(calls_, 2);
  EXPECT_EQ(graphs.recorded(), 1);
  EXPECT_EQ(graphs.replayed(), 4);
  ASSERT_TRUE(Step(graphs, {2, 1}, 10).ok());
  EXPECT_EQ(Sum(), 15);
  EXPECT_EQ(calls_, 3);
}

TEST_F(Graphs, TheLeastRecentlyUsedShapeMakesRoom) {
  StepGraphs graphs(queue_);
  for (int shape = 0; shape <= StepGraphs::kMost; ++shape) {
    for (int i = 0; i < 3; ++i) ASSERT_TRUE(Step(graphs, {1, 1 + shape}, 1).ok());
  }
  EXPECT_EQ(Sum(), 3 * (StepGraphs::kMost + 1));
  calls_ = 0;
  ASSERT_TRUE(Step(graphs, {1, 2}, 1).ok());  // still known
  EXPECT_EQ(calls_, 0);
  ASSERT_TRUE(Step(graphs, {1, 1}, 1).ok());  // no longer
  EXPECT_EQ(calls_, 1);
}

TEST_F(Graphs, AStreamThatCannotBeCapturedIsLeftAlone) {
  StepGraphs graphs(queue_);
  simt::RefuseGraphs(true);
  for (int i = 0; i < 4; ++i) EXPECT_TRUE(Step(graphs, {1, 1}, 1).ok());
  simt::RefuseGraphs(false);
  EXPECT_EQ(Sum(), 4);
  EXPECT_FALSE(graphs.on());
  EXPECT_NE(graphs.why_off().find("StreamCapture"), std::string::npos) << graphs.why_off();
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
}

TEST_F(Graphs, AWaitWithinAStepEndsReplaysNotTheStep) {
  StepGraphs graphs(queue_);
  for (int i = 0; i < 4; ++i) {
    EXPECT_TRUE(graphs
                    .Run({1, 1},
                         [&] {
                           Launch(Add, 1, 32, 0, queue_.stream(), memory_.as<int>(), 1);
                           cudaStreamSynchronize(queue_.stream());
                           return absl::OkStatus();
                         })
                    .ok());
  }
  EXPECT_EQ(Sum(), 4);
  EXPECT_FALSE(graphs.on());
}

TEST_F(Graphs, AnErrorOfTheStepIsItsAnswer) {
  StepGraphs graphs(queue_);
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(graphs.Run({1, 1}, [] { return absl::AbortedError("no"); }).code(),
              absl::StatusCode::kAborted);
  }
  EXPECT_TRUE(graphs.on());
  for (int i = 0; i < 2; ++i) ASSERT_TRUE(Step(graphs, {1, 1}, 1).ok());
  EXPECT_EQ(Sum(), 2);
}

TEST(StepPlan, ListsOfAShapeLieAtTheSamePlaces) {
  Backend::Limits limits;
  limits.rows = 32;
  limits.heads = 4;
  limits.context = 2048;
  Planner planner(limits);
  const std::vector<int32_t> blocks(2048 / kKvBlockTokens, 7), ids = {5, 6, 7};
  std::vector<uint8_t> host(planner.MaxBytes() + 16);
  uint8_t* const at = host.data() + (16 - reinterpret_cast<uintptr_t>(host.data()) % 16) % 16;
  const auto build = [&](std::vector<int> positions) {
    std::vector<Segment> segments;
    for (const int pos : positions) {
      segments.push_back({static_cast<int>(segments.size()), 1, pos, blocks.data(), true});
    }
    const std::optional<StepShape> shape = planner.ShapeOf(segments, 64);
    EXPECT_EQ(shape, (StepShape{4, 8}));
    return planner.BuildStep(segments, ids, *shape, at, at);
  };
  const BatchPlan a = build({3, 700, 400});
  const int64_t used = planner.UsedBytes();
  const BatchPlan b = build({1000, 0, 300});
  EXPECT_EQ(planner.UsedBytes(), used);
  EXPECT_LE(used, planner.MaxBytes());
  EXPECT_EQ(a.rows, b.rows);
  EXPECT_EQ(a.ids, b.ids);
  EXPECT_EQ(a.tables, b.tables);
  EXPECT_EQ(a.decode_rows, b.decode_rows);
  EXPECT_EQ(a.decode_items, b.decode_items);
  ASSERT_EQ(b.pass_count, 1);
  EXPECT_EQ(b.passes[0].row_end, 4);
  EXPECT_EQ(b.passes[0].item_end, 8);
  EXPECT_EQ(b.row_count, 4);
  EXPECT_EQ(b.rows[0].pos, 1000);
  EXPECT_EQ(b.rows[3].pos, -1);
  EXPECT_EQ(b.ids[2], 7);
  EXPECT_EQ(b.ids[3], -1);
  EXPECT_EQ(b.decode_rows[2].first_item, 5);
  EXPECT_EQ(b.decode_items[3].split, 3);
  EXPECT_EQ(b.decode_items[7].split, kNoSplit);
}

TEST(StepPlan, OnlyDecodeStepsWithinTheLimitsHaveAShape) {
  Backend::Limits limits;
  limits.rows = 12;
  limits.heads = 4;
  limits.context = 1024;
  const Planner planner(limits);
  const auto shape = [&](int rows, int pos, bool decode, int items) {
    std::vector<Segment> segments;
    for (int i = 0; i < rows; ++i) segments.push_back({i, 1, pos, nullptr, decode});
    return planner.ShapeOf(segments, items);
  };
  EXPECT_EQ(shape(1, 0, true, 8), (StepShape{1, 1}));
  EXPECT_EQ(shape(5, 256, true, 12), (StepShape{8, 12}));  // all that the workspace holds
  EXPECT_FALSE(shape(5, 256, true, 9).has_value());        // two passes
  EXPECT_FALSE(shape(9, 0, true, 64).has_value());         // 16 rows are too many
  EXPECT_FALSE(shape(1, 0, false, 64).has_value());        // of a prompt
  EXPECT_FALSE(planner.ShapeOf({}, 64).has_value());
}

}  // namespace
}  // namespace shoal::cuda
