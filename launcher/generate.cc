#include "launcher/generate.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "fmt/format.h"
#include "kernels/status_macros.h"
#include "launcher/exit_code.h"
#include "launcher/utf8_stream.h"

namespace shoal {
namespace {

std::string Count(int64_t n, const char* noun) {
  return fmt::format("{} {}{}", n, noun, n == 1 ? "" : "s");
}

}  // namespace

absl::StatusOr<Generation> Generate(Engine& engine, const Tokenizer& tokenizer,
                                    SequenceRequest request, bool render_special,
                                    const std::function<void(std::string_view)>& show,
                                    const std::function<bool()>& stop) {
  using Clock = std::chrono::steady_clock;
  Generation g;
  g.prompt_tokens = static_cast<int>(request.tokens.size());
  const std::vector<int32_t> ends = request.stop_tokens;
  const Clock::time_point start = Clock::now();
  Clock::time_point first = start;
  Utf8Stream utf8;
  const Scheduler::Stats before = engine.stats();
  const absl::StatusOr<SequenceId> submitted = engine.Submit(std::move(request));
  if (absl::IsInvalidArgument(submitted.status())) {  // the prompt, not a file
    return WithExitCode(submitted.status(), kExitUsage);
  }
  SHOAL_RETURN_IF_ERROR(submitted.status());
  const SequenceId id = *submitted;
  bool asked_to_stop = false;
  int drawn = 0;
  while (g.finish == FinishReason::kNone) {
    SHOAL_ASSIGN_OR_RETURN(const std::vector<TokenEvent> events, engine.Step());
    show("");
    for (const TokenEvent& e : events) {
      if (e.id != id) continue;
      if (e.has_token) {
        if (drawn++ == 0) first = Clock::now();
        g.cached_tokens = e.cached_tokens;
        if (std::find(ends.begin(), ends.end(), e.token) == ends.end()) {
          g.tokens.push_back(e.token);
          show(utf8.Push(tokenizer.TokenBytes(e.token, render_special)));
        }
      }
      g.finish = e.finish;
    }
    if (!asked_to_stop && g.finish == FinishReason::kNone && stop()) {
      asked_to_stop = true;
      engine.Cancel(id);
    }
  }
  show(utf8.Finish());
  if (g.finish == FinishReason::kError) {
    return absl::UnavailableError(
        "the context does not fit in memory, and its KV pages could not be read back from disk: "
        "give the KV cache more memory (--kv-tokens), or --kv-disk a disk with room");
  }
  const Clock::time_point end = Clock::now();
  g.drafted = engine.stats().drafted_tokens - before.drafted_tokens;
  g.accepted = engine.stats().accepted_tokens - before.accepted_tokens;
  g.prompt_seconds = std::chrono::duration<double>(first - start).count();
  g.decode_seconds = drawn > 1 ? std::chrono::duration<double>(end - first).count() : 0;
  return g;
}

std::string FormatSpeed(const Generation& g) {
  // ": N tokens/s", or nothing where there was too little to measure.
  const auto rate = [](double n, double seconds) {
    return n > 0 && seconds > 0 ? fmt::format(", {:.1f} tokens/s", n / seconds) : std::string();
  };
  const std::string cached =
      g.cached_tokens > 0 ? fmt::format(" ({} cached)", g.cached_tokens) : "";
  const double decoded = g.tokens.empty() ? 0 : static_cast<double>(g.tokens.size()) - 1;
  const std::string guessed =
      g.drafted > 0 ? fmt::format(" ({} of {} drafted accepted)", g.accepted, g.drafted) : "";
  return fmt::format("prompt {}{}{}; generated {}{}{}\n", Count(g.prompt_tokens, "token"), cached,
                     rate(g.prompt_tokens - g.cached_tokens, g.prompt_seconds),
                     Count(static_cast<int64_t>(g.tokens.size()), "token"), guessed,
                     rate(decoded, g.decode_seconds));
}

}  // namespace shoal
