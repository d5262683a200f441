// shoal plan: who holds what in which tier, how fast that will be, and what bounds it.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "fmt/format.h"
#include "kernels/cuda/workspace.h"
#include "kernels/status_macros.h"
#include "launcher/commands.h"
#include "launcher/demo_model.h"
#include "launcher/device.h"
#include "launcher/exit_code.h"
#include "launcher/flags.h"
#include "launcher/machine_speed.h"
#include "launcher/speed_probe.h"
#include "nlohmann/json.hpp"
#include "offload/memory_budget.h"
#include "shard/device_forecast.h"
#include "shard/device_store.h"
#include "shard/placement.h"
#include "shard/shard_file.h"

namespace shoal {
namespace {

using Json = nlohmann::json;

constexpr int64_t kGiB = int64_t{1} << 30;

struct PlanFlags {
  ModelFlags model;
  std::string output = "text";
  std::string gpu_speed;
  int ranks_per_host = 1;
  bool measure = false;
};

struct RankForecast {
  RankPlan plan;
  WeightLayout layout;
  RankMemory memory;  // with all weights in memory
  int64_t budget = 0;
  int64_t least = 0;
  int64_t kv_token = 0;     // KV bytes of a token
  Placement placement;      // in the memory of a CPU
  Placement with_one_more;  // with a GiB more
  int64_t vram = 0;         // of its GPU; 0: it computes on the CPU
  std::optional<DevicePlacement> device;
  DevicePlacement device_with_one_more;
  DeviceWork device_work;
  Forecast forecast;         // at the start of a context
  double decode_full_s = 0;  // of a token at its end
  double decode_one_more_s = 0;
  int64_t context_max = 0;         // tokens of KV that fit when as much as possible is streamed
  int64_t context_unstreamed = 0;  // and when all weights stay in memory
};

// Seconds of all ranks together.
struct Together {
  double decode = 0, decode_full = 0, decode_one_more = 0;  // of a token
  double prefill = 0;                                       // of a chunk
};

struct WholePlan {
  std::string given;  // -m
  std::string path;   // of the file; the demo model's is in /proc
  ModelConfig config;
  EngineOptions options;
  int page_records = 0;  // KV pages on disk, of each rank
  MeasuredSpeed speed;   // of a machine, all its ranks that work at the same time together
  int ranks_per_host = 1;
  std::string device;                 // as --device says
  std::optional<MeasuredDevice> gpu;  // its speed, when it is known
  std::vector<RankForecast> ranks;
  Together together;
};

double Rate(double seconds, double tokens = 1) { return seconds > 0 ? tokens / seconds : 0; }

// What a rank holds and needs.
absl::StatusOr<RankForecast> MeasureRank(const Checkpoint& checkpoint, const WholePlan& whole,
                                         const RankPlan& plan, const Backend& backend,
                                         int64_t budget) {
  RankForecast r;
  r.plan = plan;
  r.budget = budget;
  SHOAL_ASSIGN_OR_RETURN(
      r.memory, Rank::MemoryNeeded(checkpoint, whole.config, whole.options, plan, backend));
  SHOAL_ASSIGN_OR_RETURN(r.layout, MakeWeightLayout(checkpoint, whole.config, plan));
  r.least = LeastWeightBytes(r.layout, whole.config, whole.options.rows);
  r.kv_token = std::max<int64_t>(1, Rank::KvTokenBytes(whole.config, whole.options, plan));
  return r;
}

bool OnGpu(const WholePlan& w) {
  return std::any_of(w.ranks.begin(), w.ranks.end(),
                     [](const RankForecast& r) { return r.vram > 0; });
}

// The least --ram of a host that works, which its ranks share equally.
int64_t LeastRam(const WholePlan& w) {
  int64_t most = 0;
  for (const RankForecast& r : w.ranks)
    most = std::max(most, r.least + r.memory.kv + r.memory.workspace);
  return RamFor(most, w.ranks_per_host, w.ranks_per_host);
}

absl::Status PlaceRank(const WholePlan& whole, RankForecast& r) {
  const int64_t budget = r.budget, others = r.memory.kv + r.memory.workspace;
  const absl::StatusOr<Placement> placement =
      PlaceWeights(r.layout, whole.config, budget - others, whole.options.rows);
  if (!placement.ok()) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "rank ", r.plan.rank, budget > 0 ? " has " : " lacks ", FormatBytes(std::abs(budget)),
        budget > 0 ? "" : " for the program alone", " and needs ", FormatBytes(r.least + others),
        " at least: weights ", FormatBytes(r.least), " (streamed), KV cache ",
        FormatBytes(r.memory.kv), ", workspace ", FormatBytes(r.memory.workspace),
        "; the least that works is --ram ", (LeastRam(whole) >> 20) + 1,
        "M for each host; less with a smaller context (-c) or batch (-b)"));
  }
  r.placement = *placement;
  SHOAL_ASSIGN_OR_RETURN(r.with_one_more, PlaceWeights(r.layout, whole.config,
                                                       budget - others + kGiB, whole.options.rows));
  const int64_t staging = r.memory.kv - r.kv_token * whole.options.kv_tokens;
  const int64_t for_context = budget - r.memory.workspace - std::max<int64_t>(0, staging);
  r.context_max = std::max<int64_t>(0, (for_context - r.least) / r.kv_token);
  r.context_unstreamed = std::max<int64_t>(0, (for_context - r.layout.bytes) / r.kv_token);
  return absl::OkStatus();
}

// What of a rank goes to its GPU, if need be with what cuBLAS takes on newer ones.
absl::Status PlaceOnGpu(const Checkpoint& checkpoint, const WholePlan& whole, RankForecast& r) {
  const int64_t staging = Rank::KvStagingBytes(whole.config, whole.options, r.plan);
  const auto workspace = [](const Backend::Limits& limits) {
    return cuda::WorkspaceBytes(limits, /*gemm=*/true);
  };
  SHOAL_ASSIGN_OR_RETURN(r.memory, Rank::MemoryNeeded(checkpoint, whole.config, whole.options,
                                                      r.plan, workspace, /*in_host_memory=*/false));
  const int64_t others = r.memory.kv + r.memory.workspace;
  const int64_t least = LeastDeviceBytes(r.layout, whole.config, whole.options.rows);
  if (r.vram - others < least) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "rank ", r.plan.rank, " has ", FormatBytes(r.vram), " of GPU memory (--vram) and needs ",
        FormatBytes(least + others), " at least: weights ", FormatBytes(least),
        " (streamed), KV cache ", FormatBytes(r.memory.kv), ", workspace ",
        FormatBytes(r.memory.workspace), "; try a smaller context (-c) or batch (-b)"));
  }
  const auto place = [&](int64_t vram) {
    return PlaceOnDevice(r.layout, whole.config, vram - others, r.budget - staging,
                         whole.options.rows);
  };
  SHOAL_ASSIGN_OR_RETURN(r.device, place(r.vram));
  SHOAL_ASSIGN_OR_RETURN(r.device_with_one_more, place(r.vram + kGiB));
  r.least = least;
  const int64_t for_context = r.vram - r.memory.workspace;
  r.context_max = std::max<int64_t>(0, (for_context - least) / r.kv_token);
  r.context_unstreamed = std::max<int64_t>(0, (for_context - r.layout.bytes) / r.kv_token);
  double weights = 0, bytes = 0;
  for (const TensorInfo& t : checkpoint.tensors()) {
    double elements = 1;
    for (const int64_t d : t.dims) elements *= static_cast<double>(d);
    weights += elements;
    bytes += static_cast<double>(t.bytes);
  }
  r.device_work = {bytes / std::max(1.0, weights), static_cast<double>(r.kv_token),
                   4.0 * static_cast<double>(r.plan.q_heads.size()) * whole.config.head_dim *
                       static_cast<double>(r.plan.layers.size())};
  return absl::OkStatus();
}

// Whether weights of the rank come from disk for each token.
bool ReadsDisk(const RankForecast& r) {
  return r.device.has_value() ? r.device->host.streams() : r.placement.streams();
}

void ForecastRank(const WholePlan& whole, const MachineSpeed& speed, double idle_s,
                  RankForecast& r) {
  Workload work;
  work.rows = whole.options.rows;
  work.idle_s_before = idle_s;
  const auto kv_token = static_cast<double>(r.kv_token);
  work.prefill_kv_bytes = kv_token * work.rows * work.rows / 2;  // the first chunk of a prompt
  const auto predict = [&](const Placement& on_cpu, const DevicePlacement* on_gpu) {
    if (on_gpu == nullptr) return Predict(r.layout, whole.config, on_cpu, speed, work);
    if (!whole.gpu.has_value()) return Forecast{};  // nothing is known
    return PredictOnDevice(r.layout, whole.config, *on_gpu, whole.gpu->speed, r.device_work,
                           speed.read_bytes_per_s, work);
  };
  const DevicePlacement* const device = r.device.has_value() ? &*r.device : nullptr;
  r.forecast = predict(r.placement, device);
  r.decode_one_more_s =
      predict(r.with_one_more, device != nullptr ? &r.device_with_one_more : nullptr).decode_s;
  const auto seen = [&](int context) {  // by a row, mean over the rank's layers
    return whole.config.seen_of(static_cast<int>(r.plan.layers.begin),
                                static_cast<int>(r.plan.layers.end), context);
  };
  work.kv_bytes = kv_token * seen(whole.options.context);
  r.decode_full_s = predict(r.placement, device).decode_s;
  const int on_disk = whole.options.context - whole.options.kv_tokens;
  if (r.decode_full_s > 0 && on_disk > 0 && StreamsKv(whole.options, whole.page_records) &&
      speed.read_bytes_per_s > 0) {
    const double read = seen(whole.options.context) - seen(whole.options.kv_tokens);
    r.decode_full_s += kv_token * read / speed.read_bytes_per_s;
  }
}

// Ranks of a stage work side by side, stages one after the other; prefill keeps all stages busy.
// Where `stages_per_host` of them share a disk, they then read at the same time.
Together AllTogether(const std::vector<RankForecast>& ranks, int stages_per_host) {
  std::map<int, Together> stages;
  std::map<int, double> stream_s;  // of a stage
  for (const RankForecast& r : ranks) {
    stream_s[r.plan.stage] = std::max(stream_s[r.plan.stage], r.forecast.stream_s);
    Together& s = stages[r.plan.stage];
    s.decode = std::max(s.decode, r.forecast.decode_s);
    s.decode_full = std::max(s.decode_full, r.decode_full_s);
    s.decode_one_more = std::max(s.decode_one_more, r.decode_one_more_s);
    s.prefill = std::max(s.prefill, r.forecast.prefill_s);
  }
  Together all;
  std::map<int, double> host_stream_s;
  for (const auto& [stage, seconds] : stream_s) {
    double& host = host_stream_s[stage / stages_per_host];
    host += seconds;
    all.prefill = std::max(all.prefill, host);
  }
  for (const auto& [stage, s] : stages) {
    all.decode += s.decode;
    all.decode_full += s.decode_full;
    all.decode_one_more += s.decode_one_more;
    all.prefill = std::max(all.prefill, s.prefill);
  }
  return all;
}

// What one of `ranks_per_host` ranks gets of its machine: those of a stage share it at every
// moment, stages take turns.
MachineSpeed ShareOf(const MachineSpeed& machine, int together) {
  MachineSpeed s = machine;
  s.read_bytes_per_s /= together;
  s.decode_bytes_per_s /= together;
  s.prefill_bytes_per_s /= together;
  s.kv_bytes_per_s /= together;
  s.prefill_kv_bytes_per_s /= together;
  return s;
}

bool PacksForEachToken(const WholePlan& whole) {
  return !IsDirectory(whole.path) && whole.options.disk_cache.empty();
}

absl::Status MeasureFor(const Checkpoint& checkpoint, const PlanFlags& f, int together,
                        WholePlan& whole) {
  SpeedQuestion question;
  const std::vector<std::string> files = checkpoint.Files();
  question.path = files.size() > 1 ? files[1] : files[0];
  for (const TensorInfo& t : checkpoint.tensors()) question.bytes[t.type] += t.bytes;
  question.attention.q_heads = whole.config.heads;
  question.attention.head_dim = whole.config.head_dim;
  question.attention.group = whole.config.group();
  question.attention.scale = 1;
  question.kv_type = whole.options.kv_type;
  question.cpu = whole.options.cpu;
  question.cpu.threads *= together;
  question.memory = whole.ranks[0].budget;
  SHOAL_ASSIGN_OR_RETURN(whole.speed, MeasureSpeed(question, f.measure));
  const bool streams = std::any_of(whole.ranks.begin(), whole.ranks.end(), ReadsDisk);
  if (!streams || !PacksForEachToken(whole)) return absl::OkStatus();
  // From a GGUF the cores that multiply also pack, again for each token.
  MachineSpeed& speed = whole.speed.speed;
  SHOAL_ASSIGN_OR_RETURN(const double packing,
                         MeasurePacking(checkpoint, whole.ranks[0].layout, question.cpu.threads));
  if (packing > 0) speed.read_bytes_per_s = packing;
  speed.read_slowdown = speed.decode_slowdown = speed.prefill_slowdown = 2;
  return absl::OkStatus();
}

// Gives each rank that --device, -ngl or --vram puts on a GPU its memory, and finds out how fast
// such a GPU is. On a machine without one --vram and --gpu-speed say what it would be.
absl::Status FindGpus(const PlanFlags& f, int ranks_per_host, WholePlan& whole) {
  const int64_t given = whole.options.device_memory;
  const absl::StatusOr<DeviceChoice> here = ChooseDevice("cuda", 0);
  bool any = false;
  for (RankForecast& r : whole.ranks) {
    const int local = r.plan.rank % ranks_per_host;
    if (!WantsGpu(whole.device, local, here.ok() || given > 0)) continue;
    any = true;
    r.vram = given;
    if (given == 0 && !here.ok()) {
      return UsageError(
          absl::StrCat(here.status().message(),
                       "; --vram 24G plans for GPUs of that size, --gpu-speed for their speed"));
    }
    if (given > 0) continue;
    SHOAL_ASSIGN_OR_RETURN(r.vram, FreeGpuShare(whole.device, local, ranks_per_host));
  }
  if (!any) return absl::OkStatus();
  if (!f.gpu_speed.empty()) {
    SHOAL_ASSIGN_OR_RETURN(const DeviceSpeed speed, ParseGpuSpeed(f.gpu_speed));
    whole.gpu = MeasuredDevice{speed, ""};
  } else if (here.ok()) {
    SHOAL_ASSIGN_OR_RETURN(const std::string name, GpuName(here->gpu));
    SHOAL_ASSIGN_OR_RETURN(whole.gpu,
                           MeasureDevice(name, f.measure, [&] { return MeasureGpu(here->gpu); }));
  }
  return absl::OkStatus();
}

absl::StatusOr<WholePlan> MakePlan(const PlanFlags& f) {
  WholePlan whole;
  SHOAL_ASSIGN_OR_RETURN(whole.options, ToEngineOptions(f.model));
  whole.given = whole.path = f.model.model;
  if (whole.path.empty()) {
    SHOAL_ASSIGN_OR_RETURN(whole.path, DemoModelPath());
  }
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<Checkpoint> checkpoint, OpenCheckpoint(whole.path));
  SHOAL_ASSIGN_OR_RETURN(whole.config, ReadModelConfig(*checkpoint));
  if (f.ranks_per_host < 1) return UsageError("--ranks-per-host is at least 1");
  whole.device = f.model.device;
  int ranks_per_host = f.ranks_per_host;
  if (f.model.gpu_layers >= 0) {
    whole.device = KeepOnGpu(f.model.gpu_layers, whole.config.layers, whole.options.shard);
    ranks_per_host = std::max(ranks_per_host, whole.options.shard.pp);
  }
  SHOAL_RETURN_IF_ERROR(CheckDeviceFlag(whole.device));
  absl::StatusOr<EngineOptions> resolved = ResolveOptions(whole.config, whole.options);
  if (!resolved.ok()) return WithExitCode(resolved.status(), kExitUsage);
  whole.options = *std::move(resolved);
  const auto plan = MakeShardPlan(whole.config, *checkpoint, whole.options.shard);
  if (!plan.ok()) return WithExitCode(plan.status(), kExitUsage);
  // Before anything is measured: that takes memory too.
  SHOAL_ASSIGN_OR_RETURN(const int64_t budget,
                         RankMemoryLimit(f.model.ram, ranks_per_host, ranks_per_host,
                                         /*hypothetical=*/true));
  if (whole.options.cpu.threads == 0) {
    const int cores = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    whole.options.cpu.threads = std::max(1, cores / ranks_per_host);
  }
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<Backend> backend, MakeCpuBackend(whole.options.cpu));
  whole.ranks_per_host = ranks_per_host;
  for (const RankPlan& rank : plan->ranks) {
    SHOAL_ASSIGN_OR_RETURN(RankForecast r, MeasureRank(*checkpoint, whole, rank, *backend, budget));
    // Unequal stages of one process have unequal parts of its memory.
    if (f.model.gpu_layers >= 0 && plan->pp > 1) {
      r.budget = budget * plan->pp / whole.config.layers * rank.layers.size();
    }
    whole.ranks.push_back(std::move(r));
  }
  SHOAL_RETURN_IF_ERROR(FindGpus(f, ranks_per_host, whole));
  for (RankForecast& r : whole.ranks) {
    SHOAL_RETURN_IF_ERROR(r.vram > 0 ? PlaceOnGpu(*checkpoint, whole, r) : PlaceRank(whole, r));
  }
  whole.page_records = KvPageRecords(whole.config, whole.options, *plan);
  const int together = std::min(plan->tp, ranks_per_host);
  SHOAL_RETURN_IF_ERROR(MeasureFor(*checkpoint, f, together, whole));
  const MachineSpeed speed = ShareOf(whole.speed.speed, together);
  for (RankForecast& r : whole.ranks) ForecastRank(whole, speed, 0, r);
  const int stages_per_host = std::max(1, ranks_per_host / plan->tp);
  whole.together = AllTogether(whole.ranks, stages_per_host);
  // A stage with a disk of its own reads on while it waits for the others.
  if (plan->pp > 1 && ranks_per_host <= plan->tp) {
    for (RankForecast& r : whole.ranks) {
      ForecastRank(whole, speed, whole.together.decode - r.forecast.decode_s, r);
    }
    whole.together = AllTogether(whole.ranks, stages_per_host);
  }
  return whole;
}

// Three digits: a prediction has no more.
std::string ShortRate(double rate) {
  return fmt::format("{:.{}f} tokens/s", rate, rate < 9.995 ? 2 : rate < 99.95 ? 1 : 0);
}

double Gb(int64_t bytes) { return static_cast<double>(bytes) / 1e9; }

int64_t StaysOnGpu(const DevicePlacement& d) {
  return d.device_bytes - d.ring_slots * d.ring_slot_bytes -
         d.device.expert_slots * d.device.slot_bytes;
}

int64_t TokensOnDisk(const WholePlan& w) {
  return int64_t{w.page_records} * kKvPageBlocks * kKvBlockTokens;
}

// Where the weights of a rank are.
void PrintPlaces(const WholePlan& w, const RankForecast& r) {
  fmt::print("rank {}: layers {}-{}, ", r.plan.rank, r.plan.layers.begin, r.plan.layers.end - 1);
  if (r.device.has_value()) {
    const DevicePlacement& d = *r.device;
    const int64_t stays = StaysOnGpu(d);
    fmt::print("on a GPU with {} for it\n  weights    {:8.3f} GB of {:.3f} stay there",
               FormatBytes(r.vram), Gb(stays), Gb(r.layout.bytes));
    if (d.streams) fmt::print(", {:.3f} GB for streaming", Gb(d.device_bytes - stays));
    fmt::print("\n  over the link {:5.3f} GB for each token, {:.3f} GB of it from disk\n",
               Gb(d.device.bytes_per_token()), Gb(d.host.bytes_per_token()));
  } else {
    const Placement& p = r.placement;
    fmt::print("{} for it\n  weights    {:8.3f} GB of {:.3f} in memory", FormatBytes(r.budget),
               Gb(p.resident_bytes), Gb(p.total_bytes));
    if (p.streams()) {
      fmt::print(", {:.3f} GB for streaming", Gb(p.held_bytes - p.resident_bytes));
    }
    fmt::print("\n  from disk  {:8.3f} GB for each token\n", Gb(p.bytes_per_token()));
  }
  fmt::print("  KV cache   {:8.3f} GB for {} tokens\n  workspace  {:8.3f} GB\n", Gb(r.memory.kv),
             w.options.kv_tokens, Gb(r.memory.workspace));
}

void PrintRank(const WholePlan& w, const RankForecast& r) {
  PrintPlaces(w, r);
  if (r.device.has_value() && !w.gpu.has_value()) {
    fmt::print("  how fast is not known: there is no GPU here; say it with --gpu-speed\n");
  } else {
    fmt::print(
        "  decode {} ({} {:.0f} ms, computing {:.0f} ms: bound by {}), {} at the end of the "
        "context; prefill {}\n",
        ShortRate(Rate(r.forecast.decode_s)), r.device.has_value() ? "sending" : "reading",
        r.forecast.stream_s * 1e3, r.forecast.compute_s * 1e3, r.forecast.bound,
        ShortRate(Rate(r.decode_full_s)), ShortRate(Rate(r.forecast.prefill_s, w.options.rows)));
  }
  fmt::print("  context: up to {} tokens in {}", std::min<int64_t>(r.context_max, w.config.context),
             r.device.has_value() ? "the GPU's memory" : "memory");
  if (r.context_unstreamed < r.context_max && r.context_unstreamed < w.config.context) {
    fmt::print(", {} of them without streaming", r.context_unstreamed);
  }
  fmt::print("\n");
  if (w.options.kv_disk.bytes > 0) {
    fmt::print("  KV pages on disk: {} tokens in {:.3f} GB{}\n", TokensOnDisk(w),
               Gb(TokensOnDisk(w) * r.kv_token),
               StreamsKv(w.options, w.page_records)
                   ? "; a context that memory does not hold is read from there for each token"
                   : "");
  }
}

bool SpeedIsKnown(const WholePlan& w) {
  return w.gpu.has_value() || std::none_of(w.ranks.begin(), w.ranks.end(),
                                           [](const auto& r) { return r.device.has_value(); });
}

void PrintText(const WholePlan& w) {
  fmt::print("{}: {}, {} rank{}\n", w.given.empty() ? "built in" : w.given,
             w.config.name.empty() ? w.config.architecture : w.config.name, w.ranks.size(),
             w.ranks.size() == 1 ? "" : "s");
  fmt::print("measured {}: ", w.speed.date);
  if (w.speed.speed.read_bytes_per_s > 0) {
    fmt::print("disk {:.2f} GB/s, ", w.speed.speed.read_bytes_per_s / 1e9);
  }
  fmt::print("weights x one row {:.1f} GB/s, x a batch {:.0f} GB/s per row\n",
             w.speed.speed.decode_bytes_per_s / 1e9, w.speed.speed.prefill_bytes_per_s / 1e9);
  if (w.gpu.has_value()) {
    fmt::print(
        "GPU, {}: memory {:.0f} GB/s, f16 products {:.0f} TFLOP/s, from host memory {:.1f} GB/s\n",
        w.gpu->date.empty() ? "as given" : absl::StrCat("measured ", w.gpu->date),
        w.gpu->speed.read_bytes_per_s / 1e9, w.gpu->speed.operations_per_s / 1e12,
        w.gpu->speed.link_bytes_per_s / 1e9);
  }
  for (const RankForecast& r : w.ranks) PrintRank(w, r);
  if (!SpeedIsKnown(w)) return;
  const Together& t = w.together;
  fmt::print("together: decode {}, prefill {}\n", ShortRate(Rate(t.decode)),
             ShortRate(Rate(t.prefill, w.options.rows)));
  if (t.decode_one_more < t.decode * 0.99) {
    fmt::print("one more GiB per rank: decode {}\n", ShortRate(Rate(t.decode_one_more)));
  } else {
    fmt::print("more memory would not make it faster\n");
  }
  if (!OnGpu(w))
    fmt::print("enough to run at all, slower: --ram {}M for each host\n", (LeastRam(w) >> 20) + 1);
  if (ReadsDisk(w.ranks[0]) && PacksForEachToken(w)) {
    fmt::print(
        "hint: streamed from a GGUF every part is packed anew for each token; faster: --disk-cache "
        "DIR, or shoal shard -m {} -o DIR\n",
        w.path);
  }
}

void PrintJson(const WholePlan& w) {
  Json ranks = Json::array();
  for (const RankForecast& r : w.ranks) {
    const Placement& p = r.placement;
    ranks.push_back({{"rank", r.plan.rank},
                     {"stage", r.plan.stage},
                     {"layers", {r.plan.layers.begin, r.plan.layers.end}},
                     {"budget_bytes", r.budget},
                     {"weight_bytes", p.total_bytes},
                     {"resident_bytes", p.resident_bytes},
                     {"streaming_buffer_bytes", p.held_bytes - p.resident_bytes},
                     {"kv_bytes", r.memory.kv},
                     {"workspace_bytes", r.memory.workspace},
                     {"disk_bytes_per_token", p.bytes_per_token()},
                     {"decode_tokens_per_s", Rate(r.forecast.decode_s)},
                     {"decode_tokens_per_s_full_context", Rate(r.decode_full_s)},
                     {"prefill_tokens_per_s", Rate(r.forecast.prefill_s, w.options.rows)},
                     {"read_s", r.forecast.stream_s},
                     {"compute_s", r.forecast.compute_s},
                     {"bound", r.forecast.bound},
                     {"least_bytes", r.least + r.memory.kv + r.memory.workspace},
                     {"context_max", r.context_max},
                     {"context_max_unstreamed", r.context_unstreamed}});
    if (w.options.kv_disk.bytes > 0) ranks.back()["kv_disk_tokens"] = TokensOnDisk(w);
    if (r.device.has_value()) {
      for (const char* key : {"weight_bytes", "resident_bytes", "streaming_buffer_bytes"}) {
        ranks.back().erase(key);  // of a CPU
      }
      ranks.back()["weight_bytes"] = r.layout.bytes;
      ranks.back()["disk_bytes_per_token"] = r.device->host.bytes_per_token();
      ranks.back()["gpu"] = {{"vram_bytes", r.vram},
                             {"resident_bytes", StaysOnGpu(*r.device)},
                             {"memory_bytes_per_token", r.device->device.bytes_per_token()},
                             {"disk_bytes_per_token", r.device->host.bytes_per_token()}};
    }
  }
  const MachineSpeed& speed = w.speed.speed;
  const Together& t = w.together;
  Json json = {{"model", w.path},
               {"measured", w.speed.date},
               {"disk_bytes_per_s", speed.read_bytes_per_s},
               {"decode_bytes_per_s", speed.decode_bytes_per_s},
               {"prefill_bytes_per_s", speed.prefill_bytes_per_s},
               {"kv_bytes_per_s", speed.kv_bytes_per_s},
               {"prefill_kv_bytes_per_s", speed.prefill_kv_bytes_per_s},
               {"decode_tokens_per_s", Rate(t.decode)},
               {"decode_tokens_per_s_full_context", Rate(t.decode_full)},
               {"prefill_tokens_per_s", Rate(t.prefill, w.options.rows)},
               {"decode_tokens_per_s_with_one_more_gib", Rate(t.decode_one_more)},
               {"ranks", std::move(ranks)}};
  if (!OnGpu(w)) json["least_ram_bytes"] = LeastRam(w);
  if (w.gpu.has_value()) {
    json["gpu"] = {{"measured", w.gpu->date},
                   {"read_bytes_per_s", w.gpu->speed.read_bytes_per_s},
                   {"operations_per_s", w.gpu->speed.operations_per_s},
                   {"link_bytes_per_s", w.gpu->speed.link_bytes_per_s}};
  }
  std::puts(json.dump(2, ' ', false, Json::error_handler_t::replace).c_str());
}

}  // namespace

void AddPlanCommand(CLI::App& app, CommandLine& line) {
  auto flags = std::make_shared<PlanFlags>();
  CLI::App* plan =
      app.add_subcommand("plan", "who holds what in which tier, how fast that is, and why");
  AddModelFlags(*plan, flags->model);
  AddKvTokensFlag(*plan, flags->model, "a full context for each sequence");
  plan->add_option("-o,--output", flags->output, "text or json")
      ->check(CLI::IsMember({"text", "json"}));
  plan->add_option(
      "--ranks-per-host", flags->ranks_per_host,
      "ranks that share a machine like this one, its memory and its disk (default: 1)");
  plan->add_option("--gpu-speed", flags->gpu_speed,
                   "speed of the GPUs to plan for, such as 1008,165,25: GB/s of their memory, "
                   "TFLOP/s of f16 products, GB/s from host memory to them (default: as measured "
                   "here)");
  plan->add_flag("--measure", flags->measure, "measure this machine again");
  plan->callback([flags, &line] {
    const absl::StatusOr<WholePlan> whole = MakePlan(*flags);
    if (whole.ok()) flags->output == "json" ? PrintJson(*whole) : PrintText(*whole);
    line.exit_code = ReportError(whole.status());
  });
}

}  // namespace shoal
