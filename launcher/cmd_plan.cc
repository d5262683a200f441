// shoal plan: who holds what in which tier, how fast that will be, and what bounds it.
#include <algorithm>
#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "fmt/format.h"
#include "kernels/status_macros.h"
#include "launcher/commands.h"
#include "launcher/demo_model.h"
#include "launcher/exit_code.h"
#include "launcher/flags.h"
#include "launcher/machine_speed.h"
#include "nlohmann/json.hpp"
#include "offload/memory_budget.h"
#include "shard/placement.h"
#include "shard/shard_file.h"

namespace shoal {
namespace {

using Json = nlohmann::json;

constexpr int64_t kGiB = int64_t{1} << 30;

struct PlanFlags {
  ModelFlags model;
  std::string output = "text";
  int ranks_per_host = 1;
  bool measure = false;
};

struct RankForecast {
  RankPlan plan;
  RankMemory memory;  // with all weights in memory
  int64_t budget = 0;
  int64_t least = 0;
  Placement placement;
  Forecast forecast;
  Forecast with_one_more;          // with a GiB more
  int64_t context_max = 0;         // tokens of KV that fit when as much as possible is streamed
  int64_t context_unstreamed = 0;  // and when all weights stay in memory
};

struct WholePlan {
  std::string path;
  ModelConfig config;
  EngineOptions options;
  MeasuredSpeed speed;
  std::vector<RankForecast> ranks;
  double decode = 0, prefill = 0, decode_one_more = 0;  // tokens per second of all ranks together
};

// The type that most of the weights have.
DType MainType(const Checkpoint& checkpoint) {
  std::map<DType, int64_t> bytes;
  for (const TensorInfo& t : checkpoint.tensors()) bytes[t.type] += t.bytes;
  return std::max_element(bytes.begin(), bytes.end(),
                          [](const auto& a, const auto& b) { return a.second < b.second; })
      ->first;
}

absl::StatusOr<RankForecast> ForecastRank(const Checkpoint& checkpoint, const WholePlan& whole,
                                          const RankPlan& plan, const Backend& backend,
                                          const MachineSpeed& speed, int64_t budget) {
  RankForecast r;
  r.plan = plan;
  r.budget = budget;
  SHOAL_ASSIGN_OR_RETURN(
      r.memory, Rank::MemoryNeeded(checkpoint, whole.config, whole.options, plan, backend));
  SHOAL_ASSIGN_OR_RETURN(const WeightLayout layout,
                         MakeWeightLayout(checkpoint, whole.config, plan));
  r.least = LeastWeightBytes(layout, whole.config, whole.options.rows);
  const int64_t others = r.memory.kv + r.memory.workspace;
  const absl::StatusOr<Placement> placement =
      PlaceWeights(layout, whole.config, budget - others, whole.options.rows);
  if (!placement.ok()) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "rank ", plan.rank, " has ", FormatBytes(budget), " and needs ",
        FormatBytes(r.least + others), " at least: weights ", FormatBytes(r.least),
        " (streamed), KV cache ", FormatBytes(r.memory.kv), ", workspace ",
        FormatBytes(r.memory.workspace), "; try a smaller context (-c) or batch (-b)"));
  }
  r.placement = *placement;
  r.forecast = Predict(r.placement, speed, whole.options.rows);
  SHOAL_ASSIGN_OR_RETURN(
      const Placement more,
      PlaceWeights(layout, whole.config, budget - others + kGiB, whole.options.rows));
  r.with_one_more = Predict(more, speed, whole.options.rows);
  const int64_t token_bytes =
      std::max<int64_t>(1, r.memory.kv / std::max(1, whole.options.kv_tokens));
  r.context_max = std::max<int64_t>(0, (budget - r.memory.workspace - r.least) / token_bytes);
  r.context_unstreamed =
      std::max<int64_t>(0, (budget - r.memory.workspace - layout.bytes) / token_bytes);
  return r;
}

// Ranks of a stage work side by side, stages one after the other; prefill keeps all stages busy.
void ForecastWhole(WholePlan& whole) {
  std::map<int, double> step, step_more;
  double chunk = 0;
  for (const RankForecast& r : whole.ranks) {
    const auto seconds = [](double rate) { return rate > 0 ? 1 / rate : 0; };
    step[r.plan.stage] = std::max(step[r.plan.stage], seconds(r.forecast.decode_tokens_per_s));
    step_more[r.plan.stage] =
        std::max(step_more[r.plan.stage], seconds(r.with_one_more.decode_tokens_per_s));
    chunk = std::max(chunk, seconds(r.forecast.prefill_tokens_per_s));
  }
  double token = 0, token_more = 0;
  for (const auto& [stage, s] : step) token += s;
  for (const auto& [stage, s] : step_more) token_more += s;
  whole.decode = token > 0 ? 1 / token : 0;
  whole.decode_one_more = token_more > 0 ? 1 / token_more : 0;
  whole.prefill = chunk > 0 ? 1 / chunk : 0;
}

absl::StatusOr<WholePlan> MakePlan(const PlanFlags& f) {
  WholePlan whole;
  SHOAL_ASSIGN_OR_RETURN(whole.options, ToEngineOptions(f.model));
  whole.path = f.model.model;
  if (whole.path.empty()) {
    SHOAL_ASSIGN_OR_RETURN(whole.path, DemoModelPath());
  }
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<Checkpoint> checkpoint, OpenCheckpoint(whole.path));
  SHOAL_ASSIGN_OR_RETURN(whole.config, ReadModelConfig(*checkpoint));
  absl::StatusOr<EngineOptions> resolved = ResolveOptions(whole.config, whole.options);
  if (!resolved.ok()) return WithExitCode(resolved.status(), kExitUsage);
  whole.options = *std::move(resolved);
  const auto plan = MakeShardPlan(whole.config, *checkpoint, whole.options.shard);
  if (!plan.ok()) return WithExitCode(plan.status(), kExitUsage);
  if (f.ranks_per_host < 1) return UsageError("--ranks-per-host is at least 1");
  // Before anything is measured: that takes memory too.
  SHOAL_ASSIGN_OR_RETURN(const int64_t budget,
                         RankMemoryLimit(f.model.ram, f.ranks_per_host, f.ranks_per_host,
                                         /*hypothetical=*/true));
  if (whole.options.cpu.threads == 0) {
    const int cores = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    whole.options.cpu.threads = std::max(1, cores / f.ranks_per_host);
  }
  const std::vector<std::string> files = checkpoint->Files();
  SHOAL_ASSIGN_OR_RETURN(whole.speed,
                         MeasureSpeed(files.size() > 1 ? files[1] : files[0], MainType(*checkpoint),
                                      whole.options.cpu, f.measure));
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<Backend> backend, MakeCpuBackend(whole.options.cpu));
  MachineSpeed speed;
  // Ranks of a host share its disk.
  speed.read_bytes_per_s = whole.speed.read_bytes_per_s / f.ranks_per_host;
  speed.decode_bytes_per_s = whole.speed.decode_bytes_per_s;
  speed.prefill_bytes_per_s = whole.speed.prefill_bytes_per_s;
  for (const RankPlan& rank : plan->ranks) {
    SHOAL_ASSIGN_OR_RETURN(RankForecast r,
                           ForecastRank(*checkpoint, whole, rank, *backend, speed, budget));
    whole.ranks.push_back(std::move(r));
  }
  ForecastWhole(whole);
  return whole;
}

double Gb(int64_t bytes) { return static_cast<double>(bytes) / 1e9; }

void PrintText(const WholePlan& w) {
  fmt::print("{}: {}, {} ranks\n", w.path,
             w.config.name.empty() ? w.config.architecture : w.config.name, w.ranks.size());
  fmt::print(
      "measured {}: disk {:.2f} GB/s, weights x one row {:.1f} GB/s, x a batch {:.0f} GB/s per "
      "row\n",
      w.speed.date, w.speed.read_bytes_per_s / 1e9, w.speed.decode_bytes_per_s / 1e9,
      w.speed.prefill_bytes_per_s / 1e9);
  for (const RankForecast& r : w.ranks) {
    const Placement& p = r.placement;
    fmt::print("rank {}: layers {}-{}, {} for it\n", r.plan.rank, r.plan.layers.begin,
               r.plan.layers.end - 1, FormatBytes(r.budget));
    fmt::print("  weights    {:8.3f} GB of {:.3f} in memory", Gb(p.resident_bytes),
               Gb(p.total_bytes));
    if (p.streams()) {
      fmt::print(", {:.3f} GB for streaming", Gb(p.held_bytes - p.resident_bytes));
    }
    fmt::print("\n  KV cache   {:8.3f} GB for {} tokens\n  workspace  {:8.3f} GB\n",
               Gb(r.memory.kv), w.options.kv_tokens, Gb(r.memory.workspace));
    fmt::print("  from disk  {:8.3f} GB for each token\n", Gb(p.bytes_per_token()));
    fmt::print(
        "  decode {:.2f} tokens/s (reading {:.0f} ms, computing {:.0f} ms: bound by {}), prefill "
        "{:.1f}\n",
        r.forecast.decode_tokens_per_s, r.forecast.stream_s * 1e3, r.forecast.compute_s * 1e3,
        r.forecast.bound, r.forecast.prefill_tokens_per_s);
    fmt::print("  context: up to {} tokens in memory",
               std::min<int64_t>(r.context_max, w.config.context));
    if (r.context_unstreamed < r.context_max && r.context_unstreamed < w.config.context) {
      fmt::print(", {} of them without streaming", r.context_unstreamed);
    }
    fmt::print("\n");
  }
  fmt::print("together: decode {:.2f} tokens/s, prefill {:.1f} tokens/s\n", w.decode, w.prefill);
  if (w.decode_one_more > w.decode * 1.01) {
    fmt::print("one more GiB per rank: decode {:.2f} tokens/s\n", w.decode_one_more);
  } else {
    fmt::print("more memory would not make it faster\n");
  }
  if (w.ranks[0].placement.streams() && !IsDirectory(w.path)) {
    fmt::print(
        "hint: streamed from a GGUF every part is packed anew for each token; faster: shoal shard "
        "-m {} -o DIR\n",
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
                     {"decode_tokens_per_s", r.forecast.decode_tokens_per_s},
                     {"prefill_tokens_per_s", r.forecast.prefill_tokens_per_s},
                     {"read_s", r.forecast.stream_s},
                     {"compute_s", r.forecast.compute_s},
                     {"bound", r.forecast.bound},
                     {"context_max", r.context_max}});
  }
  const Json json = {{"model", w.path},
                     {"measured", w.speed.date},
                     {"disk_bytes_per_s", w.speed.read_bytes_per_s},
                     {"decode_bytes_per_s", w.speed.decode_bytes_per_s},
                     {"prefill_bytes_per_s", w.speed.prefill_bytes_per_s},
                     {"decode_tokens_per_s", w.decode},
                     {"prefill_tokens_per_s", w.prefill},
                     {"decode_tokens_per_s_with_one_more_gib", w.decode_one_more},
                     {"ranks", std::move(ranks)}};
  std::puts(json.dump(2, ' ', false, Json::error_handler_t::replace).c_str());
}

}  // namespace

void AddPlanCommand(CLI::App& app, CommandLine& line) {
  auto flags = std::make_shared<PlanFlags>();
  CLI::App* plan =
      app.add_subcommand("plan", "who holds what in which tier, how fast that is, and why");
  AddModelFlags(*plan, flags->model);
  plan->add_option("-o,--output", flags->output, "text or json")
      ->check(CLI::IsMember({"text", "json"}));
  plan->add_option(
      "--ranks-per-host", flags->ranks_per_host,
      "ranks that share a machine like this one, its memory and its disk (default: 1)");
  plan->add_flag("--measure", flags->measure, "measure this machine again");
  plan->callback([flags, &line] {
    const absl::StatusOr<WholePlan> whole = MakePlan(*flags);
    if (whole.ok()) flags->output == "json" ? PrintJson(*whole) : PrintText(*whole);
    line.exit_code = ReportError(whole.status());
  });
}

}  // namespace shoal
