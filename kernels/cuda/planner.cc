#include "kernels/cuda/planner.h"

#include <algorithm>

#include "kernels/check.h"

namespace shoal::cuda {
namespace {

constexpr int kLeastTile = 16;  // query vectors of the smallest prefill tile
constexpr int64_t kSplitTableBytes = kSplitTokens / kKvBlockTokens * sizeof(int32_t);

int64_t DivUp(int64_t n, int64_t by) { return (n + by - 1) / by; }

int32_t Blocks(const Segment& s) {
  return s.rows == 0 ? 0 : static_cast<int32_t>(DivUp(s.pos + s.rows, kKvBlockTokens));
}

// Most query heads that read one KV head.
int Heads(const AttentionShape& shape) { return std::min(shape.q_heads, shape.group); }

}  // namespace

struct Planner::Lists {
  Lists(uint8_t* base, const Layout& l, int64_t items)
      : rows(reinterpret_cast<RowPlace*>(base + l.rows)),
        ids(reinterpret_cast<int32_t*>(base + l.ids)),
        segments(reinterpret_cast<SegmentPlace*>(base + l.segments)),
        decode_rows(reinterpret_cast<DecodeRow*>(base + l.decode_rows)),
        prefill_items(reinterpret_cast<PrefillItem*>(base + l.prefill_items)),
        decode_items(reinterpret_cast<DecodeItem*>(base + items)),
        tables(reinterpret_cast<int32_t*>(base + l.tables)) {}
  RowPlace* rows;
  int32_t* ids;
  SegmentPlace* segments;
  DecodeRow* decode_rows;
  PrefillItem* prefill_items;
  DecodeItem* decode_items;
  int32_t* tables;
};

Planner::Planner(const Backend::Limits& limits) : limits_(limits), layout_(MakeLayout(limits)) {
  passes_.reserve(limits.rows);
}

Planner::Layout Planner::MakeLayout(const Backend::Limits& limits) {
  Layout l;
  l.bytes = 0;
  const auto take = [&l](int64_t bytes) {
    const int64_t offset = l.bytes;
    l.bytes += DivUp(bytes, 16) * 16;
    return offset;
  };
  const int64_t rows = limits.rows;
  l.rows = take(rows * sizeof(RowPlace));
  l.ids = take(rows * sizeof(int32_t));
  l.segments = take(rows * sizeof(SegmentPlace));
  l.decode_rows = take(rows * sizeof(DecodeRow));
  // A tile holds query vectors of one segment, all but the last of them whole.
  l.prefill_items = take((rows + rows * limits.heads / kLeastTile) * sizeof(PrefillItem));
  const int64_t splits = rows * (limits.context / kSplitTokens + 1);
  l.tables = take(splits * kSplitTableBytes);
  take(splits * sizeof(DecodeItem));
  return l;
}

BatchPlan Planner::Build(absl::Span<const Segment> segments, const AttentionShape& shape,
                         const PlanOptions& options, uint8_t* host, uint8_t* device) {
  SHOAL_CHECK(options.prefill_tile == 0 || options.prefill_tile >= kLeastTile,
              "prefill tiles are smaller than planned for");
  int64_t blocks = 0;
  for (const Segment& s : segments) blocks += Blocks(s);
  // Right behind the tables, so that the upload is no longer than what is in it.
  const int64_t items = layout_.tables + DivUp(blocks * sizeof(int32_t), 16) * 16;
  const Lists lists(host, layout_, items);
  passes_.clear();
  decode_rows_ = decode_items_ = prefill_items_ = 0;
  std::fill(lists.rows, lists.rows + limits_.rows, RowPlace{-1, 0});
  int32_t table = 0, index = 0, row_count = 0;
  for (const Segment& s : segments) {
    lists.segments[index++] = {s.row, s.rows, s.pos, table};
    if (s.rows == 0) continue;
    std::copy(s.blocks, s.blocks + Blocks(s), lists.tables + table);
    for (int i = 0; i < s.rows; ++i) {
      lists.rows[s.row + i] = {s.pos + i, table};
      if (s.decode || options.prefill_tile == 0) {
        AddDecodeRow(lists, s.row + i, s.pos + i, options.partial_items);
      }
    }
    row_count = std::max(row_count, s.row + s.rows);
    table += Blocks(s);
  }
  if (options.prefill_tile > 0) AddTiles(lists, segments, shape, options);
  used_ = items + decode_items_ * static_cast<int64_t>(sizeof(DecodeItem));

  BatchPlan plan = PlanOf(Lists(device, layout_, items));
  plan.row_count = row_count;
  plan.prefill_count = prefill_items_;
  return plan;
}

std::optional<StepShape> Planner::ShapeOf(absl::Span<const Segment> segments,
                                          int partial_items) const {
  constexpr int kTileRows = 8;
  const int count = static_cast<int>(segments.size());
  int64_t splits = 0;
  for (const Segment& s : segments) {
    if (!s.decode || s.rows != 1 || s.row >= count) return std::nullopt;
    splits += s.pos / kSplitTokens + 1;
  }
  if (count == 0 || splits > partial_items) return std::nullopt;
  StepShape shape = {1, 1};
  while (shape.rows < count) shape.rows += shape.rows < kTileRows ? shape.rows : kTileRows;
  while (shape.items < splits) shape.items *= 2;
  shape.items = std::min(shape.items, partial_items);
  const int64_t most_items = int64_t{limits_.rows} * (limits_.context / kSplitTokens + 1);
  if (shape.rows > limits_.rows || shape.items > most_items) return std::nullopt;
  return shape;
}

BatchPlan Planner::BuildStep(absl::Span<const Segment> segments, absl::Span<const int32_t> ids,
                             const StepShape& shape, uint8_t* host, uint8_t* device) {
  const int64_t items = layout_.tables + shape.items * kSplitTableBytes;
  const Lists lists(host, layout_, items);
  passes_.clear();
  decode_rows_ = decode_items_ = prefill_items_ = 0;
  std::fill_n(lists.rows, shape.rows, RowPlace{-1, 0});
  std::fill_n(lists.ids, shape.rows, -1);
  std::copy(ids.begin(), ids.end(), lists.ids);
  int32_t table = 0;
  for (const Segment& s : segments) {
    std::copy(s.blocks, s.blocks + Blocks(s), lists.tables + table);
    lists.rows[s.row] = {s.pos, table};
    table += Blocks(s);
    AddDecodeRow(lists, s.row, s.pos, shape.items);
  }
  for (int i = decode_rows_; i < shape.rows; ++i) lists.decode_rows[i] = {i, 0};
  for (int i = decode_items_; i < shape.items; ++i) lists.decode_items[i] = {0, kNoSplit};
  passes_.assign(1, {shape.rows, shape.items});
  used_ = items + shape.items * static_cast<int64_t>(sizeof(DecodeItem));
  BatchPlan plan = PlanOf(Lists(device, layout_, items));
  plan.row_count = shape.rows;
  return plan;
}

BatchPlan Planner::PlanOf(const Lists& there) const {
  BatchPlan plan;
  plan.rows = there.rows;
  plan.ids = there.ids;
  plan.segments = there.segments;
  plan.tables = there.tables;
  plan.decode_rows = there.decode_rows;
  plan.decode_items = there.decode_items;
  plan.prefill_items = there.prefill_items;
  plan.passes = passes_.data();
  plan.pass_count = static_cast<int32_t>(passes_.size());
  return plan;
}

void Planner::AddDecodeRow(const Lists& lists, int row, int pos, int partial_items) {
  const int splits = pos / kSplitTokens + 1;
  SHOAL_CHECK(splits <= partial_items, "the workspace does not hold the splits of one row");
  const int32_t begin = passes_.size() < 2 ? 0 : passes_[passes_.size() - 2].item_end;
  if (passes_.empty() || decode_items_ + splits - begin > partial_items) passes_.push_back({});
  lists.decode_rows[decode_rows_++] = {row, decode_items_};
  for (int i = 0; i < splits; ++i) lists.decode_items[decode_items_++] = {row, i};
  passes_.back() = {decode_rows_, decode_items_};
}

void Planner::AddTiles(const Lists& lists, absl::Span<const Segment> segments,
                       const AttentionShape& shape, const PlanOptions& options) {
  // Late tiles of a prompt see more tokens: they go first, so that the last ones to run are short.
  for (int i = static_cast<int>(segments.size()) - 1; i >= 0; --i) {
    const Segment& s = segments[i];
    if (s.decode) continue;
    const int64_t tiles = DivUp(int64_t{s.rows} * Heads(shape), options.prefill_tile);
    for (int64_t t = tiles - 1; t >= 0; --t) {
      lists.prefill_items[prefill_items_++] = {i, static_cast<int32_t>(t)};
    }
  }
}

}  // namespace shoal::cuda
