#include "launcher/token_trie.h"

namespace shoal {

void TokenTrie::Add(std::string_view text, int32_t id) {
  starts_[static_cast<uint8_t>(text[0])] = true;
  uint32_t node = 0;
  for (const char c : text) {
    const uint64_t key = uint64_t{node} << 8 | static_cast<uint8_t>(c);
    const auto [edge, added] = edges_.try_emplace(key, nodes_);
    if (added) ++nodes_;
    node = edge->second;
  }
  ids_.try_emplace(node, id);
}

TokenTrie::Match TokenTrie::FindFirst(std::string_view text, size_t from) const {
  for (size_t begin = from; begin < text.size(); ++begin) {
    if (!starts_[static_cast<uint8_t>(text[begin])]) continue;
    Match match;
    uint32_t node = 0;
    for (size_t i = begin; i < text.size(); ++i) {
      const auto edge = edges_.find(uint64_t{node} << 8 | static_cast<uint8_t>(text[i]));
      if (edge == edges_.end()) break;
      node = edge->second;
      if (const auto id = ids_.find(node); id != ids_.end()) {
        match = {begin, i + 1 - begin, id->second};
      }
    }
    if (match.size > 0) return match;
  }
  return {};
}

}  // namespace shoal
