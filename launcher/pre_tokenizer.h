// Cuts text into words before byte-level BPE: merges never cross a word's edge.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace shoal {

// What a value of tokenizer.ggml.pre means. Static data, never freed.
struct PreTokenizerInfo {
  // Applied in turn, each to the pieces that the one before left: a match becomes a piece, and so
  // does what lies between two matches.
  std::vector<const char*> patterns;
  bool whole_words = false;  // a word that is a token as it stands is not built from merges
  bool add_bos = false;      // when the file does not say
};

// Null for an unknown name.
const PreTokenizerInfo* FindPreTokenizer(std::string_view name);
// All names, sorted, comma-separated: for error messages.
std::string KnownPreTokenizers();

// Immutable; usable from several threads at once.
class PreTokenizer {
 public:
  // kUnimplemented for a name that is not known; the message lists those that are.
  static absl::StatusOr<std::unique_ptr<PreTokenizer>> Create(std::string_view name);
  ~PreTokenizer();

  const PreTokenizerInfo& info() const { return *info_; }

  // Appends the end offset of every word, rising, the last one text.size(). Bytes that are not
  // UTF-8 count as control characters. kResourceExhausted when a pattern's match limit is reached.
  absl::Status Split(std::string_view text, std::vector<int32_t>* ends) const;

 private:
  struct Compiled;
  PreTokenizer() = default;

  const PreTokenizerInfo* info_ = nullptr;
  std::vector<std::unique_ptr<Compiled>> compiled_;
};

}  // namespace shoal
