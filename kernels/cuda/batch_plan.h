// What the kernels over the segments of a batch are told about it: plain numbers, built on the host
// (planner.h), read on the device, one upload for all layers of a step.
#pragma once

#include <cstdint>

namespace shoal::cuda {

// Positions [256 i, 256 i + 256) of a sequence are split i of its decode rows, whatever else is in
// the batch: the bits of a row follow from that row alone.
inline constexpr int kSplitTokens = 256;
// Of an item that fills up a step's list: behind whatever its row sees.
inline constexpr int kNoSplit = 1 << 20;

struct RowPlace {
  int32_t pos;
  int32_t table;  // the block of position p is tables[table + p / 16]
};
struct SegmentPlace {
  int32_t row, rows, pos, table;
};
struct DecodeRow {
  int32_t row;
  int32_t first_item;  // the items of its splits 0 .. pos / kSplitTokens follow each other
};
struct DecodeItem {
  int32_t row, split;
};
struct PrefillItem {
  int32_t segment;
  int32_t tile;  // of the segment's query vectors: vector v is row v / heads, head v % heads
};
// One launch of the decode kernel: decode rows and items from the end of the pass before it.
struct DecodePass {
  int32_t row_end, item_end;
};

// The lists are device memory, the passes host memory.
struct BatchPlan {
  const RowPlace* rows = nullptr;  // [row_count]; pos is -1 where no segment has the row
  const int32_t* ids = nullptr;    // of a step that may be replayed: its tokens, [row_count]
  const SegmentPlace* segments = nullptr;
  const int32_t* tables = nullptr;
  const DecodeRow* decode_rows = nullptr;
  const DecodeItem* decode_items = nullptr;
  const PrefillItem* prefill_items = nullptr;
  const DecodePass* passes = nullptr;
  int32_t pass_count = 0;
  int32_t row_count = 0;
  int32_t prefill_count = 0;
};

}  // namespace shoal::cuda
