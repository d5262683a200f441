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
// Positions [run_tokens i, run_tokens (i + 1)) are run i of a prompt's tiles, whatever the chunk: a
// tile's open softmax is joined to the one before at these borders, by the block that walks over
// all of them or, where blocks took a run each, by a merge. So a row's bits do not tell which it
// was.
inline constexpr int kWholeContext = -1;
struct PrefillItem {
  int32_t segment;
  int32_t tile;  // of the segment's query vectors: vector v is row v / heads, head v % heads
  int32_t run;   // or kWholeContext
};
// Runs [run_begin, run_end) of a tile, from item `first_item` of the pass on.
struct PrefillMerge {
  int32_t segment, tile;
  int32_t run_begin, run_end;  // from 0: nothing came before
  int32_t first_item;          // of the pass's runs
  int32_t last;                // 1: no run follows
};
// One launch of the decode kernel: decode rows and items from the end of the pass before it.
struct DecodePass {
  int32_t row_end, item_end;
};
// The same of a prompt's tiles. Whole tiles are the first items of the first pass; a tile whose
// runs are not all in one pass goes on in the next, as its first.
struct PrefillPass {
  int32_t item_end, merge_end;
};

// How the segments of a batch are cut.
struct PlanOptions {
  // Query vectors of a prefill tile; 0: a prompt's rows take the decode kernel.
  int prefill_tile = 0;
  // Splits whose partial results the workspace holds; at least those of one row.
  int partial_items = 0;
  // Of a tile's run; and how many runs' partial results the workspace holds (0: no tile is split).
  int run_tokens = 0;
  int partial_runs = 0;
  // A tile is so many blocks of threads, of which the device runs so many at once: tiles with more
  // than their share of runs are split.
  int kv_heads = 1;
  int resident_blocks = 1;
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
  const PrefillMerge* prefill_merges = nullptr;
  const DecodePass* passes = nullptr;
  const PrefillPass* prefill_passes = nullptr;
  int32_t pass_count = 0;
  int32_t prefill_pass_count = 0;
  int32_t whole_tiles = 0;
  int32_t row_count = 0;
  int32_t run_tokens = 0;
};

}  // namespace shoal::cuda
