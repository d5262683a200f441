#include "launcher/flags.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <map>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "kernels/status_macros.h"
#include "launcher/exit_code.h"
#include "offload/memory_budget.h"

namespace shoal {

void AddModelFlags(CLI::App& app, ModelFlags& f) {
  app.add_option("-m,--model", f.model,
                 "GGUF file (any part of a split one); default: the built-in demo model")
      ->envname("SHOAL_MODEL");
  app.add_option("-c,--ctx-size", f.context,
                 "context in tokens (default: the trained length, at most 4096)")
      ->envname("SHOAL_CTX_SIZE");
  app.add_option("-t,--threads", f.threads,
                 "threads of each rank (default: its share of the host's cores)")
      ->envname("SHOAL_THREADS");
  app.add_option("--tp,--tensor-parallel-size", f.tp, "ranks that share every layer")
      ->envname("SHOAL_TP")
      ->take_last();
  app.add_option("--pp,--pipeline-parallel-size", f.pp,
                 "groups of ranks that each hold a run of layers")
      ->envname("SHOAL_PP")
      ->take_last();
  app.add_option("--split,--tensor-split", f.split,
                 "shares of the tensor-parallel ranks, such as 3,1; auto: by the free memory of "
                 "their GPUs")
      ->envname("SHOAL_SPLIT")
      ->take_last();
  app.add_option("--pp-layers", f.stage_layers,
                 "layers of each pipeline stage, such as 20,12 (default: balanced, by the free "
                 "memory of the GPUs when all ranks have one)")
      ->envname("SHOAL_PP_LAYERS")
      ->take_last();
  app.add_option("--n-gpu-layers,--gpu-layers", f.gpu_layers,
                 "-ngl N: the last N layers on the GPU, the others on the CPU, in this process")
      ->check(CLI::Range(0, 1 << 20))
      ->envname("SHOAL_N_GPU_LAYERS");
  app.add_option("--kv-type,--kv-cache-dtype", f.kv_type, "f32, f16 or q8_0")
      ->envname("SHOAL_KV_TYPE");
  app.add_option("--wire", f.wire,
                 "how partial sums travel between ranks: f32, f16, q8, or auto: f32 on one host, "
                 "between hosts "
                 "what the link needs (default: auto)")
      ->envname("SHOAL_WIRE");
  app.add_option("-b,--batch-size", f.rows, "tokens computed in one step")
      ->envname("SHOAL_BATCH_SIZE");
  app.add_option("--ram", f.ram,
                 "memory that the ranks of a host may take, such as 4G; what does not fit is "
                 "streamed from disk (default and most: what is free, a cgroup's limit included)")
      ->envname("SHOAL_RAM");
  app.add_option("--device", f.device,
                 "auto, cpu, cuda or cuda:N; a list such as cuda,cpu names one for each rank of a "
                 "host (default: auto)")
      ->envname("SHOAL_DEVICE");
  app.add_option("--vram", f.vram,
                 "memory of its GPU that a rank may take, such as 8G; weights that do not fit are "
                 "streamed from the host's memory (default: what is free)")
      ->envname("SHOAL_VRAM");
  app.add_option("--disk-cache", f.disk_cache,
                 "folder that keeps weights as they are streamed: a GGUF that memory does not hold "
                 "is packed there once, as by shoal shard, not again for each token")
      ->envname("SHOAL_DISK_CACHE");
  app.add_option("--disk-cache-limit", f.disk_cache_limit,
                 "what the whole --disk-cache may take, such as 100G: models used longest ago give "
                 "way, one in use never (default: no limit)")
      ->envname("SHOAL_DISK_CACHE_LIMIT");
  app.add_option("--kv-cache-dir", f.kv_cache_dir,
                 "folder that keeps the KV cache of prompts: one that starts like an earlier one, "
                 "of this run or another, goes on from there")
      ->envname("SHOAL_KV_CACHE_DIR");
  app.add_option("--kv-disk", f.kv_disk,
                 "what each rank may take on disk for KV cache that memory has no room for, such "
                 "as 16G (default: 16G with --kv-cache-dir, else nothing)")
      ->envname("SHOAL_KV_DISK");
  app.add_option(
         "--kv-cache-limit", f.kv_cache_limit,
         "what the whole --kv-cache-dir may take, other models' files too, such as 64G: the "
         "prompts used longest ago give way (default: no limit beyond --kv-disk)")
      ->envname("SHOAL_KV_CACHE_LIMIT");
  app.add_flag("--in-process", f.in_process, "ranks are threads of this process, without MPI")
      ->envname("SHOAL_IN_PROCESS");
  app.add_option("--hostfile", f.hostfile, "hosts to start ranks on, as mpirun reads it")
      ->envname("SHOAL_HOSTFILE")
      ->take_last();
  app.add_option("--host", f.hosts, "hosts to start ranks on, such as pc1:1,pc2:1")
      ->envname("SHOAL_HOST")
      ->take_last();
  app.add_option("--net", f.net, "network interface or subnet that the ranks talk over")
      ->envname("SHOAL_NET");
  app.add_flag("--allow-fewer-hosts", f.allow_fewer_hosts,
               "leave out hosts that do not answer: the others take over their part")
      ->envname("SHOAL_ALLOW_FEWER_HOSTS");
}

namespace {

// Resident bytes of this process now.
int64_t OwnMemory() {
  std::ifstream statm("/proc/self/statm");
  int64_t pages = 0, resident = 0;
  statm >> pages >> resident;
  return resident * sysconf(_SC_PAGESIZE);
}

absl::StatusOr<std::vector<double>> ParseSplit(const std::string& text, int tp) {
  std::vector<double> shares;
  if (text.empty() || text == "auto") return shares;
  for (absl::string_view part : absl::StrSplit(text, ',')) {
    double share = 0;
    if (!absl::SimpleAtod(part, &share) || !std::isfinite(share) || share <= 0) {
      return UsageError(absl::StrCat("--split ", text, ": '", part,
                                     "' is not a share; give a number above 0 for each of the ", tp,
                                     " tensor-parallel ranks, such as 3,1"));
    }
    shares.push_back(share);
  }
  if (static_cast<int>(shares.size()) != tp) {
    return UsageError(absl::StrCat("--split ", text, " has ", shares.size(),
                                   " shares, but --tp is ", tp,
                                   ": give one share for each tensor-parallel rank"));
  }
  return shares;
}

absl::StatusOr<std::vector<int>> ParseStageLayers(const std::string& text, int pp) {
  std::vector<int> layers;
  if (text.empty()) return layers;
  for (absl::string_view part : absl::StrSplit(text, ',')) {
    int n = 0;
    if (!absl::SimpleAtoi(part, &n) || n < 1) {
      return UsageError(absl::StrCat("--pp-layers ", text, ": '", part,
                                     "' is no number of layers; give one from 1 for each of the ",
                                     pp, " stages, such as 20,12"));
    }
    layers.push_back(n);
  }
  if (static_cast<int>(layers.size()) != pp) {
    return UsageError(absl::StrCat("--pp-layers ", text, " has ", layers.size(),
                                   " numbers, but --pp is ", pp, ": give one for each stage"));
  }
  return layers;
}

template <typename T>
absl::StatusOr<T> Choose(const char* flag, const std::string& value,
                         const std::map<std::string, T>& known) {
  if (const auto it = known.find(value); it != known.end()) return it->second;
  std::string names;
  for (const auto& [name, unused] : known) absl::StrAppend(&names, names.empty() ? "" : ", ", name);
  return UsageError(absl::StrCat(flag, " ", value, ": choose one of ", names));
}

}  // namespace

void AddKvTokensFlag(CLI::App& app, ModelFlags& f, const char* usual) {
  app.add_option(
         "--kv-tokens", f.kv_tokens,
         absl::StrCat("tokens of KV cache in memory; with --kv-disk a context may be larger "
                      "(default: ",
                      usual, ")"))
      ->envname("SHOAL_KV_TOKENS");
}

void AddDraftFlag(CLI::App& app, ModelFlags& f, const char* usual) {
  app.add_option("--draft-max,--num-speculative-tokens", f.draft_max,
                 absl::StrCat("tokens guessed ahead for a text, from what followed the same tokens "
                              "earlier in it, and checked in one step; never changes the text; 0: "
                              "none (default: ",
                              usual, ")"))
      ->check(CLI::Range(0, EngineOptions::kMostDraft))
      ->envname("SHOAL_DRAFT_MAX");
}

namespace {

void WarnOnStderr(const std::string& what) { std::fprintf(stderr, "shoal: %s\n", what.c_str()); }

// The value of a flag that limits the folder of another flag; 0: not given.
absl::StatusOr<int64_t> FolderLimit(const char* flag, const std::string& value,
                                    const char* folder_flag, const std::string& folder) {
  if (value.empty()) return 0;
  if (folder.empty())
    return UsageError(absl::StrCat(flag, " is of a ", folder_flag, ": name the folder too"));
  const absl::StatusOr<int64_t> most = ParseBytes(value);
  if (!most.ok()) return UsageError(absl::StrCat(flag, " ", value, ": ", most.status().message()));
  if (*most < 1) return UsageError(absl::StrCat(flag, " 0: leave ", folder_flag, " away instead"));
  return *most;
}

absl::StatusOr<KvDiskOptions> ToKvDiskOptions(const ModelFlags& f) {
  KvDiskOptions o;
  SHOAL_ASSIGN_OR_RETURN(o.dir_bytes_max, FolderLimit("--kv-cache-limit", f.kv_cache_limit,
                                                      "--kv-cache-dir", f.kv_cache_dir));
  if (f.kv_cache_dir.empty() && f.kv_disk.empty()) return o;
  const std::string size = f.kv_disk.empty() ? "16G" : f.kv_disk;
  const absl::StatusOr<int64_t> bytes = ParseBytes(size);
  if (!bytes.ok())
    return UsageError(absl::StrCat("--kv-disk ", size, ": ", bytes.status().message()));
  o.bytes = *bytes;
  o.keep = !f.kv_cache_dir.empty();
  o.dir = f.kv_cache_dir;
  if (!o.keep) {  // /tmp may lie in memory
    const char* temporary = std::getenv("TMPDIR");
    o.dir = temporary != nullptr && *temporary != 0 ? temporary : "/var/tmp";
  }
  o.warn = WarnOnStderr;
  return o;
}

}  // namespace

absl::StatusOr<EngineOptions> ToEngineOptions(const ModelFlags& f) {
  EngineOptions o;
  if (f.tp < 1 || f.pp < 1 || f.tp > 1024 || f.pp > 1024) {
    return UsageError(absl::StrCat("--tp ", f.tp, " --pp ", f.pp, ": both are 1 to 1024"));
  }
  if (f.threads < 0 || f.threads > 1024)
    return UsageError(absl::StrCat("-t ", f.threads, ": choose 1 to 1024"));
  if (f.context_given && f.context < 1) {
    return UsageError(absl::StrCat("-c ", f.context, ": the context is at least 1 token"));
  }
  o.shard.tp = f.tp;
  o.shard.pp = f.pp;
  absl::StatusOr<std::vector<double>> split = ParseSplit(f.split, f.tp);
  if (!split.ok()) return split.status();
  o.shard.split = *std::move(split);
  absl::StatusOr<std::vector<int>> layers = ParseStageLayers(f.stage_layers, f.pp);
  if (!layers.ok()) return layers.status();
  o.shard.stage_layers = *std::move(layers);
  if (f.gpu_layers >= 0 && (f.tp > 1 || f.pp > 1 || f.device != "auto")) {
    return UsageError(
        absl::StrCat("-ngl ", f.gpu_layers,
                     " divides the layers between the CPU and a GPU of this process: leave --tp, "
                     "--pp and --device away, or say --pp-layers and --device cpu,cuda"));
  }
  absl::StatusOr<Wire> wire = Choose<Wire>("--wire", f.wire,
                                           {{"auto", Wire::kF32},  // until the ranks can measure
                                            {"f32", Wire::kF32},
                                            {"f16", Wire::kF16},
                                            {"q8", Wire::kQ8}});
  if (!wire.ok()) return wire.status();
  o.wire = *wire;
  absl::StatusOr<KvType> kv =
      Choose<KvType>("--kv-type", f.kv_type,
                     {{"f32", KvType::kF32}, {"f16", KvType::kF16}, {"q8_0", KvType::kQ8_0}});
  if (!kv.ok()) return kv.status();
  o.kv_type = *kv;
  absl::StatusOr<KvDiskOptions> disk = ToKvDiskOptions(f);
  if (!disk.ok()) return disk.status();
  o.kv_disk = *std::move(disk);
  o.disk_cache = f.disk_cache;
  absl::StatusOr<int64_t> most =
      FolderLimit("--disk-cache-limit", f.disk_cache_limit, "--disk-cache", f.disk_cache);
  if (!most.ok()) return most.status();
  o.disk_cache_bytes_max = *most;
  o.warn = WarnOnStderr;
  if (f.kv_tokens < 0)
    return UsageError(absl::StrCat("--kv-tokens ", f.kv_tokens, ": give a number of tokens"));
  o.kv_tokens = f.kv_tokens;
  o.draft_max = f.draft_max;
  o.context = f.context;
  o.rows = f.rows;
  o.cpu.threads = f.threads;
  if (!f.vram.empty()) {
    const absl::StatusOr<int64_t> vram = ParseBytes(f.vram);
    if (!vram.ok()) {
      return UsageError(absl::StrCat("--vram ", f.vram, ": ", vram.status().message()));
    }
    if (*vram < 1) return UsageError("--vram 0: give the GPU some memory, or say --device cpu");
    o.device_memory = *vram;
  }
  return o;
}

namespace {

// Threads' stacks, the tokenizer's tables, buffers of batches: what is not counted piece by piece.
constexpr int64_t kUncounted = 32 << 20;

}  // namespace

int64_t RamFor(int64_t bytes, int ranks, int processes) {
  constexpr int64_t kTokenizer = 64 << 20;
  return ranks * (bytes + kUncounted) + processes * (OwnMemory() + kTokenizer);
}

absl::StatusOr<int64_t> RankMemoryLimit(const std::string& ram, int ranks, int processes,
                                        bool hypothetical) {
  // A system that does not say what is free is not limited by us.
  const absl::StatusOr<FreeMemory> free = ReadFreeMemory();
  if (ram.empty() && !free.ok()) return 0;
  int64_t bytes =
      free.ok() ? free->available - DefaultMargin(*free) : std::numeric_limits<int64_t>::max();
  if (!ram.empty()) {
    const absl::StatusOr<int64_t> given = ParseBytes(ram);
    if (!given.ok()) return UsageError(absl::StrCat("--ram ", ram, ": ", given.status().message()));
    const int64_t taken = *given - processes * OwnMemory();
    bytes = hypothetical ? taken : std::min(bytes, taken);
  }
  const int64_t share = bytes / ranks - kUncounted;
  return share == 0 ? -1 : share;  // 0 would mean no limit
}

WorldOptions ToWorldOptions(const ModelFlags& f) {
  WorldOptions w;
  w.tp = f.tp;
  w.pp = f.pp;
  w.hostfile = f.hostfile;
  w.hosts = f.hosts;
  w.net = f.net;
  return w;
}

void AddSamplingFlags(CLI::App& app, SamplingParams& p) {
  app.add_option("--temp,--temperature", p.temperature,
                 "temperature; 0 always takes the best token")
      ->envname("SHOAL_TEMP")
      ->capture_default_str();
  app.add_option("--top-k", p.top_k, "sample from the k best tokens; 0: all")
      ->envname("SHOAL_TOP_K")
      ->capture_default_str();
  app.add_option("--top-p", p.top_p, "sample from the best tokens that make up this probability")
      ->envname("SHOAL_TOP_P")
      ->capture_default_str();
  app.add_option("--min-p", p.min_p,
                 "leave out tokens below this share of the best one's probability")
      ->envname("SHOAL_MIN_P")
      ->capture_default_str();
  app.add_option("--repeat-penalty", p.repeat_penalty, "1: off")
      ->envname("SHOAL_REPEAT_PENALTY")
      ->capture_default_str();
  app.add_option("--presence-penalty", p.presence_penalty, "0: off")
      ->envname("SHOAL_PRESENCE_PENALTY")
      ->capture_default_str();
  app.add_option("--frequency-penalty", p.frequency_penalty, "0: off")
      ->envname("SHOAL_FREQUENCY_PENALTY")
      ->capture_default_str();
  app.add_option("--repeat-last-n", p.penalty_last_n,
                 "tokens that the penalties look back; -1: all")
      ->envname("SHOAL_REPEAT_LAST_N")
      ->capture_default_str();
  app.add_option("-s,--seed", p.seed, "seed of the draws")
      ->envname("SHOAL_SEED")
      ->capture_default_str();
}

absl::Status CheckSampling(const SamplingParams& p) {
  const auto in = [](float x, float low, float high) {
    return x >= low && x <= high;
  };  // false for NaN
  if (!in(p.temperature, 0, 100))
    return UsageError(absl::StrCat("--temp ", p.temperature, ": choose 0 to 100"));
  if (p.top_k < 0) return UsageError(absl::StrCat("--top-k ", p.top_k, ": choose 0 (all) or more"));
  if (!in(p.top_p, 0, 1)) return UsageError(absl::StrCat("--top-p ", p.top_p, ": choose 0 to 1"));
  if (!in(p.min_p, 0, 1)) return UsageError(absl::StrCat("--min-p ", p.min_p, ": choose 0 to 1"));
  if (!in(p.repeat_penalty, 0.01f, 100)) {
    return UsageError(absl::StrCat("--repeat-penalty ", p.repeat_penalty, ": choose 0.01 to 100"));
  }
  if (!in(p.presence_penalty, -100, 100) || !in(p.frequency_penalty, -100, 100)) {
    return UsageError("--presence-penalty and --frequency-penalty are -100 to 100");
  }
  if (p.penalty_last_n < -1)
    return UsageError(absl::StrCat("--repeat-last-n ", p.penalty_last_n, ": choose -1 or more"));
  return absl::OkStatus();
}

}  // namespace shoal
