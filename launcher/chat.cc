#include "launcher/chat.h"

#include <cctype>
#include <cstdio>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/status_macros.h"
#include "launcher/chat_template.h"
#include "launcher/exit_code.h"
#include "launcher/generate.h"
#include "launcher/interrupt.h"
#include "launcher/line_reader.h"
#include "launcher/reasoning.h"
#include "launcher/thought_printer.h"
#include "nlohmann/json.hpp"

namespace shoal {
namespace {

constexpr size_t kMaxMessageBytes = 1u << 20;

absl::StatusOr<ChatTemplate> TemplateOf(const Tokenizer& tokenizer) {
  if (tokenizer.chat_template().empty()) {
    return absl::FailedPreconditionError(
        "this model has no chat template, so it cannot chat: give a text to continue with -p TEXT");
  }
  return ChatTemplate::Parse(tokenizer.chat_template());
}

// The conversation so far as tokens, ready for the reply. The oldest turns go when they no longer
// fit.
absl::StatusOr<std::vector<int32_t>> Render(const ChatTemplate& chat, const Session& session,
                                            nlohmann::ordered_json& messages) {
  const Tokenizer& tokenizer = *session.tokenizer;
  ChatTemplateOptions options;
  const auto text_of = [&](int id) {
    return id < 0 ? std::string() : std::string(tokenizer.TokenText(id));
  };
  options.bos_token = text_of(tokenizer.bos());
  options.eos_token = text_of(tokenizer.eos());
  for (;;) {
    SHOAL_ASSIGN_OR_RETURN(const std::string text, chat.Render(messages, nullptr, options));
    SHOAL_ASSIGN_OR_RETURN(std::vector<int32_t> tokens,
                           tokenizer.Encode(text, false, /*parse_special=*/true));
    if (static_cast<int>(tokens.size()) < session.options.context) return tokens;
    const size_t first = messages[0]["role"] == "system" ? 1 : 0;
    if (messages.size() < first + 3) {
      return UsageError(absl::StrCat("this message has ", tokens.size(),
                                     " tokens, but the context holds ", session.options.context,
                                     ": shorten it or raise -c"));
    }
    messages.erase(messages.begin() + static_cast<long>(first),
                   messages.begin() + static_cast<long>(first) + 2);
    std::fprintf(stderr, "(the context is full: the oldest turn is forgotten)\n");
  }
}

}  // namespace

absl::Status CanChat(const Tokenizer& tokenizer) { return TemplateOf(tokenizer).status(); }

absl::Status Chat(const ChatOptions& options, Session& session) {
  SHOAL_ASSIGN_OR_RETURN(const ChatTemplate chat, TemplateOf(*session.tokenizer));
  nlohmann::ordered_json messages = nlohmann::ordered_json::array();
  if (!options.system.empty())
    messages.push_back({{"role", "system"}, {"content", options.system}});
  if (!options.quiet) {
    std::fprintf(
        stderr,
        "Chat with %s. Ctrl-C stops a reply, a second one or Ctrl-D leaves; a line that ends "
        "in \\ goes on.\n",
        session.config.name.empty() ? "the model" : session.config.name.c_str());
  }
  Interrupt interrupt;
  LineReader reader(interrupt);
  while (const std::optional<std::string> line = reader.Next()) {
    if (line->empty()) continue;
    if (line->size() > kMaxMessageBytes) return UsageError("a message has more than a megabyte");
    messages.push_back({{"role", "user"}, {"content", *line}});
    SequenceRequest request;
    SHOAL_ASSIGN_OR_RETURN(request.tokens, Render(chat, session, messages));
    request.max_tokens =
        options.max_tokens < 0 ? std::numeric_limits<int>::max() : options.max_tokens;
    request.sampling = options.sampling;
    request.stop_tokens = session.tokenizer->end_of_generation_ids();
    const ReasoningFormat format = ReasoningFormatOf(chat.source());
    ReasoningSplitter splitter(
        format, EndsInThought(format, session.tokenizer->Decode(request.tokens, true)));
    ThoughtPrinter thoughts(options.quiet);
    std::string reply;
    const auto show = [&](const ReasoningSplitter::Text& part) {
      thoughts.Print(part.reasoning);
      std::string_view text = part.content;
      // The blank that a SentencePiece vocabulary puts before a first word is not part of a reply.
      while (reply.empty() && !text.empty() && std::isspace(static_cast<unsigned char>(text[0]))) {
        text.remove_prefix(1);
      }
      if (text.empty()) return;
      thoughts.End();
      reply.append(text);
      std::fwrite(text.data(), 1, text.size(), stdout);
      std::fflush(stdout);
    };
    SHOAL_ASSIGN_OR_RETURN(
        const Generation g,
        Generate(
            session.engine, *session.tokenizer, std::move(request), NeedsMarks(format),
            [&](std::string_view text) { show(splitter.Push(text)); },
            [&interrupt] { return interrupt.pending(); }));
    show(splitter.Finish());
    thoughts.End();
    std::printf("\n");
    std::fflush(stdout);
    if (interrupt.Take()) std::fprintf(stderr, "(stopped)\n");
    if (g.finish == FinishReason::kLength)
      std::fprintf(stderr, "(the context or -n ended the reply)\n");
    messages.push_back({{"role", "assistant"}, {"content", reply}});
  }
  return absl::OkStatus();
}

}  // namespace shoal
