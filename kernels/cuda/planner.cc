#include "kernels/cuda/planner.h"

#include <algorithm>

#include "kernels/check.h"

namespace shoal::cuda {
namespace {

constexpr int kLeastTile = 16;  // query vectors of the smallest prefill tile
constexpr int64_t kSplitTableBytes = kSplitTokens / kKvBlockTokens * sizeof(int32_t);

constexpr int kLeastRun = 16;  // positions
// A chunk of 64 rows over a context of 128k has 512 to 1024 runs; the bound is for the memory of
// lists.
constexpr int64_t kMostSplitItems = 8192;

int64_t DivUp(int64_t n, int64_t by) { return (n + by - 1) / by; }

int32_t Blocks(const Segment& s) {
  return s.rows == 0 ? 0 : static_cast<int32_t>(DivUp(s.pos + s.rows, kKvBlockTokens));
}

// Most query heads that read one KV head.
int Heads(const AttentionShape& shape) { return std::min(shape.q_heads, shape.group); }

int64_t MostTiles(const Backend::Limits& l) {
  // A tile holds query vectors of one segment, all but the last of them whole.
  return l.rows + int64_t{l.rows} * l.heads / kLeastTile;
}

// fn(segment, tile, runs) for the tiles of prompts, late ones first: they see more. `runs`: of a
// KV head whose tile ends last, as those with fewer heads here have more rows in a tile.
template <typename Fn>
void ForEachTile(absl::Span<const Segment> segments, const AttentionShape& shape,
                 const PlanOptions& options, const Fn& fn) {
  const int heads = Heads(shape);
  const bool uniform = shape.q_heads % heads == 0 && shape.q_head_begin % heads == 0;
  for (int i = static_cast<int>(segments.size()) - 1; i >= 0; --i) {
    const Segment& s = segments[i];
    if (s.decode) continue;
    const int64_t tiles = DivUp(int64_t{s.rows} * heads, options.prefill_tile);
    for (int64_t t = tiles - 1; t >= 0; --t) {
      const int64_t last_row = ((t + 1) * options.prefill_tile - 1) / (uniform ? heads : 1);
      const int64_t last_pos = s.pos + std::min<int64_t>(last_row, s.rows - 1);
      fn(i, static_cast<int>(t), static_cast<int>(last_pos / options.run_tokens) + 1);
    }
  }
}

}  // namespace

struct Planner::Lists {
  Lists(uint8_t* base, const Layout& l, int64_t items)
      : rows(reinterpret_cast<RowPlace*>(base + l.rows)),
        ids(reinterpret_cast<int32_t*>(base + l.ids)),
        segments(reinterpret_cast<SegmentPlace*>(base + l.segments)),
        decode_rows(reinterpret_cast<DecodeRow*>(base + l.decode_rows)),
        decode_items(reinterpret_cast<DecodeItem*>(base + items)),
        tables(reinterpret_cast<int32_t*>(base + l.tables)) {}
  RowPlace* rows;
  int32_t* ids;
  SegmentPlace* segments;
  DecodeRow* decode_rows;
  DecodeItem* decode_items;
  int32_t* tables;
  PrefillItem* prefill_items = nullptr;
  PrefillMerge* prefill_merges = nullptr;
};

Planner::Planner(const Backend::Limits& limits) : limits_(limits), layout_(MakeLayout(limits)) {
  passes_.reserve(limits.rows);
  prefill_passes_.reserve(layout_.split_items + 1);
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
  const int64_t splits = rows * (limits.context / kSplitTokens + 1);
  l.tables = take(splits * kSplitTableBytes);
  take(splits * sizeof(DecodeItem));
  const int64_t tiles = MostTiles(limits);
  l.split_items = std::min(kMostSplitItems, tiles * (limits.context / kLeastRun + 1));
  take((tiles + l.split_items) * sizeof(PrefillItem));
  take(l.split_items * sizeof(PrefillMerge));
  return l;
}

BatchPlan Planner::Build(absl::Span<const Segment> segments, const AttentionShape& shape,
                         const PlanOptions& options, uint8_t* host, uint8_t* device) {
  SHOAL_CHECK(options.prefill_tile == 0 ||
                  (options.prefill_tile >= kLeastTile && options.run_tokens >= kLeastRun),
              "prefill tiles or their runs are smaller than planned for");
  int64_t blocks = 0;
  for (const Segment& s : segments) blocks += Blocks(s);
  // Right behind the tables, so that the upload is no longer than what is in it.
  const int64_t items = layout_.tables + DivUp(blocks * sizeof(int32_t), 16) * 16;
  Lists lists(host, layout_, items);
  Clear();
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
  used_ = items + decode_items_ * static_cast<int64_t>(sizeof(DecodeItem));
  Lists there(device, layout_, items);
  if (options.prefill_tile > 0) {
    AddTiles(used_, lists, segments, shape, options);
    there.prefill_items = reinterpret_cast<PrefillItem*>(
        device + (reinterpret_cast<uint8_t*>(lists.prefill_items) - host));
    there.prefill_merges = reinterpret_cast<PrefillMerge*>(
        device + (reinterpret_cast<uint8_t*>(lists.prefill_merges) - host));
    used_ = reinterpret_cast<uint8_t*>(lists.prefill_merges + prefill_merges_) - host;
  }

  BatchPlan plan = PlanOf(there);
  plan.row_count = row_count;
  plan.run_tokens = options.run_tokens;
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
  Clear();
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

void Planner::Clear() {
  passes_.clear();
  prefill_passes_.clear();
  decode_rows_ = decode_items_ = prefill_items_ = prefill_merges_ = whole_tiles_ = 0;
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
  plan.prefill_merges = there.prefill_merges;
  plan.passes = passes_.data();
  plan.prefill_passes = prefill_passes_.data();
  plan.pass_count = static_cast<int32_t>(passes_.size());
  plan.prefill_pass_count = static_cast<int32_t>(prefill_passes_.size());
  plan.whole_tiles = whole_tiles_;
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

void Planner::AddTiles(int64_t at, Lists& lists, absl::Span<const Segment> segments,
                       const AttentionShape& shape, const PlanOptions& options) {
  int64_t tiles = 0, all_runs = 0;
  ForEachTile(segments, shape, options, [&](int, int, int runs) {
    ++tiles;
    all_runs += runs;
  });
  // A tile of more runs than this would be at work when the rest of the device has ended.
  int64_t share = std::max<int64_t>(
      1, DivUp(all_runs * options.kv_heads, std::max(options.resident_blocks, 1)));
  if (options.partial_runs <= 0) share = all_runs;
  const auto split_items = [&] {
    int64_t items = 0;
    ForEachTile(segments, shape, options,
                [&](int, int, int runs) { items += runs > share ? runs : 0; });
    return items;
  };
  while (split_items() > layout_.split_items) share *= 2;

  uint8_t* const base = reinterpret_cast<uint8_t*>(lists.rows) - layout_.rows;
  const int64_t items_at = DivUp(at, 16) * 16;
  const int64_t merges_at =
      DivUp(items_at + (tiles + split_items()) * static_cast<int64_t>(sizeof(PrefillItem)), 16) *
      16;
  lists.prefill_items = reinterpret_cast<PrefillItem*>(base + items_at);
  lists.prefill_merges = reinterpret_cast<PrefillMerge*>(base + merges_at);
  ForEachTile(segments, shape, options, [&](int segment, int tile, int runs) {
    if (runs <= share) lists.prefill_items[prefill_items_++] = {segment, tile, kWholeContext};
  });
  whole_tiles_ = prefill_items_;
  if (tiles > 0) prefill_passes_.push_back({prefill_items_, 0});
  ForEachTile(segments, shape, options, [&](int segment, int tile, int runs) {
    if (runs > share) SplitTile(lists, segment, tile, runs, options.partial_runs);
  });
}

void Planner::SplitTile(const Lists& lists, int segment, int tile, int runs, int partial_runs) {
  for (int begin = 0; begin < runs;) {
    const auto first = [this] {
      return prefill_passes_.size() < 2 ? whole_tiles_
                                        : prefill_passes_[prefill_passes_.size() - 2].item_end;
    };
    if (prefill_items_ - first() == partial_runs) prefill_passes_.push_back({});
    const int end = std::min(runs, begin + partial_runs - (prefill_items_ - first()));
    lists.prefill_merges[prefill_merges_++] = {
        segment, tile, begin, end, prefill_items_ - first(), end == runs ? 1 : 0};
    for (; begin < end; ++begin) lists.prefill_items[prefill_items_++] = {segment, tile, begin};
    prefill_passes_.back() = {prefill_items_, prefill_merges_};
  }
}

}  // namespace shoal::cuda
