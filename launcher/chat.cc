#include "launcher/chat.h"

#include <histedit.h>
#include <unistd.h>

#include <cstdio>
#include <iostream>
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
#include "nlohmann/json.hpp"

namespace shoal {
namespace {

constexpr int kHistoryLines = 500;
constexpr size_t kMaxLineBytes = 1u << 20;

const char* Prompt(EditLine*) { return "> "; }

// One line of stdin at a time.
class LineReader {
 public:
  LineReader() {
    if (isatty(STDIN_FILENO) == 0) return;
    editor_ = el_init("shoal", stdin, stderr, stderr);
    if (editor_ == nullptr) return;
    history_ = history_init();
    HistEvent event;
    history(history_, &event, H_SETSIZE, kHistoryLines);
    el_set(editor_, EL_PROMPT, Prompt);
    el_set(editor_, EL_EDITOR, "emacs");
    el_set(editor_, EL_HIST, history, history_);
  }
  ~LineReader() {
    if (editor_ != nullptr) el_end(editor_);
    if (history_ != nullptr) history_end(history_);
  }
  LineReader(const LineReader&) = delete;
  LineReader& operator=(const LineReader&) = delete;

  // nullopt at the end of input or on Ctrl-C.
  std::optional<std::string> Next() {
    std::string line;
    if (editor_ == nullptr) {
      if (!std::getline(std::cin, line)) return std::nullopt;
      return line;
    }
    int count = 0;
    const char* text = el_gets(editor_, &count);
    if (text == nullptr || count <= 0) return std::nullopt;
    line.assign(text, count);
    while (!line.empty() && line.back() == '\n') line.pop_back();
    if (!line.empty()) {
      HistEvent event;
      history(history_, &event, H_ENTER, line.c_str());
    }
    return line;
  }

 private:
  EditLine* editor_ = nullptr;
  History* history_ = nullptr;
};

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

absl::Status Chat(const ChatOptions& options, Session& session) {
  SHOAL_ASSIGN_OR_RETURN(const ChatTemplate chat, TemplateOf(*session.tokenizer));
  nlohmann::ordered_json messages = nlohmann::ordered_json::array();
  if (!options.system.empty())
    messages.push_back({{"role", "system"}, {"content", options.system}});
  if (!options.quiet) {
    std::fprintf(stderr, "Chat with %s. Ctrl-C stops a reply, a second one or Ctrl-D leaves.\n",
                 session.config.name.empty() ? "the model" : session.config.name.c_str());
  }
  LineReader reader;
  Interrupt interrupt;
  while (const std::optional<std::string> line = reader.Next()) {
    if (interrupt.Take()) break;
    if (line->empty()) continue;
    if (line->size() > kMaxLineBytes) return UsageError("a line has more than a megabyte");
    messages.push_back({{"role", "user"}, {"content", *line}});
    SequenceRequest request;
    SHOAL_ASSIGN_OR_RETURN(request.tokens, Render(chat, session, messages));
    request.max_tokens =
        options.max_tokens < 0 ? std::numeric_limits<int>::max() : options.max_tokens;
    request.sampling = options.sampling;
    request.stop_tokens = session.tokenizer->end_of_generation_ids();
    std::string reply;
    const auto show = [&reply](std::string_view text) {
      reply.append(text);
      std::fwrite(text.data(), 1, text.size(), stdout);
      std::fflush(stdout);
    };
    SHOAL_ASSIGN_OR_RETURN(const Generation g,
                           Generate(session.engine, *session.tokenizer, std::move(request), show,
                                    [&interrupt] { return interrupt.pending(); }));
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
