// `shoal run --server URL`: the same completion and chat, computed by a running server.
#pragma once

#include <optional>
#include <string>

#include "absl/status/status.h"
#include "parallel/sampler.h"

namespace shoal {

struct RemoteRunOptions {
  std::string url;
  std::string key;      // API key; empty: none
  std::string ca_file;  // PEM, for https
  SamplingParams sampling;
  int max_tokens = -1;
  bool ignore_eos = false;
  bool hide_prompt = false;
  bool quiet = false;
  std::string system;                 // of a chat
  std::optional<std::string> prompt;  // none: chat
};

absl::Status RunRemote(const RemoteRunOptions& options);

}  // namespace shoal
