// Who guesses how a sequence goes on, so that one pass over the weights can check several tokens
// (speculative decoding). A guess changes what a step computes, never what is sampled.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <unordered_map>
#include <vector>

#include "absl/types/span.h"
#include "parallel/draft.h"
#include "parallel/sequence.h"

namespace shoal {

// One thread.
class Drafter {
 public:
  virtual ~Drafter() = default;
  // At most `most` tokens that may follow `tokens`, which is sequence `id` so far: from call to
  // call it only grows, until Forget(id). No tokens: no idea.
  virtual Draft Propose(SequenceId id, absl::Span<const int32_t> tokens, int most) = 0;
  virtual void Forget(SequenceId id) = 0;
};

// Where the last tokens of a text stood before. Bounded: at most 192 KiB, and 24 bytes for each
// token, which is a thousandth of its KV cache.
class NgramIndex {
 public:
  static constexpr int kSizes[] = {5, 3, 2};  // n-grams that are looked up, the longest first
  static constexpr int kLongestMatch = 16;    // longer ones count as this long

  // What followed the longest match of the end of `tokens`, the latest of several. A text that
  // repeats itself within the draft goes on so.
  Draft Find(absl::Span<const int32_t> tokens, int most);

 private:
  void Extend(absl::Span<const int32_t> tokens);

  // For each size a table without chains: slot (hash of an n-gram) -> position behind its latest
  // occurrence, 0: none. Others may have taken the slot, so a match is compared.
  std::vector<int32_t> tables_[std::size(kSizes)];
  size_t indexed_ = 1;  // positions before it are in the tables
};

// Prompt lookup: a sequence goes on as it did after the same tokens earlier, in prompt or answer.
class NgramDrafter final : public Drafter {
 public:
  Draft Propose(SequenceId id, absl::Span<const int32_t> tokens, int most) override {
    return indices_[id].Find(tokens, most);
  }
  void Forget(SequenceId id) override { indices_.erase(id); }

 private:
  std::unordered_map<SequenceId, NgramIndex> indices_;
};

}  // namespace shoal
