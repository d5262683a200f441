// Which KV blocks are in use, and which hold a prefix that may be wanted again. Rank 0 only; no
// I/O. The records of the page file are handed out by the same rules: there a "block" is a record.
//
// A full block is known by a hash over its tokens, all tokens before it and a salt, so that a later
// sequence that starts alike takes it over (as vLLM's automatic prefix caching does). A block that
// nobody uses but that is known stays until its memory is needed, least recently used first.
#pragma once

#include <cstdint>
#include <list>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/types/span.h"

namespace shoal {

// 128 bits: a collision would hand one sequence another's context.
struct PrefixHash {
  uint64_t low = 0;
  uint64_t high = 0;
  friend bool operator==(const PrefixHash&, const PrefixHash&) = default;
};

struct PrefixHasher {
  size_t operator()(const PrefixHash& h) const { return h.low; }
};

// Hash of a block's tokens that follows `previous` (the salt, for the first block).
PrefixHash ExtendPrefix(PrefixHash previous, absl::Span<const int32_t> tokens);

// One thread.
class BlockAllocator {
 public:
  explicit BlockAllocator(int blocks);

  int total() const { return static_cast<int>(refs_.size()); }
  // Blocks that Allocate() can hand out: never used, released, or cached without a user.
  int available() const { return static_cast<int>(free_.size() + idle_.size()); }
  int in_use() const { return total() - available(); }

  // A block with one reference, its old content forgotten; nullopt when all are in use.
  std::optional<int> Allocate();
  // Takes one more reference on the block that holds this prefix; nullopt when none does.
  std::optional<int> Lookup(const PrefixHash& hash);
  bool Contains(const PrefixHash& hash) const { return known_.contains(hash); }
  // Takes one more reference on a block in use.
  void Share(int block);
  bool shared(int block) const { return refs_[block] > 1; }
  // The block now holds this whole prefix. Keeps the first block when two hold the same.
  void Publish(int block, const PrefixHash& hash);
  void Release(int block);
  // What the block holds is no longer known, whoever uses it.
  void Forget(int block);
  // Blocks that nobody uses hold these prefixes, the least recently used first. REQUIRES: nothing
  // is handed out yet.
  void Restore(absl::Span<const std::pair<int, PrefixHash>> held);

 private:
  std::vector<int> refs_;
  std::vector<std::optional<PrefixHash>> hash_of_;
  std::vector<int> free_;
  std::list<int> idle_;  // cached, no users; front is the least recently used
  std::vector<std::list<int>::iterator> idle_at_;
  std::unordered_map<PrefixHash, int, PrefixHasher> known_;
};

}  // namespace shoal
