// shoal shard: write a model as files for its ranks, packed and in execution order.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "fmt/format.h"
#include "kernels/status_macros.h"
#include "launcher/commands.h"
#include "launcher/exit_code.h"
#include "launcher/flags.h"
#include "launcher/progress_bar.h"
#include "shard/shard_file.h"

namespace shoal {
namespace {

struct ShardFlags {
  ModelFlags model;  // of these: model, tp, pp, split, stage_layers, threads
  std::string output;
  bool verify = false;
  bool force = false;
  bool quiet = false;
};

absl::Status Verify(const ShardFlags& f) {
  const std::string& dir = f.output.empty() ? f.model.model : f.output;
  if (dir.empty()) return UsageError("--verify needs the folder: shoal shard --verify -o DIR");
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<ShardDirectory> shards, ShardDirectory::Open(dir));
  absl::Status status;
  {
    ProgressBar bar("reading", !f.quiet);
    status = shards->Verify([&bar](int64_t done, int64_t total) { bar.Show(done, total); });
  }
  SHOAL_RETURN_IF_ERROR(status);
  if (!f.quiet) {
    std::fprintf(stderr, "%s: every extent of %zu files has its checksum\n", dir.c_str(),
                 shards->manifest().ranks.size());
  }
  return absl::OkStatus();
}

absl::Status Write(const ShardFlags& f) {
  if (f.model.model.empty() || f.output.empty()) {
    return UsageError("shard needs a model and a folder: shoal shard -m model.gguf -o DIR");
  }
  SHOAL_ASSIGN_OR_RETURN(const EngineOptions engine, ToEngineOptions(f.model));
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<Checkpoint> checkpoint,
                         OpenCheckpoint(f.model.model));
  if (IsDirectory(f.model.model)) {
    return UsageError(absl::StrCat(f.model.model, " is a shard directory already; give the GGUF"));
  }
  SHOAL_ASSIGN_OR_RETURN(const ModelConfig config, ReadModelConfig(*checkpoint));
  if (const auto plan = MakeShardPlan(config, *checkpoint, engine.shard); !plan.ok()) {
    return WithExitCode(plan.status(), kExitUsage);
  }
  ShardWriteOptions options;
  options.shard = engine.shard;
  options.force = f.force;
  options.threads = f.model.threads > 0
                        ? f.model.threads
                        : static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  absl::StatusOr<ShardWriteResult> result;
  {
    ProgressBar bar("packing", !f.quiet);
    options.progress = [&bar](int64_t done, int64_t total) { bar.Show(done, total); };
    result = WriteShards(*checkpoint, config, f.output, options);
  }
  SHOAL_RETURN_IF_ERROR(result.status());
  if (f.quiet) return absl::OkStatus();
  std::string note;
  if (result->already_there) {
    note = ", which were there already";
  } else if (result->resumed_bytes > 0) {
    note = fmt::format(", {:.2f} GB of it from a run before",
                       static_cast<double>(result->resumed_bytes) / 1e9);
  }
  std::fprintf(
      stderr, "%s: %d file%s, %.2f GB%s\nrun it with: shoal run -m %s%s%s%s%s\n", f.output.c_str(),
      engine.shard.tp * engine.shard.pp, engine.shard.tp * engine.shard.pp == 1 ? "" : "s",
      static_cast<double>(result->bytes) / 1e9, note.c_str(), f.output.c_str(),
      engine.shard.tp > 1 ? absl::StrCat(" --tp ", engine.shard.tp).c_str() : "",
      engine.shard.pp > 1 ? absl::StrCat(" --pp ", engine.shard.pp).c_str() : "",
      f.model.stage_layers.empty() ? ""
                                   : absl::StrCat(" --pp-layers ", f.model.stage_layers).c_str(),
      f.model.split.empty() ? "" : absl::StrCat(" --split ", f.model.split).c_str());
  return absl::OkStatus();
}

}  // namespace

void AddShardCommand(CLI::App& app, CommandLine& line) {
  auto flags = std::make_shared<ShardFlags>();
  CLI::App* shard = app.add_subcommand(
      "shard", "write a model as one file per rank, ready to be streamed from disk");
  ModelFlags& m = flags->model;
  shard->add_option("-m,--model", m.model, "GGUF file (any part of a split one)")
      ->envname("SHOAL_MODEL");
  shard->add_option("-o,--output", flags->output, "folder to write, or to verify");
  shard->add_option("--tp,--tensor-parallel-size", m.tp, "ranks that share every layer")
      ->envname("SHOAL_TP");
  shard
      ->add_option("--pp,--pipeline-parallel-size", m.pp,
                   "groups of ranks that each hold a run of layers")
      ->envname("SHOAL_PP");
  shard
      ->add_option("--split,--tensor-split", m.split,
                   "shares of the tensor-parallel ranks, such as 3,1")
      ->envname("SHOAL_SPLIT");
  shard
      ->add_option("--pp-layers", m.stage_layers,
                   "layers of each pipeline stage, such as 20,12 (default: balanced)")
      ->envname("SHOAL_PP_LAYERS");
  shard->add_option("-t,--threads", m.threads, "threads that read and pack (default: all cores)")
      ->envname("SHOAL_THREADS");
  shard->add_flag("--verify", flags->verify, "read the folder and compare every checksum");
  shard->add_flag("-f,--force", flags->force, "replace what the folder holds");
  shard->add_flag("-q,--quiet", flags->quiet, "no progress");
  shard->callback([flags, &line] {
    line.exit_code = ReportError(flags->verify ? Verify(*flags) : Write(*flags));
  });
}

}  // namespace shoal
