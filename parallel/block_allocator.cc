#include "parallel/block_allocator.h"

#include <xxhash.h>

#include "kernels/check.h"

namespace shoal {

PrefixHash ExtendPrefix(PrefixHash previous, absl::Span<const int32_t> tokens) {
  XXH3_state_t* state = XXH3_createState();
  XXH3_128bits_reset(state);
  XXH3_128bits_update(state, &previous, sizeof previous);
  XXH3_128bits_update(state, tokens.data(), tokens.size() * sizeof(int32_t));
  const XXH128_hash_t h = XXH3_128bits_digest(state);
  XXH3_freeState(state);
  return {h.low64, h.high64};
}

BlockAllocator::BlockAllocator(int blocks)
    : refs_(blocks, 0), hash_of_(blocks), idle_at_(blocks, idle_.end()) {
  free_.reserve(blocks);
  for (int b = blocks - 1; b >= 0; --b) free_.push_back(b);
}

std::optional<int> BlockAllocator::Allocate() {
  int block = 0;
  if (!free_.empty()) {
    block = free_.back();
    free_.pop_back();
  } else if (!idle_.empty()) {
    block = idle_.front();
    idle_.pop_front();
    idle_at_[block] = idle_.end();
    refs_[block] = 1;
    Forget(block);
  } else {
    return std::nullopt;
  }
  refs_[block] = 1;
  return block;
}

std::optional<int> BlockAllocator::Lookup(const PrefixHash& hash) {
  const auto it = known_.find(hash);
  if (it == known_.end()) return std::nullopt;
  const int block = it->second;
  if (refs_[block]++ == 0) {
    idle_.erase(idle_at_[block]);
    idle_at_[block] = idle_.end();
  }
  return block;
}

void BlockAllocator::Share(int block) {
  SHOAL_CHECK(refs_[block] > 0, "a shared block has a user");
  ++refs_[block];
}

void BlockAllocator::Publish(int block, const PrefixHash& hash) {
  SHOAL_CHECK(refs_[block] > 0, "a published block has a user");
  if (hash_of_[block].has_value() || known_.contains(hash)) return;
  known_.emplace(hash, block);
  hash_of_[block] = hash;
}

void BlockAllocator::Release(int block) {
  SHOAL_CHECK(refs_[block] > 0, "a block is released once for each reference");
  if (--refs_[block] > 0) return;
  if (hash_of_[block].has_value()) {
    idle_at_[block] = idle_.insert(idle_.end(), block);
  } else {
    free_.push_back(block);
  }
}

void BlockAllocator::Forget(int block) {
  if (!hash_of_[block].has_value()) return;
  known_.erase(*hash_of_[block]);
  hash_of_[block].reset();
  if (refs_[block] > 0) return;
  idle_.erase(idle_at_[block]);
  idle_at_[block] = idle_.end();
  free_.push_back(block);
}

void BlockAllocator::Restore(absl::Span<const std::pair<int, PrefixHash>> held) {
  SHOAL_CHECK(in_use() == 0 && known_.empty(), "blocks are restored before any is handed out");
  for (const auto& [block, hash] : held) {
    if (!known_.emplace(hash, block).second) continue;
    hash_of_[block] = hash;
    idle_at_[block] = idle_.insert(idle_.end(), block);
  }
  std::erase_if(free_, [this](int block) { return hash_of_[block].has_value(); });
}

}  // namespace shoal
