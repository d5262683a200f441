// Text to token ids and back, for the two kinds of tokenizer that GGUF checkpoints carry:
// SentencePiece-style BPE ("llama") and byte-level BPE ("gpt2").
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "launcher/pre_tokenizer.h"
#include "launcher/token_trie.h"
#include "launcher/tokenizer_data.h"
#include "shard/checkpoint.h"

namespace shoal {

// Immutable; usable from any number of threads at once.
class Tokenizer {
 public:
  // Reads tokenizer.* metadata; the checkpoint may be closed afterwards. Errors: kNotFound (no
  // vocabulary), kInvalidArgument (malformed), kUnimplemented (unknown model or pre-tokenizer; the
  // message lists the known ones).
  static absl::StatusOr<std::unique_ptr<Tokenizer>> FromCheckpoint(const Checkpoint& checkpoint);
  static absl::StatusOr<std::unique_ptr<Tokenizer>> FromData(TokenizerData data);

  // add_special: put BOS in front and EOS behind if the model wants them. parse_special: texts of
  // control tokens ("<|im_end|>") become those tokens; pass false for text that a user wrote, which
  // then can never produce one. Text need not be UTF-8: other bytes are encoded one by one.
  // kInvalidArgument beyond kMaxTextBytes or for a byte that the vocabulary cannot express.
  absl::StatusOr<std::vector<int32_t>> Encode(std::string_view text, bool add_special,
                                              bool parse_special) const;
  static constexpr size_t kMaxTextBytes = 256u << 20;

  // The text of a whole sequence; undoes the space that Encode puts in front. It may end within a
  // character: put it through Utf8Stream where that matters. Ids outside the vocabulary give
  // nothing.
  std::string Decode(std::span<const int32_t> ids, bool render_special) const;
  // The bytes that one token adds to a text, often a part of a character. Control and unknown
  // tokens give nothing unless render_special.
  std::string TokenBytes(int32_t id, bool render_special) const;

  int vocab_size() const { return static_cast<int>(data_.tokens.size()); }
  int bos() const { return data_.bos; }  // -1: none, as below
  int eos() const { return data_.eos; }
  int eot() const { return data_.eot; }
  int unk() const { return data_.unk; }
  bool adds_bos() const { return data_.add_bos; }
  // EOS, and whatever else ends a turn in the models at large ("<|im_end|>", "<|eot_id|>", ...).
  bool IsEndOfGeneration(int32_t id) const;
  const std::vector<int32_t>& end_of_generation_ids() const { return end_ids_; }  // rising

  TokenType type(int32_t id) const;  // REQUIRES: 0 <= id < vocab_size()
  // The vocabulary's own spelling ("▁the", "Ġthe", "<s>"); empty for an id outside the vocabulary.
  std::string_view TokenText(int32_t id) const;
  int32_t FindToken(std::string_view text) const;  // by that spelling; -1: none

  const std::string& model() const { return data_.model; }  // "llama" or "gpt2"
  const std::string& pre() const { return data_.pre; }
  const std::string& chat_template() const { return data_.chat_template; }  // empty: none
  const std::string& chat_template_tool_use() const { return data_.chat_template_tool_use; }

 private:
  struct Merge {
    int32_t rank = 0;
    int32_t id = -1;
  };
  // std::hash, for Debian's absl cannot hash std::string_view.
  using TextMap = absl::flat_hash_map<std::string_view, int32_t, std::hash<std::string_view>>;

  explicit Tokenizer(TokenizerData data) : data_(std::move(data)) {}

  absl::Status Build();
  void BuildSpecial();
  absl::Status BuildMerges();
  void BuildByteIds();
  void FindEndOfGeneration();

  absl::Status EncodePlain(std::string_view text, bool after_special,
                           std::vector<int32_t>* out) const;
  absl::Status EncodeSentencePiece(std::string_view text, bool space_prefix,
                                   std::vector<int32_t>* out) const;
  absl::Status EncodeByteLevel(std::string_view text, std::vector<int32_t>* out) const;
  absl::Status AppendBytes(std::string_view bytes, std::vector<int32_t>* out) const;

  TokenizerData data_;                   // the maps' keys point into its tokens and into bytes_
  std::vector<std::string> bytes_;       // what each token adds to a text
  TextMap ids_by_text_;                  // every token
  TextMap ids_by_bytes_;                 // tokens that plain text may become, by bytes_
  size_t longest_plain_ = 0;             // bytes of the longest key of ids_by_bytes_
  std::array<int32_t, 256> byte_ids_{};  // token of a single byte, -1: none
  absl::flat_hash_map<uint64_t, Merge> merges_;  // (left id << 32 | right id)
  TokenTrie user_defined_;                       // parse_special == false
  TokenTrie special_;  // parse_special == true: the former and control tokens
  std::unique_ptr<PreTokenizer> pre_tokenizer_;  // gpt2 only
  std::vector<int32_t> end_ids_;
};

}  // namespace shoal
