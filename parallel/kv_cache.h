// One rank's KV blocks and the block tables of the sequences that use them.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/device_memory.h"
#include "offload/kv_pager.h"
#include "parallel/batch.h"

namespace shoal {

// Memory layout: [block][layer held here][K, V], so one block with all its layers is one run of
// bytes. Used by the rank's engine thread; the pager moves blocks to and from disk.
class KvCache final : public KvMemory {
 public:
  // layers: those this rank holds. slots x blocks_per_slot is the size of the block tables.
  // The blocks are memory of the backend's device.
  static absl::StatusOr<KvCache> Create(Backend& backend, const KvShape& shape, int layers,
                                        int blocks, int slots, int blocks_per_slot);
  static int64_t BlockBytes(const KvShape& shape, int layers) {
    return layers * shape.block_bytes();
  }

  KvLayer layer(int local_layer);
  // Rejects entries out of range: a batch comes from another process.
  absl::Status Apply(const std::vector<Batch::TableEntry>& entries);
  const int32_t* table(int slot) const { return tables_.data() + int64_t{slot} * blocks_per_slot_; }
  absl::Status CheckRun(const Batch::Run& run, int rows) const;
  absl::Status CheckBlocks(absl::Span<const int32_t> blocks, bool may_skip) const;
  // As KvMemory, for blocks in host memory. CopyIn runs on the pager's thread, in blocks that no
  // batch names meanwhile.
  void CopyOut(int layer, absl::Span<const int32_t> blocks, uint8_t* to) override;
  void CopyIn(int layer, absl::Span<const int32_t> blocks, const uint8_t* from) override;
  int64_t bytes() const { return pool_.size(); }

 private:
  KvShape shape_;
  int layers_ = 0;
  int blocks_ = 0;
  int slots_ = 0;
  int blocks_per_slot_ = 0;
  DeviceMemory pool_;
  std::vector<int32_t> tables_;  // [slots, blocks_per_slot], -1 where unset
};

}  // namespace shoal
