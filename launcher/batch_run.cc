#include "launcher/batch_run.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <limits>
#include <sstream>
#include <unordered_map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "fmt/format.h"
#include "kernels/status_macros.h"
#include "launcher/exit_code.h"
#include "launcher/interrupt.h"
#include "launcher/read_input.h"
#include "launcher/utf8_stream.h"
#include "nlohmann/json.hpp"

namespace shoal {
namespace {

constexpr size_t kMaxPrompts = 1 << 20;

using Json = nlohmann::json;

struct Running {
  size_t index = 0;
  Utf8Stream utf8;
  std::string text;
  int tokens = 0;
};

const char* Name(FinishReason reason) {
  switch (reason) {
    case FinishReason::kStop:
      return "stop";
    case FinishReason::kLength:
      return "length";
    case FinishReason::kCancelled:
      return "cancelled";
    default:
      return "error";
  }
}

class BatchRun {
 public:
  BatchRun(const BatchRunOptions& options, Session& session)
      : options_(options), session_(session), lines_(options.prompts.size()) {}

  absl::Status Run() {
    const auto start = std::chrono::steady_clock::now();
    Interrupt interrupt;
    while (printed_ < lines_.size() && !interrupt.pending()) {
      SHOAL_RETURN_IF_ERROR(SubmitMore());
      SHOAL_ASSIGN_OR_RETURN(const std::vector<TokenEvent> events, session_.engine.Step());
      for (const TokenEvent& e : events) Take(e);
      if (std::ferror(stdout) != 0) return absl::InternalError("cannot write the texts to stdout");
    }
    if (!options_.quiet) {
      const double s =
          std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      fmt::print(stderr,
                 "{} texts, {} prompt tokens and {} generated in {:.1f} s: {:.2f} tokens/s\n",
                 printed_, prompt_tokens_, generated_, s,
                 s > 0 ? static_cast<double>(generated_) / s : 0.0);
    }
    if (interrupt.Take())
      return WithExitCode(absl::CancelledError("interrupted"), kExitInterrupted);
    return absl::OkStatus();
  }

 private:
  // Keeps as many sequences in the engine as it takes at once; the queue stays short.
  absl::Status SubmitMore() {
    while (next_ < lines_.size() &&
           running_.size() < static_cast<size_t>(session_.options.sequences)) {
      SequenceRequest request;
      request.tokens = options_.prompts[next_].tokens;
      prompt_tokens_ += static_cast<int64_t>(request.tokens.size());
      request.max_tokens =
          options_.max_tokens < 0 ? std::numeric_limits<int>::max() : options_.max_tokens;
      request.sampling = options_.sampling;
      // Each text has draws of its own, whatever runs beside it.
      request.sampling.seed += next_;
      if (!options_.ignore_eos) request.stop_tokens = session_.tokenizer->end_of_generation_ids();
      ends_ = request.stop_tokens;
      SHOAL_ASSIGN_OR_RETURN(const SequenceId id, session_.engine.Submit(std::move(request)));
      running_[id].index = next_++;
    }
    return absl::OkStatus();
  }

  void Take(const TokenEvent& e) {
    const auto it = running_.find(e.id);
    if (it == running_.end()) return;
    Running& r = it->second;
    if (e.has_token && std::find(ends_.begin(), ends_.end(), e.token) == ends_.end()) {
      r.text += r.utf8.Push(session_.tokenizer->TokenBytes(e.token, /*render_special=*/false));
      ++r.tokens;
      ++generated_;
    }
    if (e.finish == FinishReason::kNone) return;
    r.text += r.utf8.Finish();
    const Json line = {{"index", r.index},
                       {"prompt", options_.prompts[r.index].text},
                       {"text", r.text},
                       {"tokens", r.tokens},
                       {"finish", Name(e.finish)}};
    lines_[r.index] = line.dump(-1, ' ', false, Json::error_handler_t::replace);
    running_.erase(it);
    while (printed_ < lines_.size() && !lines_[printed_].empty())
      std::puts(lines_[printed_++].c_str());
    std::fflush(stdout);
  }

  const BatchRunOptions& options_;
  Session& session_;
  std::vector<std::string> lines_;  // finished ones, printed in order
  std::vector<int32_t> ends_;
  std::unordered_map<SequenceId, Running> running_;
  size_t next_ = 0, printed_ = 0;
  int64_t prompt_tokens_ = 0, generated_ = 0;
};

}  // namespace

absl::StatusOr<std::vector<BatchPrompt>> ReadBatch(const std::string& path,
                                                   const Tokenizer& tokenizer, int context,
                                                   bool parse_special) {
  SHOAL_ASSIGN_OR_RETURN(std::string text, ReadInput(path, "the prompts"));
  std::istringstream in(std::move(text));
  std::vector<BatchPrompt> prompts;
  std::string line;
  while (std::getline(in, line)) {
    if (!line.empty() && line.back() == '\r') line.pop_back();
    if (line.empty()) continue;
    if (prompts.size() == kMaxPrompts) {
      return UsageError(absl::StrCat(path, " has more than ", kMaxPrompts, " prompts: split it"));
    }
    BatchPrompt prompt{line, {}};
    SHOAL_ASSIGN_OR_RETURN(prompt.tokens,
                           tokenizer.Encode(line, /*add_special=*/true, parse_special));
    if (prompt.tokens.size() >= static_cast<size_t>(context)) {
      return UsageError(absl::StrCat("prompt ", prompts.size() + 1, " has ", prompt.tokens.size(),
                                     " tokens, but the context holds ", context,
                                     ": shorten it, or raise -c"));
    }
    prompts.push_back(std::move(prompt));
  }
  if (prompts.empty())
    return UsageError(absl::StrCat(path, " holds no prompt; write one on each line"));
  return prompts;
}

absl::Status RunBatch(const BatchRunOptions& options, Session& session) {
  return BatchRun(options, session).Run();
}

}  // namespace shoal
