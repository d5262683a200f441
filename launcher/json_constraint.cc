#include "launcher/json_constraint.h"

#include <algorithm>
#include <utility>

namespace shoal {
namespace {

constexpr size_t kMaxTokenBytes = 256;  // longer tokens (runs of spaces) are never needed

}  // namespace

ConstraintVocabulary::ConstraintVocabulary(const Tokenizer& tokenizer)
    : end_tokens_(tokenizer.end_of_generation_ids()) {
  bytes_.resize(tokenizer.vocab_size());
  for (int32_t id = 0; id < tokenizer.vocab_size(); ++id) {
    if (tokenizer.IsEndOfGeneration(id)) continue;
    bytes_[id] = tokenizer.TokenBytes(id, /*render_special=*/false);
    if (bytes_[id].size() > kMaxTokenBytes) bytes_[id].clear();
    if (!bytes_[id].empty()) sorted_.push_back(id);
  }
  std::sort(sorted_.begin(), sorted_.end(),
            [this](int32_t a, int32_t b) { return bytes_[a] < bytes_[b]; });
}

JsonConstraint::JsonConstraint(std::shared_ptr<const JsonGrammar> grammar,
                               const ConstraintVocabulary& vocabulary, int prompt_length)
    : vocabulary_(&vocabulary),
      matcher_(std::move(grammar)),
      state_(matcher_.Start()),
      consumed_(prompt_length) {}

struct JsonConstraint::Walk {
  std::vector<uint64_t> mask;
};

// Tokens [begin, end) of the sorted vocabulary share their first `depth` bytes, which lead to
// `state`.
void JsonConstraint::Visit(Walk& walk, size_t begin, size_t end, size_t depth,
                           const GrammarMatcher::State& state) {
  const std::vector<int32_t>& sorted = vocabulary_->sorted();
  for (; begin < end && vocabulary_->bytes(sorted[begin]).size() == depth; ++begin) {
    const int32_t token = sorted[begin];
    walk.mask[token / 64] |= uint64_t{1} << (token % 64);
  }
  while (begin < end) {
    const char byte = vocabulary_->bytes(sorted[begin])[depth];
    const auto next = std::partition_point(
        sorted.begin() + static_cast<ptrdiff_t>(begin),
        sorted.begin() + static_cast<ptrdiff_t>(end), [&](int32_t t) {
          return static_cast<uint8_t>(vocabulary_->bytes(t)[depth]) <= static_cast<uint8_t>(byte);
        });
    const auto group_end = static_cast<size_t>(next - sorted.begin());
    const GrammarMatcher::State after = matcher_.Step(state, static_cast<uint8_t>(byte));
    if (!after.empty()) Visit(walk, begin, group_end, depth + 1, after);
    begin = group_end;
  }
}

std::vector<uint64_t> JsonConstraint::Compute(const GrammarMatcher::State& state) {
  Walk walk;
  walk.mask.resize((static_cast<size_t>(vocabulary_->size()) + 63) / 64);
  Visit(walk, 0, vocabulary_->sorted().size(), 0, state);
  const bool stuck =
      std::all_of(walk.mask.begin(), walk.mask.end(), [](uint64_t w) { return w == 0; });
  if (GrammarMatcher::MayEnd(state) || stuck) {
    for (int32_t token : vocabulary_->end_tokens()) {
      walk.mask[token / 64] |= uint64_t{1} << (token % 64);
    }
  }
  return std::move(walk.mask);
}

std::vector<uint64_t> JsonConstraint::Mask(absl::Span<const int32_t> tokens) {
  for (; consumed_ < tokens.size(); ++consumed_) {
    for (const char c : vocabulary_->bytes(tokens[consumed_])) {
      state_ = matcher_.Step(state_, static_cast<uint8_t>(c));
    }
  }
  if (const auto it = cache_.find(state_); it != cache_.end()) return it->second;
  if (cache_.size() >= kMaxCached) cache_.clear();
  return cache_.emplace(state_, Compute(state_)).first->second;
}

}  // namespace shoal
