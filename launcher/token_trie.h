// Finds added tokens in text.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

#include "absl/container/flat_hash_map.h"

namespace shoal {

// Immutable after the last Add; then usable from several threads at once.
class TokenTrie {
 public:
  // REQUIRES: text is not empty. A text added twice keeps its first id.
  void Add(std::string_view text, int32_t id);

  struct Match {
    size_t begin = 0;
    size_t size = 0;  // 0: no match
    int32_t id = -1;
  };
  // The leftmost match at or after `from`, and the longest one there.
  Match FindFirst(std::string_view text, size_t from) const;

 private:
  // Edges of a tree over bytes: (node << 8 | byte) -> node. Node 0 is the root.
  absl::flat_hash_map<uint64_t, uint32_t> edges_;
  absl::flat_hash_map<uint32_t, int32_t> ids_;  // of nodes where a token ends
  std::array<bool, 256> starts_{};              // first bytes, to skip plain text quickly
  uint32_t nodes_ = 1;
};

}  // namespace shoal
