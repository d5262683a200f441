// One rank's KV blocks and the block tables of the sequences that use them.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/device_memory.h"
#include "offload/kv_pager.h"
#include "offload/kv_transfers.h"
#include "parallel/batch.h"

namespace shoal {

// Memory layout: [block][layer held here][K, V], so one block with all its layers is one run of
// bytes; the window's blocks, of one layer each, are behind them. Used by the rank's engine thread;
// the pager moves blocks to and from disk.
class KvCache final : public KvMemory {
 public:
  // layers: those this rank holds. slots x blocks_per_slot is the size of the block tables.
  // The blocks are memory of the backend's device, which lives longer. window_blocks: of one layer,
  // for pages that pass by.
  static absl::StatusOr<KvCache> Create(Backend& backend, const KvShape& shape, int layers,
                                        int blocks, int slots, int blocks_per_slot,
                                        int window_blocks);
  static int64_t BlockBytes(const KvShape& shape, int layers) {
    return layers * shape.block_bytes();
  }

  KvLayer layer(int local_layer);
  // Rejects entries out of range: a batch comes from another process.
  absl::Status Apply(const std::vector<Batch::TableEntry>& entries);
  // Leading pages of the slot that are on disk only, and the record of one of them.
  int PagesOnDisk(int slot) const;
  int RecordOf(int slot, int page) const {
    return Batch::kOnDisk - table(slot)[page * kKvPageBlocks];
  }
  // The blocks of one layer beside the window, for attention to both: in FlatLayer(), block b of
  // the pool is FlatBlock(layer, b), block i of the window WindowBlock(i).
  KvLayer FlatLayer() { return {shape_, pool_.data(), shape_.block_bytes()}; }
  int32_t FlatBlock(int local_layer, int block) const { return block * layers_ + local_layer; }
  int32_t WindowBlock(int i) const { return blocks_ * layers_ + i; }
  // Puts a page's part [block][K, V] into the window, as its page `window_page`: attention from now
  // on sees it. `part` may change when this returns.
  absl::Status ToWindow(int window_page, const uint8_t* part);
  // Behind the attention that read the window: it may be filled again.
  absl::Status WindowIsRead();
  int window_blocks() const { return window_blocks_; }

  const int32_t* table(int slot) const { return tables_.data() + int64_t{slot} * blocks_per_slot_; }
  absl::Status CheckRun(const Batch::Run& run, int rows) const;
  absl::Status CheckBlocks(absl::Span<const int32_t> blocks, bool may_skip) const;
  // All layers of a block, behind the ops before.
  absl::Status CopyBlock(int32_t from, int32_t to);
  // As KvMemory. CopyIn runs on the pager's threads, in blocks that no batch names meanwhile.
  absl::StatusOr<DeviceMemory> MakeStaging(int64_t bytes, int buffers) override;
  void CopyOut(int layer, absl::Span<const int32_t> blocks, uint8_t* to) override;
  absl::Status CopyIn(int layer, absl::Span<const int32_t> blocks, const uint8_t* from) override;
  absl::Status EndCopyOut(int buffer) override;
  absl::Status AwaitCopyOut(int buffer) override;
  absl::Status BeginCopyIn() override;
  absl::Status EnterThread() override;
  int64_t bytes() const { return pool_.size(); }

 private:
  KvShape shape_;
  int layers_ = 0;
  int blocks_ = 0;
  int slots_ = 0;
  int blocks_per_slot_ = 0;
  int window_blocks_ = 0;
  Backend* backend_ = nullptr;
  DeviceMemory pool_;
  std::unique_ptr<KvTransfers> transfers_;  // null while pages stay, and in host memory
  // [slots, blocks_per_slot], -1 where unset, all 16 entries of a page on disk kOnDisk - record.
  std::vector<int32_t> tables_;
};

}  // namespace shoal
