// Turns the segments of a batch into the lists that the attention kernels walk.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/types/span.h"
#include "kernels/backend.h"
#include "kernels/cuda/batch_plan.h"

namespace shoal::cuda {

// What the launches of a decode step depend on beside the contents of its lists. Steps of one shape
// have their lists at the same places.
struct StepShape {
  int rows = 0;   // of the ops: the step's, then idle ones
  int items = 0;  // splits of its rows, then ones without anything to do
  bool operator==(const StepShape&) const = default;
};

// Not thread-safe. Allocates nothing after its construction.
class Planner {
 public:
  explicit Planner(const Backend::Limits& limits);

  // Most bytes of a plan.
  int64_t MaxBytes() const { return layout_.bytes; }
  // Bytes of a plan that are worth an upload: [0, UsedBytes()) after Build.
  int64_t UsedBytes() const { return used_; }

  // Writes the lists to `host`, to be copied to `device`; both hold MaxBytes(), aligned to 16. The
  // passes live in the planner until the next call. REQUIRES: segments that fit the limits.
  BatchPlan Build(absl::Span<const Segment> segments, const AttentionShape& shape,
                  const PlanOptions& options, uint8_t* host, uint8_t* device);

  // The shape for a decode step over these segments: 1, 2, 4, 8, 16, 24, .. rows, a power of two of
  // splits. Nothing when it does not fit the limits or takes more than one pass of partial_items.
  std::optional<StepShape> ShapeOf(absl::Span<const Segment> segments, int partial_items) const;
  // As Build, for a step of one row a segment that is told to kernels through these bytes alone.
  // ids [segments.size()] or empty; idle rows have id -1 and no place.
  BatchPlan BuildStep(absl::Span<const Segment> segments, absl::Span<const int32_t> ids,
                      const StepShape& shape, uint8_t* host, uint8_t* device);

 private:
  // Offsets in bytes. What follows on the tables lies as close as a batch lets it, so that the
  // upload is no longer than what is in it: decode items, prefill items, merges.
  struct Layout {
    int64_t rows, ids, segments, decode_rows, tables, bytes;
    int64_t split_items;  // most runs of tiles that are split
  };
  struct Lists;
  BatchPlan PlanOf(const Lists& there) const;
  void Clear();
  static Layout MakeLayout(const Backend::Limits& limits);
  void AddDecodeRow(const Lists& lists, int row, int pos, int partial_items);
  void AddTiles(int64_t at, Lists& lists, absl::Span<const Segment> segments,
                const AttentionShape& shape, const PlanOptions& options);
  void SplitTile(const Lists& lists, int segment, int tile, int runs, int partial_runs);

  Backend::Limits limits_;
  Layout layout_;
  std::vector<DecodePass> passes_;
  int32_t decode_rows_ = 0;
  int32_t decode_items_ = 0;
  std::vector<PrefillPass> prefill_passes_;
  int32_t prefill_items_ = 0;
  int32_t prefill_merges_ = 0;
  int32_t whole_tiles_ = 0;
  int64_t used_ = 0;
};

}  // namespace shoal::cuda
