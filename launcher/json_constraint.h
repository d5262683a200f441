// Which tokens may come next so that the text stays within a JSON grammar.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "launcher/json_grammar.h"
#include "launcher/tokenizer.h"

namespace shoal {

// The vocabulary's bytes in order, so that a walk over it shares the work of common beginnings.
// Immutable; any number of constraints share one.
class ConstraintVocabulary {
 public:
  explicit ConstraintVocabulary(const Tokenizer& tokenizer);
  const std::string& bytes(int32_t token) const { return bytes_[token]; }
  const std::vector<int32_t>& sorted() const { return sorted_; }  // by bytes; those with any
  const std::vector<int32_t>& end_tokens() const { return end_tokens_; }
  int size() const { return static_cast<int>(bytes_.size()); }

 private:
  std::vector<std::string> bytes_;
  std::vector<int32_t> sorted_;
  std::vector<int32_t> end_tokens_;
};

// One sequence has one object. One thread.
class JsonConstraint {
 public:
  // prompt_length: tokens in front of the constrained text. The vocabulary must outlive the object.
  JsonConstraint(std::shared_ptr<const JsonGrammar> grammar, const ConstraintVocabulary& vocabulary,
                 int prompt_length);

  // One bit for each token that may follow `tokens` (the sequence so far, prompt included; it only
  // grows from call to call). End tokens are allowed where the JSON may end, and only they where it
  // must.
  std::vector<uint64_t> Mask(absl::Span<const int32_t> tokens);

 private:
  static constexpr size_t kMaxCached = 64;
  struct Walk;
  void Visit(Walk& walk, size_t begin, size_t end, size_t depth,
             const GrammarMatcher::State& state);
  std::vector<uint64_t> Compute(const GrammarMatcher::State& state);

  const ConstraintVocabulary* vocabulary_;
  GrammarMatcher matcher_;
  GrammarMatcher::State state_;
  size_t consumed_ = 0;
  // Inside a string or a number the same state comes again and again.
  std::map<GrammarMatcher::State, std::vector<uint64_t>> cache_;
};

}  // namespace shoal
