// Any bytes as a vocabulary and a text: what is accepted must encode and decode without a fault,
// and a vocabulary that has a token for each byte must give every text back.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

#include "launcher/token_text.h"
#include "launcher/tokenizer.h"
#include "launcher/utf8_stream.h"

namespace shoal {
namespace {

// Reads the input piece by piece; an empty input gives zeros.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : rest_(reinterpret_cast<const char*>(data), size) {}

  uint8_t Byte() {
    if (rest_.empty()) return 0;
    const char c = rest_[0];
    rest_.remove_prefix(1);
    return static_cast<uint8_t>(c);
  }
  std::string Text(size_t max) {
    const size_t wanted = Byte() % (max + 1);
    const std::string text(rest_.substr(0, wanted));
    rest_.remove_prefix(text.size());
    return text;
  }
  std::string_view rest() const { return rest_; }

 private:
  std::string_view rest_;
};

constexpr const char* kPreTokenizers[] = {
    "default", "gpt-2",     "llama-bpe", "qwen2",  "deepseek-llm", "deepseek-coder",
    "falcon",  "starcoder", "gpt-4o",    "tekken", "youtu",        "?"};

// A vocabulary of every byte, then what the input adds; with odd settings, spoiled.
TokenizerData MakeData(Input& in) {
  TokenizerData data;
  const uint8_t settings = in.Byte();
  data.model = (settings & 1) != 0 ? "gpt2" : "llama";
  data.pre = kPreTokenizers[in.Byte() % std::size(kPreTokenizers)];
  data.add_bos = (settings & 2) != 0;
  data.add_space_prefix = (settings & 4) != 0;
  data.strip_after_special = (settings & 8) != 0;
  const auto add = [&](std::string text, TokenType type, float score) {
    data.tokens.push_back(std::move(text));
    data.types.push_back(type);
    data.scores.push_back(score);
  };
  for (int b = 0; b < 256; ++b) {
    constexpr char kHex[] = "0123456789ABCDEF";
    const bool letters = data.model == "gpt2";
    add(letters ? ByteLetter(static_cast<uint8_t>(b))
                : std::string("<0x") + kHex[b / 16] + kHex[b % 16] + ">",
        letters ? TokenType::kNormal : TokenType::kByte, 0);
  }
  const int more = in.Byte() % 32;
  for (int i = 0; i < more; ++i) {
    const auto type = static_cast<TokenType>(1 + in.Byte() % 6);
    add(in.Text(12), type, static_cast<float>(static_cast<int8_t>(in.Byte())));
    if (data.model == "gpt2" && data.tokens.back().size() > 1) {
      const std::string& text = data.tokens.back();
      const size_t cut = 1 + in.Byte() % (text.size() - 1);
      data.merges.push_back(text.substr(0, cut) + " " + text.substr(cut));
    }
  }
  data.bos = static_cast<int8_t>(in.Byte());
  data.unk = static_cast<int8_t>(in.Byte());
  if ((settings & 16) != 0) data.types.clear();
  if ((settings & 32) != 0) data.scores.pop_back();
  return data;
}

void Check(bool condition) {
  if (!condition) std::abort();
}

void FuzzOne(const uint8_t* bytes, size_t size) {
  Input in(bytes, size);
  TokenizerData data = MakeData(in);
  const bool strips = data.strip_after_special, prefixes = data.add_space_prefix;
  auto tokenizer = Tokenizer::FromData(std::move(data));
  if (!tokenizer.ok()) return;
  const Tokenizer& t = **tokenizer;
  for (const bool parse_special : {false, true}) {
    const auto ids = t.Encode(in.rest(), /*add_special=*/parse_special, parse_special);
    if (!ids.ok()) continue;
    Utf8Stream stream;
    std::string streamed;
    for (const int32_t id : *ids) {
      Check(id >= 0 && id < t.vocab_size());
      streamed += stream.Push(t.TokenBytes(id, true));
    }
    streamed += stream.Finish();
    for (std::string_view rest = streamed; !rest.empty();) {
      const size_t n = Utf8CharLength(rest);
      Check(n > 0);
      rest.remove_prefix(n);
    }
    const std::string decoded = t.Decode(*ids, false);
    // A space prefix is put behind every special token but taken away only in front, and
    // user-defined tokens or eaten white space change the text: only without all of them it must be
    // the same.
    const bool exact = t.model() == "gpt2" && !strips && !prefixes && !parse_special;
    if (exact) Check(decoded == in.rest());
  }
}

}  // namespace
}  // namespace shoal

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  shoal::FuzzOne(data, size);
  return 0;
}
