#include "launcher/remote_run.h"

#include <chrono>
#include <cstdio>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/status_macros.h"
#include "launcher/exit_code.h"
#include "launcher/interrupt.h"
#include "launcher/line_reader.h"
#include "launcher/server_client.h"
#include "launcher/thought_printer.h"
#include "nlohmann/json.hpp"

namespace shoal {
namespace {

using Json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

constexpr int kNoLimit = 1 << 24;  // more than any context: the server stops where it ends

Json MakeRequest(const RemoteRunOptions& o) {
  const SamplingParams& p = o.sampling;
  Json j = {{"stream", true},
            {"stream_options", {{"include_usage", true}}},
            {"max_tokens", o.max_tokens < 0 ? kNoLimit : o.max_tokens},
            {"temperature", p.temperature},
            {"top_k", p.top_k},
            {"top_p", p.top_p},
            {"min_p", p.min_p},
            {"repeat_penalty", p.repeat_penalty},
            {"presence_penalty", p.presence_penalty},
            {"frequency_penalty", p.frequency_penalty},
            {"seed", p.seed}};
  if (o.ignore_eos) j["ignore_eos"] = true;
  return j;
}

void Show(std::string_view text) {
  std::fwrite(text.data(), 1, text.size(), stdout);
  std::fflush(stdout);
}

// A member that is a string; else nothing.
std::string TextOf(const Json& object, const char* member) {
  return object.contains(member) && object[member].is_string() ? object[member].get<std::string>()
                                                               : std::string();
}

// Prints the text of a stream as it comes and returns it.
absl::StatusOr<std::string> Print(const ServerClient& client, const RemoteRunOptions& o,
                                  const std::string& path, const Json& request,
                                  const Interrupt& interrupt) {
  ThoughtPrinter thoughts(o.quiet);
  std::string text;
  int tokens = 0;
  const Clock::time_point began = Clock::now();
  const auto on_event = [&](std::string_view data) -> absl::Status {
    const Json event = Json::parse(data, nullptr, /*allow_exceptions=*/false);
    if (!event.is_object()) return absl::InternalError("the server sent an event that is no JSON");
    if (event.contains("error")) {
      return WithExitCode(
          absl::UnavailableError(absl::StrCat("the server gave up: ", event["error"].dump())),
          kExitUnavailable);
    }
    if (event.contains("usage") && event["usage"].is_object()) {
      tokens = event["usage"].value("completion_tokens", 0);
    }
    if (!event.contains("choices") || event["choices"].empty()) return absl::OkStatus();
    const Json& choice = event["choices"][0];
    std::string piece = choice.value("text", "");
    if (choice.contains("delta")) {
      thoughts.Print(TextOf(choice["delta"], "reasoning_content"));
      piece = TextOf(choice["delta"], "content");
    }
    if (piece.empty()) return absl::OkStatus();
    thoughts.End();
    Show(piece);
    text += piece;
    return absl::OkStatus();
  };
  const absl::Status status =
      client.Stream(path, request.dump(), on_event, [&interrupt] { return interrupt.pending(); });
  thoughts.End();
  Show("\n");
  if (!status.ok() && !absl::IsCancelled(status)) return status;
  const double seconds = std::chrono::duration<double>(Clock::now() - began).count();
  if (!o.quiet && tokens > 0) {
    std::fprintf(stderr, "\n%d tokens in %.1f s, %.1f tokens/s\n", tokens, seconds,
                 tokens / seconds);
  }
  return text;
}

absl::Status ChatRemote(const ServerClient& client, const RemoteRunOptions& o) {
  Json messages = Json::array();
  if (!o.system.empty()) messages.push_back({{"role", "system"}, {"content", o.system}});
  if (!o.quiet) {
    std::fprintf(stderr,
                 "Chat with %s. Ctrl-C stops a reply, a second one or Ctrl-D leaves; a line that "
                 "ends in \\ goes on.\n",
                 o.url.c_str());
  }
  Interrupt interrupt;
  LineReader reader(interrupt);
  while (const std::optional<std::string> line = reader.Next()) {
    if (line->empty()) continue;
    messages.push_back({{"role", "user"}, {"content", *line}});
    Json request = MakeRequest(o);
    request["messages"] = messages;
    SHOAL_ASSIGN_OR_RETURN(const std::string reply,
                           Print(client, o, "/v1/chat/completions", request, interrupt));
    if (interrupt.Take()) std::fprintf(stderr, "(stopped)\n");
    messages.push_back({{"role", "assistant"}, {"content", reply}});
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status RunRemote(const RemoteRunOptions& options) {
  SHOAL_ASSIGN_OR_RETURN(ServerAddress address, ServerAddress::Parse(options.url));
  const ServerClient client(std::move(address), options.key, options.ca_file);
  if (!options.prompt.has_value()) return ChatRemote(client, options);
  Json request = MakeRequest(options);
  request["prompt"] = *options.prompt;
  if (!options.hide_prompt) Show(*options.prompt);
  Interrupt interrupt;
  SHOAL_RETURN_IF_ERROR(Print(client, options, "/v1/completions", request, interrupt).status());
  if (interrupt.Take()) return WithExitCode(absl::CancelledError("interrupted"), kExitInterrupted);
  return absl::OkStatus();
}

}  // namespace shoal
