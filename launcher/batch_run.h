// Many prompts at once: each pass over the weights serves all of them.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "launcher/session.h"

namespace shoal {

struct BatchPrompt {
  std::string text;
  std::vector<int32_t> tokens;
};

struct BatchRunOptions {
  std::vector<BatchPrompt> prompts;
  SamplingParams sampling;
  int max_tokens = -1;  // of each; -1: until the model ends
  bool ignore_eos = false;
  bool quiet = false;
};

// The prompts of a file, one on each line; empty lines are left out. "-" reads stdin. A usage error
// names the first one that leaves no room for an answer in the context.
absl::StatusOr<std::vector<BatchPrompt>> ReadBatch(const std::string& path,
                                                   const Tokenizer& tokenizer, int context,
                                                   bool parse_special);

// Writes one JSON object per line to stdout, in the order of the prompts: index, prompt, text,
// tokens, finish.
absl::Status RunBatch(const BatchRunOptions& options, Session& session);

}  // namespace shoal
