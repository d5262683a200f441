// The tokenizer part of a checkpoint as plain data, apart from the code that uses it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "shard/checkpoint.h"

namespace shoal {

// Numbers as in GGUF's tokenizer.ggml.token_type.
enum class TokenType : uint8_t {
  kNormal = 1,
  kUnknown = 2,
  kControl = 3,      // never comes from plain text, hidden when rendering
  kUserDefined = 4,  // found in any text before everything else
  kUnused = 5,
  kByte = 6,  // text is "<0xHH>"
};

struct TokenizerData {
  std::string model;  // "llama": SentencePiece-style BPE by score; "gpt2": byte-level BPE by merges
  std::string pre;    // gpt2 only: name of the pre-tokenizer; empty means "default"
  std::vector<std::string> tokens;
  std::vector<float> scores;        // llama only; same length as tokens, or empty: all 0
  std::vector<TokenType> types;     // same length as tokens, or empty: all kNormal
  std::vector<std::string> merges;  // gpt2 only: "left right" by falling priority
  // -1: none
  int32_t bos = -1;
  int32_t eos = -1;
  int32_t eot = -1;
  int32_t eom = -1;
  int32_t unk = -1;
  bool add_bos = false;
  bool add_eos = false;
  bool add_space_prefix = false;
  // The model was trained with white space after special tokens eaten (Phi-3).
  bool strip_after_special = false;
  std::string chat_template;           // empty: none
  std::string chat_template_tool_use;  // a second template some models use with tools; often empty
};

// Reads tokenizer.* metadata and fills in llama.cpp's defaults. kNotFound when the file has no
// vocabulary, kInvalidArgument for values of the wrong kind, kUnimplemented for other models.
absl::StatusOr<TokenizerData> ReadTokenizerData(const Checkpoint& checkpoint);

// What the code relies on: lengths that agree, ids in range, distinct texts, finite scores, byte
// tokens that name a byte, merges that name tokens. kInvalidArgument names the entry.
absl::Status ValidateTokenizerData(const TokenizerData& data);

}  // namespace shoal
