// The merge loop that both kinds of BPE share: always join the best adjacent pair, leftmost first.
#pragma once

#include <cstdint>
#include <queue>
#include <vector>

namespace shoal {

// A run of the text that is one token, or (id -1) a character that is none. Symbols form a list
// through prev and next; a symbol that was joined into its left neighbour has size 0.
struct Symbol {
  int32_t begin = 0;
  int32_t size = 0;
  int32_t id = -1;
  int32_t prev = -1;
  int32_t next = -1;
};

struct MergeTarget {
  double cost = 0;  // the smallest is merged first
  int32_t id = -1;  // token of the joined pair; -1: the pair does not merge
};

// Links `symbols`, which lie in text order, and merges until no pair is left. O(n log n): each
// merge removes a symbol and queues at most two pairs. `lookup(left, right)` -> MergeTarget.
template <typename Lookup>
void MergeSymbols(std::vector<Symbol>& symbols, const Lookup& lookup) {
  struct Pair {
    double cost;
    int32_t left, right, size, id;
    bool operator<(const Pair& other) const {  // of a max-heap
      return cost != other.cost ? cost > other.cost : left > other.left;
    }
  };
  std::priority_queue<Pair> queue;
  const auto consider = [&](int32_t left, int32_t right) {
    if (left < 0 || right < 0) return;
    const MergeTarget target = lookup(symbols[left], symbols[right]);
    if (target.id < 0) return;
    queue.push({target.cost, left, right, symbols[left].size + symbols[right].size, target.id});
  };
  const auto count = static_cast<int32_t>(symbols.size());
  for (int32_t i = 0; i < count; ++i) {
    symbols[i].prev = i - 1;
    symbols[i].next = i + 1 < count ? i + 1 : -1;
  }
  for (int32_t i = 1; i < count; ++i) consider(i - 1, i);
  while (!queue.empty()) {
    const Pair pair = queue.top();
    queue.pop();
    Symbol& left = symbols[pair.left];
    Symbol& right = symbols[pair.right];
    // Symbols only grow, so equal sizes mean that this is still the pair that was queued.
    if (left.size == 0 || right.size == 0 || left.size + right.size != pair.size) continue;
    left.size = pair.size;
    left.id = pair.id;
    left.next = right.next;
    right.size = 0;
    if (left.next >= 0) symbols[left.next].prev = pair.left;
    consider(left.prev, pair.left);
    consider(pair.left, left.next);
  }
}

}  // namespace shoal
