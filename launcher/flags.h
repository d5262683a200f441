// The flags that several commands share. Each also has an environment name, SHOAL_<FLAG>.
#pragma once

#include <string>

#include "CLI/CLI.hpp"
#include "absl/status/statusor.h"
#include "launcher/world.h"
#include "parallel/rank.h"
#include "parallel/sampler.h"

namespace shoal {

// What model, on what, split how.
struct ModelFlags {
  std::string model;  // empty: the embedded demo model
  int context = 0;
  bool context_given = false;
  int threads = 0;
  int tp = 1;
  int pp = 1;
  std::string split;         // shares of the tp ranks, "auto": by the free memory of their GPUs
  std::string stage_layers;  // layers of each stage, such as 20,12; empty: balanced
  int gpu_layers = -1;  // this process computes the last so many layers on a GPU; -1: not asked
  std::string kv_type = "f16";
  std::string wire = "auto";
  int rows = 512;
  std::string ram;               // bytes for the ranks of a host, such as 4G; empty: what is free
  std::string device = "auto";   // ChooseDevice
  std::string vram;              // bytes of its GPU that a rank may take; empty: what is free
  std::string disk_cache;        // packed weights that are streamed are kept there
  std::string disk_cache_limit;  // of the whole folder, such as 100G
  std::string kv_cache_dir;      // KV pages are kept there for later runs
  std::string kv_disk;           // bytes on disk for the KV pages of a rank, such as 16G
  std::string kv_cache_limit;    // of the whole folder, such as 64G
  int kv_tokens = 0;             // of KV cache in memory; 0: the command's default
  int draft_max = EngineOptions::kAutoDraft;  // tokens guessed for a sequence in a step
  bool in_process = false;                    // ranks are threads of this process
  std::string hostfile;
  std::string hosts;
  std::string net;
  bool allow_fewer_hosts = false;  // hosts that do not answer are left out
};

void AddModelFlags(CLI::App& app, ModelFlags& flags);
// kInvalidArgument with the usage exit code.
// --kv-tokens, for the commands that can do with less than a context.
void AddKvTokensFlag(CLI::App& app, ModelFlags& flags, const char* usual);
// --draft-max, for the commands that generate.
inline constexpr char kUsualDraftText[] = "7 where weights are streamed, else 0";
void AddDraftFlag(CLI::App& app, ModelFlags& flags, const char* usual);
absl::StatusOr<EngineOptions> ToEngineOptions(const ModelFlags& flags);
// What each of this host's `ranks` may take, which are threads of one or ranks of `processes`
// processes: its share of --ram and never more than its share of what is really free, so that a
// generous --ram in a small cgroup is not killed. Negative when the programs themselves take more.
// A plan for another machine is `hypothetical`: it believes --ram.
absl::StatusOr<int64_t> RankMemoryLimit(const std::string& ram, int ranks, int processes,
                                        bool hypothetical = false);
// The --ram with which each of `ranks` ranks may take `bytes`: the inverse of RankMemoryLimit, with
// room for a tokenizer.
int64_t RamFor(int64_t bytes, int ranks, int processes);
WorldOptions ToWorldOptions(const ModelFlags& flags);

void AddSamplingFlags(CLI::App& app, SamplingParams& params);
absl::Status CheckSampling(const SamplingParams& params);

}  // namespace shoal
