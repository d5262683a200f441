// Where the parts in a ring buffer lie: each is contiguous, the oldest leaves first.
#pragma once

#include <cstdint>
#include <deque>
#include <optional>

namespace shoal {

// One thread at a time.
class ByteRing {
 public:
  explicit ByteRing(int64_t capacity) : capacity_(capacity) {}

  // The place of `bytes` behind the newest part, or at 0 when they do not fit before the end.
  // Nothing while older parts are in the way.
  std::optional<int64_t> Push(int64_t bytes) {
    int64_t at = 0;
    if (!parts_.empty()) {
      const int64_t head = parts_.front().offset;
      const int64_t tail = parts_.back().offset + parts_.back().bytes;
      const bool wrapped = parts_.back().offset < head;
      const int64_t behind = (wrapped ? head : capacity_) - tail;
      if (behind >= bytes) {
        at = tail;
      } else if (wrapped || head < bytes) {
        return std::nullopt;
      }
    } else if (bytes > capacity_) {
      return std::nullopt;
    }
    parts_.push_back({at, bytes});
    return at;
  }
  void Pop() { parts_.pop_front(); }
  bool empty() const { return parts_.empty(); }

 private:
  struct Part {
    int64_t offset;
    int64_t bytes;
  };
  int64_t capacity_;
  std::deque<Part> parts_;
};

}  // namespace shoal
