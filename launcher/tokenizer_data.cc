#include "launcher/tokenizer_data.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <unordered_set>
#include <variant>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "launcher/pre_tokenizer.h"
#include "launcher/token_text.h"

namespace shoal {
namespace {

constexpr size_t kMaxTokens = 16 << 20;
constexpr size_t kMaxTokenBytes = 1 << 16;

absl::Status WrongKind(const std::string& key, const char* expected) {
  return absl::InvalidArgumentError(
      absl::StrCat("metadata ", key, " has the wrong type: expected ", expected));
}

// Leaves *out alone when the key is absent.
absl::Status ReadBool(const Checkpoint& c, const std::string& key, bool* out) {
  const MetadataValue* value = c.FindMetadata(key);
  if (value == nullptr) return absl::OkStatus();
  const bool* found = std::get_if<bool>(value);
  if (found == nullptr) return WrongKind(key, "a bool");
  *out = *found;
  return absl::OkStatus();
}

absl::Status ReadString(const Checkpoint& c, const std::string& key, std::string* out) {
  const MetadataValue* value = c.FindMetadata(key);
  if (value == nullptr) return absl::OkStatus();
  const std::string* found = std::get_if<std::string>(value);
  if (found == nullptr) return WrongKind(key, "a string");
  *out = *found;
  return absl::OkStatus();
}

absl::Status ReadId(const Checkpoint& c, const std::string& key, size_t vocab, int32_t* out) {
  const MetadataValue* value = c.FindMetadata(key);
  if (value == nullptr) return absl::OkStatus();
  int64_t id;
  if (const auto* u = std::get_if<uint64_t>(value)) {
    id = *u > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()) ? -1
                                                                         : static_cast<int64_t>(*u);
  } else if (const auto* i = std::get_if<int64_t>(value)) {
    id = *i;
  } else {
    return WrongKind(key, "an integer");
  }
  if (id < 0 || id >= static_cast<int64_t>(vocab)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "metadata ", key, " is ", id, ", outside the vocabulary of ", vocab, " tokens"));
  }
  *out = static_cast<int32_t>(id);
  return absl::OkStatus();
}

// Null when the key is absent.
template <typename T>
absl::StatusOr<const std::vector<T>*> FindArray(const Checkpoint& c, const std::string& key,
                                                const char* expected) {
  const MetadataValue* value = c.FindMetadata(key);
  if (value == nullptr) return nullptr;
  const auto* found = std::get_if<std::vector<T>>(value);
  if (found == nullptr) return WrongKind(key, expected);
  return found;
}

absl::Status ReadScores(const Checkpoint& c, TokenizerData* data) {
  const std::string key = "tokenizer.ggml.scores";
  const MetadataValue* value = c.FindMetadata(key);
  if (value == nullptr) return absl::OkStatus();
  if (const auto* f = std::get_if<std::vector<double>>(value)) {
    data->scores.assign(f->begin(), f->end());
  } else if (const auto* i = std::get_if<std::vector<int64_t>>(value)) {
    data->scores.assign(i->begin(), i->end());
  } else {
    return WrongKind(key, "an array of numbers");
  }
  return absl::OkStatus();
}

absl::Status ReadTypes(const Checkpoint& c, TokenizerData* data) {
  const std::string key = "tokenizer.ggml.token_type";
  auto found = FindArray<int64_t>(c, key, "an array of integers");
  if (!found.ok()) return found.status();
  if (*found == nullptr) return absl::OkStatus();
  data->types.reserve((*found)->size());
  for (const int64_t type : **found) {
    if (type < 0 || type > 6) {
      return absl::InvalidArgumentError(absl::StrCat("metadata ", key, "[", data->types.size(),
                                                     "] is ", type, ": expected 1 to 6"));
    }
    // 0 is GGUF's "undefined": files without type information are rare and mean plain text.
    data->types.push_back(type == 0 ? TokenType::kNormal : static_cast<TokenType>(type));
  }
  return absl::OkStatus();
}

// What llama.cpp assumes when a file does not say.
void SetDefaults(TokenizerData* data) {
  if (data->model == "llama") {
    const auto in_vocab = [&](int32_t id) {
      return id < static_cast<int32_t>(data->tokens.size()) ? id : -1;
    };
    data->unk = in_vocab(0);
    data->bos = in_vocab(1);
    data->eos = in_vocab(2);
    data->add_bos = true;
    data->add_space_prefix = true;
  } else {
    const PreTokenizerInfo* pre = FindPreTokenizer(data->pre.empty() ? "default" : data->pre);
    data->add_bos = pre != nullptr && pre->add_bos;
  }
}

absl::Status ReadSettings(const Checkpoint& c, TokenizerData* data) {
  const size_t vocab = data->tokens.size();
  const std::string prefix = "tokenizer.ggml.";
  const std::pair<const char*, int32_t*> ids[] = {
      {"bos_token_id", &data->bos}, {"eos_token_id", &data->eos},     {"eot_token_id", &data->eot},
      {"eom_token_id", &data->eom}, {"unknown_token_id", &data->unk},
  };
  for (const auto& [name, out] : ids) {
    if (auto s = ReadId(c, prefix + name, vocab, out); !s.ok()) return s;
  }
  const std::pair<const char*, bool*> flags[] = {
      {"add_bos_token", &data->add_bos},
      {"add_eos_token", &data->add_eos},
      {"add_space_prefix", &data->add_space_prefix},
  };
  for (const auto& [name, out] : flags) {
    if (auto s = ReadBool(c, prefix + name, out); !s.ok()) return s;
  }
  if (auto s = ReadString(c, "tokenizer.chat_template", &data->chat_template); !s.ok()) return s;
  if (auto s = ReadString(c, "tokenizer.chat_template.tool_use", &data->chat_template_tool_use);
      !s.ok()) {
    return s;
  }
  std::string name;
  if (auto s = ReadString(c, "general.name", &name); !s.ok()) return s;
  name = absl::AsciiStrToLower(name);
  data->strip_after_special =
      name.find("phi-3") != std::string::npos || name.find("phi3") != std::string::npos;
  return absl::OkStatus();
}

absl::Status BadToken(size_t id, std::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat("vocabulary: token ", id, " ", std::string(what)));
}

absl::Status CheckTokens(const TokenizerData& data) {
  std::unordered_set<std::string_view> seen;
  seen.reserve(data.tokens.size());
  for (size_t id = 0; id < data.tokens.size(); ++id) {
    const std::string& text = data.tokens[id];
    if (text.size() > kMaxTokenBytes) {
      return BadToken(id, absl::StrCat("has ", text.size(), " bytes; at most ", kMaxTokenBytes,
                                       " are accepted"));
    }
    // Empty texts stand for ids that are never produced, so several of them do no harm.
    if (!text.empty() && !seen.insert(text).second) {
      return BadToken(id, absl::StrCat("repeats the text '", text, "' of an earlier token"));
    }
    if (!data.types.empty() && data.types[id] == TokenType::kByte && ByteOfToken(text) < 0) {
      return BadToken(id, absl::StrCat("is a byte token but its text is '", text,
                                       "'; expected the form <0x0A>"));
    }
    if (!data.scores.empty() && !std::isfinite(data.scores[id])) {
      return BadToken(id, "has a score that is not a finite number");
    }
  }
  return absl::OkStatus();
}

absl::Status CheckLength(const char* what, size_t found, size_t vocab) {
  if (found == 0 || found == vocab) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("vocabulary: ", found, " ", what, " for ", vocab,
                                                 " tokens; expected one for each"));
}

}  // namespace

absl::StatusOr<TokenizerData> ReadTokenizerData(const Checkpoint& checkpoint) {
  TokenizerData data;
  if (auto s = ReadString(checkpoint, "tokenizer.ggml.model", &data.model); !s.ok()) return s;
  if (data.model.empty()) {
    return absl::NotFoundError("the checkpoint has no tokenizer (metadata tokenizer.ggml.model)");
  }
  if (data.model != "llama" && data.model != "gpt2") {
    return absl::UnimplementedError(absl::StrCat("tokenizer.ggml.model '", data.model,
                                                 "' is not known; known are llama and gpt2"));
  }
  if (auto s = ReadString(checkpoint, "tokenizer.ggml.pre", &data.pre); !s.ok()) return s;
  auto tokens = FindArray<std::string>(checkpoint, "tokenizer.ggml.tokens", "an array of strings");
  if (!tokens.ok()) return tokens.status();
  if (*tokens == nullptr) {
    return absl::NotFoundError("the checkpoint has no vocabulary (metadata tokenizer.ggml.tokens)");
  }
  data.tokens = **tokens;
  if (data.model == "gpt2") {
    auto merges =
        FindArray<std::string>(checkpoint, "tokenizer.ggml.merges", "an array of strings");
    if (!merges.ok()) return merges.status();
    if (*merges == nullptr) {
      return absl::InvalidArgumentError(
          "a gpt2 tokenizer needs metadata tokenizer.ggml.merges, which is absent");
    }
    data.merges = **merges;
  }
  if (auto s = ReadScores(checkpoint, &data); !s.ok()) return s;
  if (auto s = ReadTypes(checkpoint, &data); !s.ok()) return s;
  SetDefaults(&data);
  if (auto s = ReadSettings(checkpoint, &data); !s.ok()) return s;
  return data;
}

absl::Status ValidateTokenizerData(const TokenizerData& data) {
  if (data.model != "llama" && data.model != "gpt2") {
    return absl::UnimplementedError(
        absl::StrCat("tokenizer model '", data.model, "' is not known; known are llama and gpt2"));
  }
  const size_t vocab = data.tokens.size();
  if (vocab == 0 || vocab > kMaxTokens) {
    return absl::InvalidArgumentError(
        absl::StrCat("vocabulary: ", vocab, " tokens; expected 1 to ", kMaxTokens));
  }
  if (data.merges.size() > kMaxTokens) {
    return absl::InvalidArgumentError(
        absl::StrCat("vocabulary: ", data.merges.size(), " merges; expected at most ", kMaxTokens));
  }
  if (auto s = CheckLength("scores", data.scores.size(), vocab); !s.ok()) return s;
  if (auto s = CheckLength("token types", data.types.size(), vocab); !s.ok()) return s;
  for (const int32_t id : {data.bos, data.eos, data.eot, data.eom, data.unk}) {
    if (id < -1 || id >= static_cast<int64_t>(vocab)) {
      return absl::InvalidArgumentError(absl::StrCat(
          "vocabulary: special token id ", id, " is outside the vocabulary of ", vocab, " tokens"));
    }
  }
  return CheckTokens(data);
}

}  // namespace shoal
