// shoal run: complete a prompt, or chat when none is given.
#include <unistd.h>

#include <cstdio>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/status_macros.h"
#include "launcher/batch_run.h"
#include "launcher/chat.h"
#include "launcher/commands.h"
#include "launcher/exit_code.h"
#include "launcher/flags.h"
#include "launcher/generate.h"
#include "launcher/interrupt.h"
#include "launcher/read_input.h"
#include "launcher/remote_run.h"
#include "launcher/session.h"

namespace shoal {
namespace {

struct RunFlags {
  ModelFlags model;
  SamplingParams sampling;
  std::string prompt;
  bool prompt_given = false;
  std::string prompt_file;
  std::string batch_file;
  int parallel = 16;
  int max_tokens = -1;
  bool ignore_eos = false;
  bool hide_prompt = false;
  bool print_ids = false;
  bool parse_special = false;
  bool quiet = false;
  std::string system;
  std::string server;
  std::string server_key;
  std::string server_ca;

  bool chats() const { return !prompt_given && prompt_file.empty() && batch_file.empty(); }
};

absl::StatusOr<std::string> ReadPrompt(const RunFlags& f) {
  if (f.prompt_file.empty()) return f.prompt;
  SHOAL_ASSIGN_OR_RETURN(std::string text, ReadInput(f.prompt_file, "the prompt"));
  // A file's last line break is not meant as part of the prompt.
  if (!text.empty() && text.back() == '\n') text.pop_back();
  return text;
}

// What a run works on, read before the weights are.
struct Work {
  std::vector<BatchPrompt> batch;
  std::string prompt;
  std::vector<int32_t> tokens;
};

absl::Status ReadWork(const RunFlags& f, const ModelConfig& config, const EngineOptions& options,
                      const Tokenizer& tokenizer, Work& work) {
  if (f.chats()) return CanChat(tokenizer);
  if (!f.batch_file.empty()) {
    SHOAL_ASSIGN_OR_RETURN(work.batch,
                           ReadBatch(f.batch_file, tokenizer, options.context, f.parse_special));
    return absl::OkStatus();
  }
  SHOAL_ASSIGN_OR_RETURN(work.prompt, ReadPrompt(f));
  SHOAL_ASSIGN_OR_RETURN(work.tokens,
                         tokenizer.Encode(work.prompt, /*add_special=*/true, f.parse_special));
  if (work.tokens.empty())
    return UsageError("the prompt is empty and the model has no start token: give -p TEXT");
  const int length = static_cast<int>(work.tokens.size());
  if (length >= options.kv_tokens && length < options.context && options.kv_disk.bytes == 0) {
    return UsageError(absl::StrCat(
        "the prompt has ", length, " tokens, but the KV cache holds ", options.kv_tokens,
        ": raise --kv-tokens, or let what memory does not hold go to disk (--kv-disk)"));
  }
  if (length < options.context) return absl::OkStatus();
  return UsageError(absl::StrCat(
      "the prompt has ", length, " tokens, but the context holds ", options.context,
      " and the reply needs at least one: shorten it, or raise -c (the model was trained on ",
      config.context, ")"));
}

absl::Status Complete(const RunFlags& f, const Work& work, Session& session) {
  const Tokenizer& tokenizer = *session.tokenizer;
  SequenceRequest request;
  request.tokens = work.tokens;
  request.max_tokens = f.max_tokens < 0 ? std::numeric_limits<int>::max() : f.max_tokens;
  request.sampling = f.sampling;
  if (!f.ignore_eos) request.stop_tokens = tokenizer.end_of_generation_ids();

  std::vector<int32_t> ids = request.tokens;
  // The prompt after the first step: weights that are streamed show only then whether they are
  // whole.
  bool prompt_shown = f.hide_prompt;
  const auto show = [&](std::string_view text) {
    if (f.print_ids) return;
    if (!std::exchange(prompt_shown, true))
      std::fwrite(work.prompt.data(), 1, work.prompt.size(), stdout);
    std::fwrite(text.data(), 1, text.size(), stdout);
    std::fflush(stdout);
  };
  Interrupt interrupt;
  SHOAL_ASSIGN_OR_RETURN(const Generation g,
                         Generate(session.engine, tokenizer, std::move(request), false, show,
                                  [&interrupt] { return interrupt.pending(); }));
  ids.insert(ids.end(), g.tokens.begin(), g.tokens.end());
  if (f.print_ids) std::fputs(absl::StrJoin(ids, " ").c_str(), stdout);
  std::fputc('\n', stdout);
  if (std::fflush(stdout) != 0) return absl::InternalError("cannot write the text to stdout");
  if (!f.quiet) std::fprintf(stderr, "\n%s", FormatSpeed(g).c_str());
  if (interrupt.Take()) return WithExitCode(absl::CancelledError("interrupted"), kExitInterrupted);
  return absl::OkStatus();
}

absl::Status CompleteRemotely(const RunFlags& f) {
  RemoteRunOptions o;
  o.url = f.server;
  o.key = f.server_key;
  o.ca_file = f.server_ca;
  o.sampling = f.sampling;
  o.max_tokens = f.max_tokens;
  o.ignore_eos = f.ignore_eos;
  o.hide_prompt = f.hide_prompt;
  o.quiet = f.quiet;
  o.system = f.system;
  if (f.prompt_given || !f.prompt_file.empty()) {
    SHOAL_ASSIGN_OR_RETURN(o.prompt, ReadPrompt(f));
  }
  return RunRemote(o);
}

int Run(RunFlags& f, const CommandLine& line) {
  if (absl::Status s = CheckSampling(f.sampling); !s.ok()) return ReportError(s);
  if (f.max_tokens < -1)
    return ReportError(UsageError(absl::StrCat(
        "-n ", f.max_tokens, ": give a number of tokens, or -1 to go on until the model ends")));
  if (!f.server.empty()) return ReportError(CompleteRemotely(f));
  SessionOptions options;
  if (!f.batch_file.empty()) {
    if (f.parallel < 1) return ReportError(UsageError("--parallel is at least 1"));
    options.sequences = f.parallel;
  }
  options.argc = line.argc;
  options.argv = line.argv;
  options.quiet = f.quiet;
  Work work;
  options.prepare = [&f, &work](const ModelConfig& config, const EngineOptions& resolved,
                                const Tokenizer* tokenizer) {
    return ReadWork(f, config, resolved, *tokenizer, work);
  };
  return RunSession(
      f.model, options,
      [&f, &work](Session& session) -> absl::Status {
        if (f.chats()) return Chat({f.sampling, f.system, f.max_tokens, f.quiet}, session);
        if (f.batch_file.empty()) return Complete(f, work, session);
        return RunBatch({std::move(work.batch), f.sampling, f.max_tokens, f.ignore_eos, f.quiet},
                        session);
      },
      [&f](const std::vector<RankReport>& reports) {
        if (!f.quiet) std::fputs(FormatReports(reports).c_str(), stderr);
      });
}

}  // namespace

void AddRunCommand(CLI::App& app, CommandLine& line) {
  auto flags = std::make_shared<RunFlags>();
  CLI::App* run = app.add_subcommand("run", "complete a prompt, or chat when none is given");
  AddModelFlags(*run, flags->model);
  AddKvTokensFlag(*run, flags->model, "a full context for each sequence");
  AddDraftFlag(*run, flags->model, kUsualDraftText);
  AddSamplingFlags(*run, flags->sampling);
  CLI::Option* prompt = run->add_option("-p,--prompt", flags->prompt, "text to continue");
  CLI::Option* file =
      run->add_option("-f,--file", flags->prompt_file, "file with the prompt; - reads a pipe")
          ->excludes(prompt);
  run->add_option(
         "--batch-file", flags->batch_file,
         "file with a prompt on each line: all are completed, many at once, one JSON object a line")
      ->excludes(prompt)
      ->excludes(file);
  run->add_option("--parallel", flags->parallel,
                  "texts of a batch file that are completed at once");
  run->add_option("-n,--predict,--max-tokens", flags->max_tokens,
                  "tokens to generate; -1: until the model ends")
      ->envname("SHOAL_PREDICT");
  run->add_option("--system", flags->system, "system message of a chat");
  run->add_flag("--ignore-eos", flags->ignore_eos, "go on after an end token");
  run->add_flag("--special", flags->parse_special,
                "control tokens in the prompt, such as <|im_end|>, count as such");
  run->add_flag("--no-display-prompt", flags->hide_prompt, "print the completion only");
  run->add_flag("--print-ids", flags->print_ids, "print token ids in place of text");
  run->add_flag("-q,--quiet", flags->quiet, "no statistics on stderr");
  CLI::Option* server = run->add_option(
      "--server", flags->server, "let a running server compute, such as http://localhost:8080");
  server->envname("SHOAL_SERVER");
  // What the server's own flags decide, or its API does not offer.
  for (const char* other : {"--model", "--ctx-size", "--tp", "--pp", "--split", "--batch-file",
                            "--special", "--print-ids", "--in-process"}) {
    server->excludes(run->get_option(other));
  }
  run->add_option("--server-key", flags->server_key, "its API key")
      ->envname("SHOAL_SERVER_KEY")
      ->needs(server);
  run->add_option("--server-ca", flags->server_ca, "PEM file: whom to trust for https")
      ->envname("SHOAL_SERVER_CA");
  run->callback([flags, prompt, run, &line] {
    flags->prompt_given = prompt->count() > 0;
    flags->model.context_given = run->get_option("--ctx-size")->count() > 0;
    line.exit_code = Run(*flags, line);
  });
}

}  // namespace shoal
