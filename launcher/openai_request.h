// From the body of an OpenAI request to what the coordinator is asked, with every value checked.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "launcher/chat_template.h"
#include "launcher/journal.h"
#include "launcher/reasoning.h"
#include "launcher/tokenizer.h"
#include "launcher/tool_calls.h"

namespace shoal {

// What requests are read against; immutable, used from several threads.
struct ModelContext {
  std::string name;
  const Tokenizer* tokenizer = nullptr;
  const ChatTemplate* chat_template = nullptr;      // null: the model has none
  const ChatTemplate* tool_use_template = nullptr;  // null: the former serves
};

struct OpenAiRequest {
  bool chat = false;
  bool stream = false;
  bool include_usage = false;
  bool echo = false;
  bool logprobs = false;
  int n = 1;
  std::vector<std::vector<int32_t>> prompts;  // one for a chat
  std::vector<std::string> prompt_texts;      // with echo
  GenerateRequest generate;                   // but for its prompt
  bool random_seed = true;                    // generate.sampling.seed was not given
  std::vector<ToolFunction> functions;        // that the answer may call; empty: none
  ReasoningFormat reasoning = ReasoningFormat::kNone;
  bool in_thought = false;   // the prompt ends inside a thought
  bool forced_call = false;  // the answer is a call: {"name": ..., "arguments": ...}
};

// Errors: kInvalidArgument (400), kNotFound (404: another model). ParamOf names the field.
// These do the expensive work (templates, tokens, schemas) and touch nothing shared: run them off
// the coordinator's thread.
absl::StatusOr<OpenAiRequest> ParseChatRequest(std::string_view body, const ModelContext& model);
absl::StatusOr<OpenAiRequest> ParseCompletionRequest(std::string_view body,
                                                     const ModelContext& model);

absl::StatusOr<std::vector<int32_t>> ParseTokenizeRequest(std::string_view body,
                                                          const ModelContext& model);
absl::StatusOr<std::string> ParseDetokenizeRequest(std::string_view body,
                                                   const ModelContext& model);
// [inputs][tokens]
struct EmbeddingRequest {
  std::vector<std::vector<int32_t>> inputs;
  bool base64 = false;
};
absl::StatusOr<EmbeddingRequest> ParseEmbeddingRequest(std::string_view body,
                                                       const ModelContext& model);

// The field of the request that an error is about; empty: none in particular.
std::string ParamOf(const absl::Status& status);

}  // namespace shoal
