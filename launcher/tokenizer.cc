#include "launcher/tokenizer.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "launcher/merge_symbols.h"
#include "launcher/token_text.h"
#include "launcher/utf8_stream.h"

namespace shoal {
namespace {

constexpr std::string_view kSpaceMark = "\xE2\x96\x81";  // U+2581, SentencePiece's space

bool IsSpace(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

std::string WithSpaceMarks(std::string_view text, bool prefix) {
  std::string out;
  out.reserve(text.size() + text.size() / 2 + kSpaceMark.size());
  if (prefix) out.append(kSpaceMark);
  for (const char c : text) {
    if (c == ' ') {
      out.append(kSpaceMark);
    } else {
      out.push_back(c);
    }
  }
  return out;
}

std::string WithoutSpaceMarks(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  while (!text.empty()) {
    if (text.starts_with(kSpaceMark)) {
      out.push_back(' ');
      text.remove_prefix(kSpaceMark.size());
    } else {
      out.push_back(text.front());
      text.remove_prefix(1);
    }
  }
  return out;
}

// What token `id` adds to a text, byte tokens and spellings resolved.
std::string RenderedBytes(const TokenizerData& data, TokenType type, const std::string& text) {
  switch (type) {
    case TokenType::kByte:
      return std::string(1, static_cast<char>(ByteOfToken(text)));
    case TokenType::kNormal:
    case TokenType::kUnused:
      return data.model == "gpt2" ? BytesOfLetters(text) : WithoutSpaceMarks(text);
    default:
      return text;
  }
}

bool IsHidden(TokenType type) { return type == TokenType::kControl || type == TokenType::kUnknown; }

}  // namespace

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::FromCheckpoint(const Checkpoint& checkpoint) {
  auto data = ReadTokenizerData(checkpoint);
  if (!data.ok()) return data.status();
  return FromData(*std::move(data));
}

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::FromData(TokenizerData data) {
  if (auto s = ValidateTokenizerData(data); !s.ok()) return s;
  auto tokenizer = std::unique_ptr<Tokenizer>(new Tokenizer(std::move(data)));
  if (auto s = tokenizer->Build(); !s.ok()) return s;
  return tokenizer;
}

absl::Status Tokenizer::Build() {
  const int32_t vocab = vocab_size();
  if (data_.types.empty()) {
    data_.types.assign(vocab, TokenType::kNormal);
    for (int32_t id = 0; id < vocab && data_.model == "llama"; ++id) {
      if (ByteOfToken(data_.tokens[id]) >= 0) data_.types[id] = TokenType::kByte;
    }
  }
  FindEndOfGeneration();
  bytes_.resize(vocab);
  ids_by_text_.reserve(vocab);
  ids_by_bytes_.reserve(vocab);
  for (int32_t id = 0; id < vocab; ++id) {
    const std::string& text = data_.tokens[id];
    bytes_[id] = RenderedBytes(data_, data_.types[id], text);
    if (text.empty()) continue;
    ids_by_text_.try_emplace(text, id);
    // Control, unknown and byte tokens must not arise from text that merely looks like them.
    if (!IsHidden(data_.types[id]) && data_.types[id] != TokenType::kByte) {
      // SentencePiece compares with marks in place of spaces: there the spelling is the key.
      const std::string& key = data_.model == "gpt2" ? bytes_[id] : text;
      ids_by_bytes_.try_emplace(key, id);
      longest_plain_ = std::max(longest_plain_, key.size());
    }
  }
  BuildByteIds();
  BuildSpecial();
  if (data_.model == "llama") return absl::OkStatus();
  auto pre = PreTokenizer::Create(data_.pre.empty() ? "default" : data_.pre);
  if (!pre.ok()) return pre.status();
  pre_tokenizer_ = *std::move(pre);
  return BuildMerges();
}

void Tokenizer::BuildByteIds() {
  byte_ids_.fill(-1);
  for (int byte = 0; byte < 256; ++byte) {
    const char c = static_cast<char>(byte);
    if (data_.model == "gpt2") {
      const auto letter = ids_by_text_.find(ByteLetter(static_cast<uint8_t>(byte)));
      if (letter != ids_by_text_.end()) byte_ids_[byte] = letter->second;
    } else if (const auto raw = ids_by_bytes_.find(std::string_view(&c, 1));
               raw != ids_by_bytes_.end()) {
      byte_ids_[byte] = raw->second;
    }
  }
  for (int32_t id = 0; id < vocab_size(); ++id) {
    if (data_.types[id] == TokenType::kByte) byte_ids_[ByteOfToken(data_.tokens[id])] = id;
  }
}

void Tokenizer::BuildSpecial() {
  for (int32_t id = 0; id < vocab_size(); ++id) {
    const std::string& text = data_.tokens[id];
    if (text.empty()) continue;
    if (data_.types[id] == TokenType::kUserDefined) user_defined_.Add(text, id);
    if (data_.types[id] == TokenType::kUserDefined || IsHidden(data_.types[id])) {
      special_.Add(text, id);
    }
  }
}

absl::Status Tokenizer::BuildMerges() {
  merges_.reserve(data_.merges.size());
  const auto find = [&](std::string_view text) { return FindToken(text); };
  for (size_t rank = 0; rank < data_.merges.size(); ++rank) {
    const std::string_view merge = data_.merges[rank];
    // From the second byte on: the left side is not empty, and may itself begin with a space.
    const size_t space = merge.find(' ', 1);
    if (space == std::string_view::npos || space + 1 == merge.size()) {
      return absl::InvalidArgumentError(
          absl::StrCat("merge ", rank, " is '", data_.merges[rank],
                       "'; expected two tokens with a space between them"));
    }
    const std::string_view left = merge.substr(0, space), right = merge.substr(space + 1);
    const int32_t left_id = find(left), right_id = find(right);
    const int32_t id = find(absl::StrCat(std::string(left), std::string(right)));
    if (left_id < 0 || right_id < 0 || id < 0) {
      return absl::InvalidArgumentError(absl::StrCat(
          "merge ", rank, " is '", data_.merges[rank],
          "'; expected its two sides and what they make to be tokens of the vocabulary"));
    }
    if (IsHidden(data_.types[id])) {
      return absl::InvalidArgumentError(
          absl::StrCat("merge ", rank, " is '", data_.merges[rank],
                       "' and makes a control token; plain text must not be able to"));
    }
    const uint64_t key =
        uint64_t{static_cast<uint32_t>(left_id)} << 32 | static_cast<uint32_t>(right_id);
    merges_.try_emplace(key, Merge{static_cast<int32_t>(rank), id});
  }
  data_.merges = {};
  return absl::OkStatus();
}

absl::StatusOr<std::vector<int32_t>> Tokenizer::Encode(std::string_view text, bool add_special,
                                                       bool parse_special) const {
  if (text.size() > kMaxTextBytes) {
    return absl::InvalidArgumentError(absl::StrCat(
        "text of ", text.size(), " bytes; the tokenizer takes at most ", kMaxTextBytes));
  }
  std::vector<int32_t> out;
  if (add_special && data_.add_bos && data_.bos >= 0) out.push_back(data_.bos);
  const TokenTrie& trie = parse_special ? special_ : user_defined_;
  bool after_special = true;  // the start of a text counts as such
  for (size_t at = 0; at < text.size();) {
    const TokenTrie::Match match = trie.FindFirst(text, at);
    const size_t plain_end = match.size > 0 ? match.begin : text.size();
    if (plain_end > at) {
      if (auto s = EncodePlain(text.substr(at, plain_end - at), after_special, &out); !s.ok()) {
        return s;
      }
    }
    if (match.size == 0) break;
    out.push_back(match.id);
    after_special = true;
    at = match.begin + match.size;
    const bool strip = data_.strip_after_special && match.id != data_.bos && match.id != data_.unk;
    while (strip && at < text.size() && IsSpace(text[at])) ++at;
  }
  if (add_special && data_.add_eos && data_.eos >= 0) out.push_back(data_.eos);
  return out;
}

absl::Status Tokenizer::EncodePlain(std::string_view text, bool after_special,
                                    std::vector<int32_t>* out) const {
  if (data_.model == "gpt2") return EncodeByteLevel(text, out);
  return EncodeSentencePiece(text, after_special && data_.add_space_prefix, out);
}

absl::Status Tokenizer::EncodeSentencePiece(std::string_view text, bool space_prefix,
                                            std::vector<int32_t>* out) const {
  const std::string marked = WithSpaceMarks(text, space_prefix);
  const std::string_view view = marked;
  const auto find = [&](int32_t begin, int32_t size) {
    if (static_cast<size_t>(size) > longest_plain_) return -1;
    const auto found = ids_by_bytes_.find(view.substr(begin, size));
    return found == ids_by_bytes_.end() ? -1 : found->second;
  };
  std::vector<Symbol> symbols;
  symbols.reserve(view.size());
  for (size_t at = 0; at < view.size();) {
    const size_t n = std::max<size_t>(Utf8CharLength(view.substr(at)), 1);
    Symbol symbol;
    symbol.begin = static_cast<int32_t>(at);
    symbol.size = static_cast<int32_t>(n);
    symbol.id = find(symbol.begin, symbol.size);
    symbols.push_back(symbol);
    at += n;
  }
  MergeSymbols(symbols, [&](const Symbol& left, const Symbol& right) {
    const int32_t id = find(left.begin, left.size + right.size);
    const bool scored = id >= 0 && !data_.scores.empty();
    return MergeTarget{scored ? -static_cast<double>(data_.scores[id]) : 0.0, id};
  });
  for (int32_t i = symbols.empty() ? -1 : 0; i >= 0; i = symbols[i].next) {
    if (symbols[i].id >= 0) {
      out->push_back(symbols[i].id);
    } else if (auto s = AppendBytes(view.substr(symbols[i].begin, symbols[i].size), out); !s.ok()) {
      return s;
    }
  }
  return absl::OkStatus();
}

absl::Status Tokenizer::EncodeByteLevel(std::string_view text, std::vector<int32_t>* out) const {
  std::vector<int32_t> ends;
  if (auto s = pre_tokenizer_->Split(text, &ends); !s.ok()) return s;
  const auto lookup = [this](const Symbol& left, const Symbol& right) {
    if (left.id < 0 || right.id < 0) return MergeTarget{};
    const auto found = merges_.find(uint64_t{static_cast<uint32_t>(left.id)} << 32 |
                                    static_cast<uint32_t>(right.id));
    if (found == merges_.end()) return MergeTarget{};
    return MergeTarget{static_cast<double>(found->second.rank), found->second.id};
  };
  std::vector<Symbol> symbols;
  int32_t begin = 0;
  for (const int32_t end : ends) {
    const std::string_view word = text.substr(begin, end - begin);
    begin = end;
    if (pre_tokenizer_->info().whole_words && word.size() <= longest_plain_) {
      if (const auto whole = ids_by_bytes_.find(word); whole != ids_by_bytes_.end()) {
        out->push_back(whole->second);
        continue;
      }
    }
    symbols.resize(word.size());
    for (size_t i = 0; i < word.size(); ++i) {
      symbols[i] = {static_cast<int32_t>(i), 1, byte_ids_[static_cast<uint8_t>(word[i])]};
    }
    MergeSymbols(symbols, lookup);
    for (int32_t i = 0; i >= 0; i = symbols[i].next) {
      if (symbols[i].id >= 0) {
        out->push_back(symbols[i].id);
      } else if (auto s = AppendBytes(word.substr(symbols[i].begin, symbols[i].size), out);
                 !s.ok()) {
        return s;
      }
    }
  }
  return absl::OkStatus();
}

// A character that is no token: its bytes one by one, else the unknown token (once for a run).
absl::Status Tokenizer::AppendBytes(std::string_view bytes, std::vector<int32_t>* out) const {
  const bool all = std::all_of(bytes.begin(), bytes.end(),
                               [this](char c) { return byte_ids_[static_cast<uint8_t>(c)] >= 0; });
  if (all) {
    for (const char c : bytes) out->push_back(byte_ids_[static_cast<uint8_t>(c)]);
    return absl::OkStatus();
  }
  if (data_.unk < 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "the vocabulary has neither a token for byte 0x",
        absl::Hex(static_cast<uint8_t>(bytes[0]), absl::kZeroPad2), " nor an unknown token"));
  }
  if (out->empty() || out->back() != data_.unk) out->push_back(data_.unk);
  return absl::OkStatus();
}

std::string Tokenizer::TokenBytes(int32_t id, bool render_special) const {
  if (id < 0 || id >= vocab_size()) return {};
  if (!render_special && IsHidden(data_.types[id])) return {};
  return bytes_[id];
}

std::string Tokenizer::Decode(std::span<const int32_t> ids, bool render_special) const {
  std::string out;
  bool at_start = data_.add_space_prefix;  // control tokens in front do not end the start
  for (const int32_t id : ids) {
    if (id < 0 || id >= vocab_size()) continue;
    const bool hidden = IsHidden(data_.types[id]);
    if (hidden && !render_special) continue;
    std::string_view bytes = bytes_[id];
    if (at_start && !hidden && bytes.starts_with(' ')) bytes.remove_prefix(1);
    at_start = at_start && hidden;
    out.append(bytes);
  }
  return out;
}

bool Tokenizer::IsEndOfGeneration(int32_t id) const {
  return std::binary_search(end_ids_.begin(), end_ids_.end(), id);
}

TokenType Tokenizer::type(int32_t id) const {
  SHOAL_CHECK(id >= 0 && id < vocab_size(), "token ids come from this vocabulary");
  return data_.types[id];
}

std::string_view Tokenizer::TokenText(int32_t id) const {
  if (id < 0 || id >= vocab_size()) return {};
  return data_.tokens[id];
}

int32_t Tokenizer::FindToken(std::string_view text) const {
  const auto found = ids_by_text_.find(text);
  return found == ids_by_text_.end() ? -1 : found->second;
}

// Files often name one end token while the model ends its turns with another.
void Tokenizer::FindEndOfGeneration() {
  static constexpr std::string_view kEndTexts[] = {
      "</s>",
      "<eos>",
      "<EOT>",
      "_<EOT>",
      "[EOT]",
      "[EOS]",
      "<|eot_id|>",
      "<|eom_id|>",
      "<|eot|>",  // Llama 4, as the next
      "<|eom|>",
      "<|END_OF_TURN_TOKEN|>",  // Command R
      "<|im_end|>",
      "<|end|>",
      "<|return|>",
      "<|call|>",
      "<|calls|>",
      "<|flush|>",
      "<end_of_turn>",
      "<|endoftext|>",
      "<turn|>",
      "<|end_of_text|>",
      "<end_of_utterance>",
      "<|fim_pad|>",
      "<|repo_name|>",
      "<|file_sep|>",
      "[e~[",
      "<\xEF\xBD\x9C"
      "end\xE2\x96\x81of\xE2\x96\x81sentence\xEF\xBD\x9C>",  // DeepSeek
  };
  bool returns = false, calls = false, flushes = false;
  int32_t end = -1;
  for (int32_t id = 0; id < vocab_size(); ++id) {
    const std::string& text = data_.tokens[id];
    if (std::find(std::begin(kEndTexts), std::end(kEndTexts), text) == std::end(kEndTexts)) {
      continue;
    }
    // Some files call them normal tokens; then text could produce them and they would be shown. But
    // "</s>" is also HTML, and a normal token for it is just that.
    if (data_.types[id] == TokenType::kNormal && !text.starts_with("<|")) continue;
    end_ids_.push_back(id);
    data_.types[id] = TokenType::kControl;
    returns |= text == "<|return|>";
    calls |= text == "<|call|>" || text == "<|calls|>";
    flushes |= text == "<|flush|>";
    if (text == "<|end|>") end = id;
  }
  // In the harmony format <|end|> ends a message, and the turn goes on.
  if (calls && (returns || flushes)) std::erase(end_ids_, end);
  for (const int32_t id : {data_.eos, data_.eot, data_.eom}) {
    if (id >= 0) end_ids_.push_back(id);
  }
  std::sort(end_ids_.begin(), end_ids_.end());
  end_ids_.erase(std::unique(end_ids_.begin(), end_ids_.end()), end_ids_.end());
}

}  // namespace shoal
