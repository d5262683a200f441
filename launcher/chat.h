// A conversation on the terminal with the model's own chat template.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "launcher/session.h"
#include "parallel/sampler.h"

namespace shoal {

struct ChatOptions {
  SamplingParams sampling;
  std::string system;   // system message; empty: none
  int max_tokens = -1;  // of a reply; -1: until the model ends it
  bool quiet = false;
};

// kFailedPrecondition when the model has no chat template, or none that is understood.
absl::Status CanChat(const Tokenizer& tokenizer);

// Reads turns from stdin (line editing and history on a terminal) until end of input or a second
// Ctrl-C; the first Ctrl-C stops the reply at hand. REQUIRES: CanChat.
absl::Status Chat(const ChatOptions& options, Session& session);

}  // namespace shoal
