#include "parallel/kv_cache.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "absl/strings/str_cat.h"
#include "kernels/status_macros.h"

namespace shoal {

absl::StatusOr<KvCache> KvCache::Create(Backend& backend, const KvShape& shape, int layers,
                                        int blocks, int slots, int blocks_per_slot,
                                        int window_blocks) {
  KvCache kv;
  kv.backend_ = &backend;
  kv.shape_ = shape;
  kv.layers_ = layers;
  kv.blocks_ = blocks;
  kv.slots_ = slots;
  kv.blocks_per_slot_ = blocks_per_slot;
  kv.window_blocks_ = window_blocks;
  if ((int64_t{blocks} * layers) + window_blocks > std::numeric_limits<int32_t>::max()) {
    return absl::InvalidArgumentError(
        absl::StrCat(blocks, " KV blocks of ", layers, " layers are more than can be numbered"));
  }
  absl::StatusOr<DeviceMemory> pool =
      backend.Allocate(blocks * BlockBytes(shape, layers) + window_blocks * shape.block_bytes());
  if (!pool.ok()) return pool.status();
  kv.pool_ = *std::move(pool);
  kv.tables_.assign(int64_t{slots} * blocks_per_slot, -1);
  return kv;
}

KvLayer KvCache::layer(int local_layer) {
  return {shape_, pool_.data() + local_layer * shape_.block_bytes(), BlockBytes(shape_, layers_)};
}

absl::Status KvCache::Apply(const std::vector<Batch::TableEntry>& entries) {
  for (const Batch::TableEntry& e : entries) {
    const bool on_disk = e.block <= Batch::kOnDisk && window_blocks_ > 0 && e.index >= 0 &&
                         e.index % kKvPageBlocks == 0 &&
                         e.index + kKvPageBlocks <= blocks_per_slot_;
    if (on_disk && e.slot >= 0 && e.slot < slots_) {
      std::fill_n(tables_.begin() + int64_t{e.slot} * blocks_per_slot_ + e.index, kKvPageBlocks,
                  e.block);
      continue;
    }
    if (e.slot < 0 || e.slot >= slots_ || e.index < 0 || e.index >= blocks_per_slot_ ||
        e.block < 0 || e.block >= blocks_) {
      return absl::InternalError(absl::StrCat(
          "block table entry (slot ", e.slot, ", index ", e.index, ", block ", e.block,
          ") lies outside ", slots_, " x ", blocks_per_slot_, " and ", blocks_, " blocks"));
    }
    tables_[int64_t{e.slot} * blocks_per_slot_ + e.index] = e.block;
  }
  return absl::OkStatus();
}

absl::Status KvCache::CheckBlocks(absl::Span<const int32_t> blocks, bool may_skip) const {
  for (const int32_t b : blocks) {
    if (b < blocks_ && (b >= 0 || may_skip)) continue;
    return absl::InternalError(absl::StrCat("a KV page names block ", b, " of ", blocks_));
  }
  return absl::OkStatus();
}

absl::StatusOr<DeviceMemory> KvCache::MakeStaging(int64_t bytes, int buffers) {
  if (backend_->shares_host_memory()) return AllocateHost(bytes);
  SHOAL_ASSIGN_OR_RETURN(transfers_, KvTransfers::Create(*backend_));
  SHOAL_RETURN_IF_ERROR(transfers_->UseBuffers(buffers));
  SHOAL_ASSIGN_OR_RETURN(DeviceMemory staging, transfers_->AllocateStaging(bytes));
  std::memset(staging.data(), 0, bytes);
  return staging;
}

absl::Status KvCache::CopyBlock(int32_t from, int32_t to) {
  SHOAL_RETURN_IF_ERROR(CheckBlocks({from, to}, /*may_skip=*/false));
  const int64_t bytes = BlockBytes(shape_, layers_);
  backend_->Copy(pool_.data() + to * bytes, pool_.data() + from * bytes, bytes);
  return absl::OkStatus();
}

void KvCache::CopyOut(int layer, absl::Span<const int32_t> blocks, uint8_t* to) {
  const KvLayer kv = this->layer(layer);
  const int64_t bytes = shape_.block_bytes();
  for (size_t i = 0; i < blocks.size(); ++i, to += bytes) {
    const uint8_t* const from = kv.base + blocks[i] * kv.block_stride;
    if (transfers_ != nullptr) {
      transfers_->Out(to, from, bytes);
    } else {
      std::memcpy(to, from, bytes);
    }
  }
}

absl::Status KvCache::CopyIn(int layer, absl::Span<const int32_t> blocks, const uint8_t* from) {
  const KvLayer kv = this->layer(layer);
  const int64_t bytes = shape_.block_bytes();
  std::vector<KvTransfers::Move> moves;
  for (size_t i = 0; i < blocks.size(); ++i, from += bytes) {
    if (blocks[i] < 0) continue;
    uint8_t* const to = kv.base + blocks[i] * kv.block_stride;
    if (transfers_ != nullptr) {
      moves.push_back({to, from, bytes});
    } else {
      std::memcpy(to, from, bytes);
    }
  }
  return transfers_ != nullptr ? transfers_->In(moves) : absl::OkStatus();
}

absl::Status KvCache::EndCopyOut(int buffer) {
  return transfers_ != nullptr ? transfers_->EndOut(buffer) : absl::OkStatus();
}
absl::Status KvCache::AwaitCopyOut(int buffer) {
  return transfers_ != nullptr ? transfers_->AwaitOut(buffer) : absl::OkStatus();
}
absl::Status KvCache::BeginCopyIn() {
  return transfers_ != nullptr ? transfers_->BeginIn() : absl::OkStatus();
}
absl::Status KvCache::EnterThread() {
  return transfers_ != nullptr ? transfers_->EnterThread() : absl::OkStatus();
}

absl::Status KvCache::ToWindow(int window_page, const uint8_t* part) {
  const int64_t bytes = kKvPageBlocks * shape_.block_bytes();
  uint8_t* const to = pool_.data() + blocks_ * BlockBytes(shape_, layers_) + window_page * bytes;
  if (transfers_ != nullptr) return transfers_->ToWindow(to, part, bytes);
  std::memcpy(to, part, bytes);
  return absl::OkStatus();
}
absl::Status KvCache::WindowIsRead() {
  return transfers_ != nullptr ? transfers_->WindowIsRead() : absl::OkStatus();
}

int KvCache::PagesOnDisk(int slot) const {
  int pages = 0;
  while ((pages + 1) * kKvPageBlocks <= blocks_per_slot_ &&
         table(slot)[pages * kKvPageBlocks] <= Batch::kOnDisk) {
    ++pages;
  }
  return pages;
}

absl::Status KvCache::CheckRun(const Batch::Run& run, int rows) const {
  const bool in_batch = run.row >= 0 && run.rows > 0 && run.row + run.rows <= rows;
  const bool in_table = run.slot >= 0 && run.slot < slots_ && run.pos >= 0 &&
                        (run.pos + run.rows - 1) / kKvBlockTokens < blocks_per_slot_;
  if (!in_batch || !in_table) {
    return absl::InternalError(absl::StrCat("run of slot ", run.slot, ", rows ", run.row, "+",
                                            run.rows, ", position ", run.pos,
                                            " lies outside the batch or its table"));
  }
  const int32_t* blocks = table(run.slot);
  const int on_disk = PagesOnDisk(run.slot) * kKvPageBlocks;
  if (on_disk > run.pos / kKvBlockTokens) {
    return absl::InternalError(
        absl::StrCat("slot ", run.slot, " has no block to write position ", run.pos, " to"));
  }
  for (int b = on_disk; b <= (run.pos + run.rows - 1) / kKvBlockTokens; ++b) {
    if (blocks[b] < 0) {
      return absl::InternalError(
          absl::StrCat("slot ", run.slot, " has no block for position ", b * kKvBlockTokens));
    }
  }
  return absl::OkStatus();
}

}  // namespace shoal
