// A vocabulary small enough to read: every byte, a few words, and an end token.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "launcher/tokenizer.h"

namespace shoal {

// Ids: 0 <unk>, 1 <s>, 2 </s>, 3 + b for byte b, then `words`.
constexpr int32_t kTinyEos = 2;
inline int32_t TinyByte(unsigned char b) { return 3 + b; }
constexpr int32_t kTinyWords = 3 + 256;

inline std::unique_ptr<Tokenizer> MakeTinyTokenizer(const std::vector<std::string>& words) {
  TokenizerData data;
  data.model = "llama";
  const auto add = [&](std::string text, TokenType type) {
    data.tokens.push_back(std::move(text));
    data.scores.push_back(0);
    data.types.push_back(type);
  };
  add("<unk>", TokenType::kUnknown);
  add("<s>", TokenType::kControl);
  add("</s>", TokenType::kControl);
  for (int b = 0; b < 256; ++b) {
    char name[8];
    std::snprintf(name, sizeof name, "<0x%02X>", b);
    add(name, TokenType::kByte);
  }
  for (const std::string& w : words) add(w, TokenType::kNormal);
  data.bos = 1;
  data.eos = kTinyEos;
  data.unk = 0;
  data.add_bos = true;
  data.add_space_prefix = false;
  auto tokenizer = Tokenizer::FromData(std::move(data));
  return tokenizer.ok() ? *std::move(tokenizer) : nullptr;
}

}  // namespace shoal
