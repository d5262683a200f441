// `shoal engine`: what `shoal serve` starts, restarts and talks to. Not for people.
#include <algorithm>
#include <limits>
#include <memory>
#include <string>

#include "kernels/status_macros.h"
#include "launcher/commands.h"
#include "launcher/engine_process.h"
#include "launcher/flags.h"
#include "launcher/session.h"

namespace shoal {
namespace {

struct EngineFlags {
  ModelFlags model;
  std::string socket;
  int parallel = 1;
  bool no_prefix_cache = false;
};

constexpr int kUsualContext = 4096;  // EngineOptions::context of 0 takes no more
// What the KV cache of a rank may take by itself when nobody says how much.
constexpr int64_t kUsualKvBytes = int64_t{2} << 30;
constexpr int kFewestContexts = 2;

// A full context for every sequence where that is cheap; else what fits kUsualKvBytes on each rank,
// but at least two full contexts. Sequences share the pool, and give way when it is full.
absl::StatusOr<int> UsualKvTokens(const Checkpoint& checkpoint, const ModelConfig& config,
                                  const EngineOptions& o, int sequences) {
  const int context = o.context > 0 ? o.context : std::min(config.context, kUsualContext);
  SHOAL_ASSIGN_OR_RETURN(const int64_t token_bytes, Rank::KvTokenBytes(checkpoint, config, o));
  const int64_t contexts = kUsualKvBytes / std::max<int64_t>(1, token_bytes * context);
  const int64_t kept =
      std::clamp<int64_t>(contexts, std::min(kFewestContexts, sequences), sequences);
  return static_cast<int>(
      std::min<int64_t>(kept * (context + kKvBlockTokens), std::numeric_limits<int>::max()));
}

int RunEngine(const EngineFlags& flags, const CommandLine& line) {
  SessionOptions options;
  options.argc = line.argc;
  options.argv = line.argv;
  options.sequences = flags.parallel;
  options.prefix_cache = !flags.no_prefix_cache;
  options.quiet = true;
  options.adjust = [&flags](const Checkpoint& checkpoint, const ModelConfig& config,
                            EngineOptions& o) -> absl::Status {
    if (o.kv_tokens > 0) return absl::OkStatus();
    SHOAL_ASSIGN_OR_RETURN(o.kv_tokens, UsualKvTokens(checkpoint, config, o, flags.parallel));
    return absl::OkStatus();
  };
  return RunSession(
      flags.model, options,
      [&flags](Session& session) { return ServeEngine(session, flags.socket); }, nullptr);
}

}  // namespace

void AddEngineCommand(CLI::App& app, CommandLine& line) {
  auto flags = std::make_shared<EngineFlags>();
  CLI::App* engine = app.add_subcommand("engine", "the part of 'serve' that computes");
  engine->group("");  // not listed
  AddModelFlags(*engine, flags->model);
  engine->add_option("--socket", flags->socket, "the coordinator's socket")->required();
  engine->add_option("--parallel", flags->parallel, "sequences computed at once");
  AddKvTokensFlag(*engine, flags->model, "what serve says");
  AddDraftFlag(*engine, flags->model, kUsualDraftText);
  engine->add_flag("--no-prefix-cache", flags->no_prefix_cache, "compute every prompt anew");
  engine->callback([flags, engine, &line] {
    flags->model.context_given = engine->get_option("--ctx-size")->count() > 0;
    line.exit_code = RunEngine(*flags, line);
  });
}

}  // namespace shoal
