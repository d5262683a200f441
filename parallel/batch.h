// One step of the engine as flat plain data: what rank 0 broadcasts and every rank runs.
//
// Rows are ordered: first all decode rows, then all prefill rows. Workers keep one block table per
// slot and learn of new entries here, so a batch stays small however long its sequences are.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "comm/communicator.h"
#include "offload/kv_page_file.h"

namespace shoal {

struct Batch {
  enum class Kind : int32_t {
    kForward,      // run the model over the rows
    kFetchLogits,  // last stage: send the whole logit rows `fetch` of step `step` again
    kListPages,    // tell rank 0 which KV pages of an earlier run this rank has
    kAwaitLoads,   // wait for the pages that earlier batches load, tell rank 0 which failed
    kAwaitStream,  // tell rank 0 which pages that earlier batches stream could not be read
    kStats,        // send RankStats to rank 0
    kStop,         // write the pages, leave the loop
  };

  // A run of rows of one sequence: rows [row, row + rows) are positions [pos, pos + rows) of slot
  // `slot`.
  struct Run {
    int32_t slot = 0;
    int32_t row = 0;
    int32_t rows = 0;
    int32_t pos = 0;
    int32_t decode = 0;  // 1: the rows lie in the decode part
  };

  // Block table of `slot`: entry `index` is now `block`. kOnDisk - r: the page that begins there is
  // read from record r by every batch that needs it; such pages lead the table.
  static constexpr int32_t kOnDisk = -2;
  struct TableEntry {
    int32_t slot = 0;
    int32_t index = 0;
    int32_t block = 0;
  };

  // Before anything else of the batch, in this order: blocks go to, or begin to come from, a record
  // of every rank's page file (offload/kv_pager.h), or a block is copied. The content of a block is
  // that of the batches before.
  struct PageOp {
    enum class Kind : int32_t { kLoad, kWrite, kCopy };
    Kind kind = Kind::kLoad;
    int32_t record = 0;
    int32_t count = 0;                   // of blocks
    int32_t unused = 0;                  // no bytes are left undefined
    int32_t blocks[kKvPageBlocks] = {};  // loads skip those < 0; a copy is from [0] to [1]
    KvName prefix[kKvPageBlocks] = {};   // that ends with each block
  };
  static_assert(sizeof(PageOp) == 336);

  // A row whose logits are wanted, and how much of them rank 0 needs.
  struct LogitRow {
    static constexpr int32_t kHiddenState = -1;
    int32_t row = 0;
    // Best tokens of each vocabulary shard; 0: the whole row; kHiddenState: no logits, but the
    // normed hidden state (an embedding).
    int32_t candidates = 0;
    float inv_temperature = 1;  // of the log-sum-exp that comes along; 0: none is wanted
    int32_t target = -1;  // >= 0: only this token's logit and the log-sum-exp (scoring a text)
  };

  Kind kind = Kind::kForward;
  int64_t step = 0;
  int32_t decode_rows = 0;
  int32_t prefill_head = 0;     // 1: the head runs on the prefill path too (scoring a text)
  std::vector<int32_t> tokens;  // [rows]
  std::vector<Run> runs;
  std::vector<PageOp> pages;
  std::vector<TableEntry> table;
  std::vector<LogitRow> logits;
  std::vector<int32_t> fetch;  // indices into the logits of step `step`

  int rows() const { return static_cast<int>(tokens.size()); }
};

// The encoding is this machine's own (all ranks run the same binary): counts, then the arrays.
std::vector<uint8_t> EncodeBatch(const Batch& batch);
absl::StatusOr<Batch> DecodeBatch(absl::Span<const uint8_t> bytes);

// Rank 0 sends, the others receive; one message for a batch of up to 2 KiB, else two.
absl::Status BroadcastBatch(Communicator& world, Batch& batch);

}  // namespace shoal
