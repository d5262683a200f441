#include "parallel/rank.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "kernels/status_macros.h"
#include "offload/memory_budget.h"
#include "shard/device_store.h"
#include "shard/placement.h"

namespace shoal {
namespace {

constexpr int kResultTag = 2;
constexpr int kStatsTag = 3;
constexpr int kLogitSlice = 32;  // rows of one product with the head: bounds the logits' memory
constexpr int kDefaultContext = 4096;
// Of a device's free memory that is left alone: code of kernels, staging, what other programs take.
constexpr int64_t kDeviceMargin = int64_t{256} << 20;
constexpr int kMaxSequences = 4096;
constexpr int64_t kMostPages = 1 << 20;  // of a page file: bounds the index
using Clock = std::chrono::steady_clock;

bool WantsHidden(const Batch::LogitRow& row) {
  return row.candidates == Batch::LogitRow::kHiddenState;
}

// Bytes of the result of one row from a last-stage rank.
// Layout: log_sum_exp f64, then one of: target logit f32 + 4 bytes; k candidates (token i32, logit
// f32); vocab f32; the hidden state f32, which all ranks of the stage have and the first one sends.
int64_t ResultBytes(const Batch::LogitRow& row, const RankPlan& from, int dim) {
  const int64_t vocab = from.vocab.size();
  const int64_t head = sizeof(double);
  if (WantsHidden(row)) return head + (from.tp_index == 0 ? int64_t{dim} * 4 : 0);
  if (row.target >= 0) return head + 8;
  if (row.candidates > 0) return head + std::min<int64_t>(row.candidates, vocab) * 8;
  return head + vocab * 4;
}

// The rows a batch's results describe, in order.
std::vector<Batch::LogitRow> ResultRows(const Batch& batch) {
  if (batch.kind == Batch::Kind::kForward) return batch.logits;
  return std::vector<Batch::LogitRow>(batch.fetch.size(), Batch::LogitRow{0, 0, 1, -1});
}

void Append(const void* p, size_t n, std::vector<uint8_t>& out) {
  out.insert(out.end(), static_cast<const uint8_t*>(p), static_cast<const uint8_t*>(p) + n);
}

void AppendRow(const Batch::LogitRow& row, const float* logits, const Extent& vocab,
               std::vector<uint8_t>& out) {
  const absl::Span<const float> all(logits, vocab.size());
  const bool scored = row.target >= 0;
  const float scale = scored ? 1 : row.inv_temperature;
  const double lse = scale > 0 ? LogSumExp(all, scale) : 0;
  Append(&lse, sizeof lse, out);
  if (scored) {
    const bool mine = row.target >= vocab.begin && row.target < vocab.end;
    const float target[2] = {
        mine ? logits[row.target - vocab.begin] : -std::numeric_limits<float>::infinity(), 0};
    Append(target, sizeof target, out);
  } else if (row.candidates > 0) {
    std::vector<Candidate> best =
        TopCandidates(all, static_cast<int32_t>(vocab.begin),
                      static_cast<int>(std::min<int64_t>(row.candidates, vocab.size())));
    best.resize(std::min<int64_t>(row.candidates, vocab.size()),
                {-1, -std::numeric_limits<float>::infinity()});  // NaN logits were left out
    static_assert(sizeof(Candidate) == 8);
    Append(best.data(), best.size() * sizeof(Candidate), out);
  } else {
    Append(all.data(), all.size() * sizeof(float), out);
  }
}

// The same for rows that all want candidates, where the device finds them: the rows stay there.
bool AppendReduced(Model& model, absl::Span<const Batch::LogitRow> rows,
                   std::vector<uint8_t>& out) {
  int most = 0;
  std::vector<LogitRequest> requests;
  for (const Batch::LogitRow& row : rows) {
    if (row.target >= 0 || row.candidates <= 0) return false;
    most = std::max(most, std::min(row.candidates, model.vocab_rows()));
    requests.push_back({row.inv_temperature, -1});
  }
  std::vector<LogitSummary> summaries(rows.size());
  std::vector<LogitCandidate> best(rows.size() * most);
  if (!model.ReduceLogits(requests, most, summaries.data(), best.data())) return false;
  for (size_t i = 0; i < rows.size(); ++i) {
    Append(&summaries[i].log_sum_exp, sizeof(double), out);
    static_assert(sizeof(LogitCandidate) == sizeof(Candidate));
    Append(&best[i * most], std::min(rows[i].candidates, model.vocab_rows()) * sizeof(Candidate),
           out);
  }
  return true;
}

double AddLogs(double a, double b) {
  const double high = std::max(a, b);
  if (!std::isfinite(high)) return high;
  return high + std::log(std::exp(a - high) + std::exp(b - high));
}

void Merge(ShardRow& into, ShardRow&& from) {
  into.log_sum_exp = AddLogs(into.log_sum_exp, from.log_sum_exp);
  into.target_logit = std::max(into.target_logit, from.target_logit);
  into.all.insert(into.all.end(), from.all.begin(), from.all.end());
  if (into.hidden.empty()) into.hidden = std::move(from.hidden);
  into.candidates.insert(into.candidates.end(), from.candidates.begin(), from.candidates.end());
}

ModelLimits LimitsOf(const EngineOptions& o) { return {o.rows, o.context, kLogitSlice}; }

int BlocksFor(int tokens) { return (tokens + kKvBlockTokens - 1) / kKvBlockTokens; }

int KvBlocks(const EngineOptions& o) { return BlocksFor(o.kv_tokens); }

// Of one layer, through which the pages of a context pass that is larger than the pool.
int KvWindowBlocks(const EngineOptions& o) {
  return o.kv_disk.bytes > 0 && KvBlocks(o) < BlocksFor(o.context) ? BlocksFor(o.context) : 0;
}

KvShape KvShapeOf(const ModelConfig& config, const EngineOptions& o, const RankPlan& plan) {
  return {o.kv_type, static_cast<int>(plan.kv_heads.size()), config.head_dim};
}

KvPageShape PageShapeOf(const ModelConfig& config, const EngineOptions& o, const RankPlan& plan) {
  return {static_cast<int>(plan.layers.size()), KvShapeOf(config, o, plan).block_bytes()};
}

}  // namespace

int KvPageRecords(const ModelConfig& config, const EngineOptions& o, const ShardPlan& plan) {
  int64_t records = o.kv_disk.bytes > 0 ? kMostPages : 0;
  for (const RankPlan& rank : plan.ranks) {
    int64_t bytes = o.kv_disk.bytes;
    // All ranks may be on one host: their own files shall not be what fills the folder.
    if (o.kv_disk.dir_bytes_max > 0) {
      bytes = std::min(bytes, o.kv_disk.dir_bytes_max / static_cast<int64_t>(plan.ranks.size()));
    }
    bytes -= kKvFileHeaderBytes;
    records = std::min(records, bytes / PageShapeOf(config, o, rank).record_bytes());
  }
  return static_cast<int>(std::max<int64_t>(0, records));
}

bool StreamsKv(const EngineOptions& o, int page_records) {
  // A page that is being filled, one that is being written, and room for a chunk of rows.
  constexpr int kLeastBlocks = 3 * kKvPageBlocks;
  return KvWindowBlocks(o) > 0 && KvBlocks(o) >= kLeastBlocks &&
         page_records >= BlocksFor(o.context) / kKvPageBlocks;
}

absl::StatusOr<EngineOptions> ResolveOptions(const ModelConfig& config, EngineOptions o) {
  if (o.context == 0) o.context = std::min(config.context, kDefaultContext);
  if (o.context < 1 || o.context > config.context) {
    return absl::InvalidArgumentError(absl::StrCat(
        "-c ", o.context, ": ", config.name.empty() ? "the model" : config.name,
        " was trained on a context of ", config.context, " tokens; choose 1 to ", config.context));
  }
  if (o.sequences < 1 || o.sequences > kMaxSequences) {
    return absl::InvalidArgumentError(
        absl::StrCat(o.sequences, " sequences at once: choose 1 to ", kMaxSequences));
  }
  if (o.rows < 1 || o.rows > 65536) {
    return absl::InvalidArgumentError(
        absl::StrCat("a batch of ", o.rows, " rows: choose 1 to 65536"));
  }
  o.rows = std::max(o.rows, o.sequences);
  if (o.draft_max < EngineOptions::kAutoDraft || o.draft_max > EngineOptions::kMostDraft) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--draft-max ", o.draft_max, ": choose 0 (none) to ", EngineOptions::kMostDraft));
  }
  if (o.kv_tokens == 0) {
    const int64_t tokens = (int64_t{o.context} + kKvBlockTokens) * o.sequences;
    if (tokens > std::numeric_limits<int>::max()) {
      return absl::InvalidArgumentError(
          absl::StrCat(o.sequences, " sequences of ", o.context, " tokens are too many"));
    }
    o.kv_tokens = static_cast<int>(tokens);
  }
  return o;
}

absl::StatusOr<RankMemory> Rank::MemoryNeeded(const Checkpoint& checkpoint,
                                              const ModelConfig& config,
                                              const EngineOptions& options, const RankPlan& plan,
                                              const Backend& backend) {
  return MemoryNeeded(
      checkpoint, config, options, plan,
      [&backend](const Backend::Limits& l) { return backend.WorkspaceBytes(l); },
      backend.shares_host_memory());
}

absl::StatusOr<RankMemory> Rank::MemoryNeeded(
    const Checkpoint& checkpoint, const ModelConfig& config, const EngineOptions& options,
    const RankPlan& plan, absl::FunctionRef<int64_t(const Backend::Limits&)> workspace,
    bool in_host_memory) {
  SHOAL_ASSIGN_OR_RETURN(const WeightLayout layout, MakeWeightLayout(checkpoint, config, plan));
  const ModelLimits limits = LimitsOf(options);
  RankMemory m;
  m.weights = layout.bytes;
  m.kv = KvBlocks(options) * KvCache::BlockBytes(KvShapeOf(config, options, plan),
                                                 static_cast<int>(plan.layers.size()));
  // A device's own memory holds none of the staging.
  if (in_host_memory) m.kv += KvStagingBytes(config, options, plan);
  m.kv += KvWindowBlocks(options) * KvShapeOf(config, options, plan).block_bytes();
  m.workspace = workspace(Model::BackendLimits(config, plan, limits)) +
                Model::ActivationBytes(config, plan, limits) +
                RopeTables::Bytes(config, limits.context);
  if (plan.last_stage)
    m.workspace += int64_t{kLogitSlice} * plan.vocab.size() * static_cast<int64_t>(sizeof(float));
  return m;
}

absl::StatusOr<int64_t> Rank::KvTokenBytes(const Checkpoint& checkpoint, const ModelConfig& config,
                                           const EngineOptions& options) {
  SHOAL_ASSIGN_OR_RETURN(const ShardPlan plan, MakeShardPlan(config, checkpoint, options.shard));
  int64_t most = 0;
  for (const RankPlan& p : plan.ranks) most = std::max(most, KvTokenBytes(config, options, p));
  return most;
}

int64_t Rank::KvTokenBytes(const ModelConfig& config, const EngineOptions& options,
                           const RankPlan& plan) {
  return KvCache::BlockBytes(KvShapeOf(config, options, plan),
                             static_cast<int>(plan.layers.size())) /
         kKvBlockTokens;
}

int64_t Rank::KvStagingBytes(const ModelConfig& config, const EngineOptions& options,
                             const RankPlan& plan) {
  if (options.kv_disk.bytes == 0) return 0;
  return KvPager::MemoryBytes(PageShapeOf(config, options, plan), KvPager::Options{});
}

absl::StatusOr<std::unique_ptr<Rank>> Rank::Create(Communicator& world,
                                                   const Checkpoint& checkpoint,
                                                   const ModelConfig& config,
                                                   const EngineOptions& options,
                                                   const Progress& progress) {
  std::unique_ptr<Rank> rank(new Rank());
  rank->config_ = config;
  rank->options_ = options;
  SHOAL_ASSIGN_OR_RETURN(rank->plan_, MakeShardPlan(config, checkpoint, options.shard));
  SHOAL_ASSIGN_OR_RETURN(Mesh mesh, Mesh::Create(world, rank->plan_));
  rank->mesh_ = std::make_unique<Mesh>(std::move(mesh));
  const RankPlan& plan = rank->mesh_->plan();

  SHOAL_ASSIGN_OR_RETURN(
      rank->backend_, options.make_backend ? options.make_backend() : MakeCpuBackend(options.cpu));
  SHOAL_RETURN_IF_ERROR(rank->mesh_->UseMemoryOf(*rank->backend_));
  SHOAL_ASSIGN_OR_RETURN(rank->memory_,
                         MemoryNeeded(checkpoint, config, options, plan, *rank->backend_));
  SHOAL_ASSIGN_OR_RETURN(rank->layout_, MakeWeightLayout(checkpoint, config, plan));

  SHOAL_RETURN_IF_ERROR(rank->backend_->shares_host_memory()
                            ? rank->LoadWeights(checkpoint, progress)
                            : rank->LoadDeviceWeights(checkpoint, progress));

  const int blocks_per_slot = BlocksFor(options.context);
  SHOAL_ASSIGN_OR_RETURN(
      KvCache kv, KvCache::Create(*rank->backend_, KvShapeOf(config, options, plan),
                                  static_cast<int>(plan.layers.size()), KvBlocks(options),
                                  options.sequences, blocks_per_slot, KvWindowBlocks(options)));
  rank->kv_ = std::make_unique<KvCache>(std::move(kv));
  SHOAL_RETURN_IF_ERROR(rank->OpenPager(checkpoint));
  SHOAL_ASSIGN_OR_RETURN(
      rank->model_,
      Model::Create(rank->config_, rank->layout_, LimitsOf(options), options.wire, *rank->mesh_,
                    *rank->backend_, *rank->weights_.source, *rank->kv_, rank->pager_.get()));
  if (plan.last_stage) rank->normed_.resize(config.dim);
  rank->kept_.resize(rank->plan_.pp + 1);
  return rank;
}

absl::Status Rank::DoesNotFit(int64_t budget, int64_t least, const char* flag) const {
  const int64_t others = memory_.kv + memory_.workspace;
  // --ram is of a host, --vram of a rank.
  const Communicator& world = mesh_->world();
  int64_t ranks = 0;
  for (int r = 0; r < world.size(); ++r) ranks += world.host(r) == world.host(world.rank()) ? 1 : 0;
  if (absl::string_view(flag) != "--ram") ranks = 1;
  const std::string who =
      ranks > 1 ? absl::StrCat("the ", ranks, " ranks of this host together ") : "it ";
  const int64_t token_bytes = KvTokenBytes(config_, options_, plan_.ranks[mesh_->world().rank()]);
  const int64_t tokens = (budget - memory_.workspace - least) / std::max<int64_t>(1, token_bytes);
  return absl::ResourceExhaustedError(absl::StrCat(
      "this does not fit ",
      budget > 0 ? absl::StrCat("in the ", FormatBytes(budget), " that the rank may take")
                 : absl::StrCat("in memory: the program alone takes ", FormatBytes(-budget),
                                " more than the rank may"),
      ":\n  weights    ", FormatBytes(least), " at least, streamed (", FormatBytes(layout_.bytes),
      " in all)\n  KV cache   ", FormatBytes(memory_.kv), " (", options_.kv_tokens,
      " tokens)\n  workspace  ", FormatBytes(memory_.workspace), " (batches of ", options_.rows,
      ")\n  together   ", FormatBytes(least + others), "\n",
      tokens >= kKvBlockTokens
          ? absl::StrCat("a context of ", tokens / options_.sequences, " tokens (-c) would fit")
          : absl::StrCat("give ", who, FormatBytes(ranks * (least + others - budget)), " more (",
                         flag, "), or try a smaller batch (-b) and context (-c)")));
}

WeightStoreOptions Rank::StoreOptions(const Progress& progress) const {
  WeightStoreOptions store;
  store.threads = std::max(1, options_.cpu.threads);
  store.progress = progress;
  return store;
}

// The weights, from the disk cache where that helps. What is wrong with the cache costs time, never
// the run: it is packed anew, or done without.
absl::StatusOr<WeightStore> Rank::OpenCached(const Checkpoint& checkpoint, bool streams,
                                             const Progress& progress, const OpenStore& open) {
  WeightStoreOptions store = StoreOptions(progress);
  const bool sharded = dynamic_cast<const ShardDirectory*>(&checkpoint) != nullptr;
  if (options_.disk_cache.empty() || !streams || sharded) return open(checkpoint, store);
  const auto warn = [this](const absl::Status& s, const char* then) {
    if (options_.warn) options_.warn(absl::StrCat(s.message(), then));
  };
  ShardCacheOptions cache;
  cache.dir = options_.disk_cache;
  cache.bytes_max = options_.disk_cache_bytes_max;
  cache.memory = options_.memory != 0 ? std::max<int64_t>(1, options_.memory) : 0;
  cache.write.shard = options_.shard;
  cache.write.threads = store.threads;
  cache.write.progress = progress;
  store.source = &checkpoint;
  store.warn = options_.warn;
  for (const bool anew : {false, true}) {
    absl::StatusOr<CachedShards> cached = OpenShardCache(checkpoint, config_, cache, anew);
    if (!cached.ok()) {
      warn(cached.status(), "; weights are packed again for each token (--disk-cache)");
      break;
    }
    cached_.emplace(*std::move(cached));
    absl::StatusOr<WeightStore> opened = open(*cached_->directory, store);
    const bool damaged = absl::IsDataLoss(opened.status()) ||
                         absl::IsInvalidArgument(opened.status()) ||
                         absl::IsNotFound(opened.status());
    if (!damaged) return opened;
    warn(opened.status(), anew ? "" : " (this is done now)");
  }
  return open(checkpoint, StoreOptions(progress));
}

// Places the weights in what the rest leaves of the rank's budget, and opens them there.
absl::Status Rank::LoadWeights(const Checkpoint& checkpoint, const Progress& progress) {
  budget_ = std::make_unique<MemoryBudget>(
      options_.memory != 0 ? options_.memory : std::numeric_limits<int64_t>::max(),
      "what the rank may take");
  const bool others_fit = budget_->Reserve("KV cache", memory_.kv).ok() &&
                          budget_->Reserve("workspace", memory_.workspace).ok();
  const absl::StatusOr<Placement> placement =
      PlaceWeights(layout_, config_, others_fit ? budget_->free() : 0, options_.rows);
  if (!placement.ok()) {
    return DoesNotFit(options_.memory, LeastWeightBytes(layout_, config_, options_.rows), "--ram");
  }
  SHOAL_RETURN_IF_ERROR(budget_->Reserve("weights", placement->held_bytes));
  const OpenStore open = [&](const Checkpoint& from, const WeightStoreOptions& store) {
    return OpenWeights(from, layout_, *placement, store);
  };
  SHOAL_ASSIGN_OR_RETURN(weights_, OpenCached(checkpoint, placement->streams(), progress, open));
  memory_.weights = placement->held_bytes;
  memory_.resident = placement->resident_bytes;
  memory_.allowed = options_.memory;
  memory_.streamed = placement->bytes_per_token();
  return absl::OkStatus();
}

// The same on a device with memory of its own; what does not fit there is streamed from the host's.
absl::Status Rank::LoadDeviceWeights(const Checkpoint& checkpoint, const Progress& progress) {
  const int64_t free = backend_->FreeBytes() - kDeviceMargin;
  const int64_t all = options_.device_memory > 0 ? std::min(options_.device_memory, free) : free;
  int64_t host = std::numeric_limits<int64_t>::max();
  if (options_.memory != 0) {
    host = options_.memory - KvStagingBytes(config_, options_, mesh_->plan());
  }
  const int64_t budget = all - memory_.kv - memory_.workspace;
  const int64_t least = LeastDeviceBytes(layout_, config_, options_.rows);
  if (budget < least) return DoesNotFit(all, least, "--vram");
  SHOAL_ASSIGN_OR_RETURN(const DevicePlacement placement,
                         PlaceOnDevice(layout_, config_, budget, host, options_.rows));
  const OpenStore open = [&](const Checkpoint& from, const WeightStoreOptions& store) {
    return OpenDeviceWeights(from, layout_, placement, *backend_, store);
  };
  SHOAL_ASSIGN_OR_RETURN(weights_,
                         OpenCached(checkpoint, placement.host.streams(), progress, open));
  memory_.weights = placement.device_bytes;
  memory_.streamed = placement.device.bytes_per_token();
  return absl::OkStatus();
}

absl::Status Rank::Run(const Batch& batch) {
  SHOAL_RETURN_IF_ERROR(RunPages(batch));
  if (batch.kind == Batch::Kind::kStats) {
    if (mesh_->world().rank() == 0) return absl::OkStatus();
    const RankStats stats = StatsNow();
    return mesh_->world().Send(&stats, sizeof stats, 0, kStatsTag);
  }
  if (batch.kind != Batch::Kind::kForward && batch.kind != Batch::Kind::kFetchLogits) {
    return absl::OkStatus();
  }
  const Clock::time_point start = Clock::now();
  SHOAL_RETURN_IF_ERROR(Compute(batch));
  stats_.step_seconds += std::chrono::duration<double>(Clock::now() - start).count();
  stats_.steps += batch.kind == Batch::Kind::kForward ? 1 : 0;
  return absl::OkStatus();
}

RankStats Rank::StatsNow() const {
  RankStats s = stats_;
  s.memory = memory_;
  s.all_reduce_seconds = mesh_->tp().all_reduce_seconds();
  if (weights_.streamer != nullptr) {
    const StreamStats streamed = weights_.streamer->stats();
    s.stream_wait_seconds = streamed.wait_s;
    s.bytes_streamed = streamed.bytes_read;
  }
  return s;
}

absl::StatusOr<std::vector<RankStats>> Rank::CollectStats() {
  std::vector<RankStats> all = {StatsNow()};
  for (int r = 1; r < mesh_->world().size(); ++r) {
    SHOAL_RETURN_IF_ERROR(
        mesh_->world().Recv(&all.emplace_back(), sizeof(RankStats), r, kStatsTag));
  }
  return all;
}

absl::Status Rank::Compute(const Batch& batch) {
  if (batch.kind == Batch::Kind::kForward) {
    if (batch.rows() == 0) return kv_->Apply(batch.table);
    SHOAL_RETURN_IF_ERROR(model_->Forward(batch));
  }
  if (!mesh_->plan().last_stage || ResultRows(batch).empty()) return absl::OkStatus();
  SHOAL_ASSIGN_OR_RETURN(std::vector<uint8_t> results, ComputeResults(batch));
  if (mesh_->world().rank() == 0) {
    own_results_.push_back(std::move(results));
    return absl::OkStatus();
  }
  return mesh_->world().Send(results.data(), static_cast<int64_t>(results.size()), 0, kResultTag);
}

absl::StatusOr<std::vector<uint8_t>> Rank::ComputeResults(const Batch& batch) {
  const std::vector<Batch::LogitRow> rows = ResultRows(batch);
  const int64_t dim = model_->dim();
  std::vector<float> fetched;
  const float* hidden = model_->kept_rows();
  if (batch.kind != Batch::Kind::kForward) {
    const Kept& kept = kept_[batch.step % kept_.size()];
    for (int32_t i : batch.fetch) {
      if (kept.step != batch.step || i < 0 || i >= static_cast<int>(kept.rows.size())) {
        return absl::InternalError(
            absl::StrCat("logit row ", i, " of step ", batch.step, " is no longer held"));
      }
      fetched.insert(fetched.end(), &kept.hidden[i * dim], &kept.hidden[i * dim] + dim);
    }
    hidden = fetched.data();
  }
  std::vector<uint8_t> out;
  const Extent& vocab = mesh_->plan().vocab;
  for (size_t begin = 0; begin < rows.size();) {
    if (WantsHidden(rows[begin])) {
      SHOAL_RETURN_IF_ERROR(AppendHidden(hidden + begin * dim, out));
      ++begin;
      continue;
    }
    int n = 1;
    while (n < kLogitSlice && begin + n < rows.size() && !WantsHidden(rows[begin + n])) ++n;
    SHOAL_RETURN_IF_ERROR(model_->Head(hidden + begin * dim, n, batch.prefill_head != 0));
    const auto slice = absl::MakeConstSpan(rows).subspan(begin, n);
    if (!AppendReduced(*model_, slice, out)) {
      const float* logits = model_->Logits(n);
      for (int i = 0; i < n; ++i) AppendRow(slice[i], logits + i * vocab.size(), vocab, out);
    }
    begin += n;
  }
  if (batch.kind == Batch::Kind::kForward) {
    model_->AwaitKeptRows();
    Kept& kept = kept_[batch.step % kept_.size()];
    kept = {batch.step, std::vector<float>(hidden, hidden + rows.size() * dim), batch.logits};
  }
  SHOAL_RETURN_IF_ERROR(backend_->Check());
  return out;
}

absl::Status Rank::AppendHidden(const float* hidden, std::vector<uint8_t>& out) {
  out.insert(out.end(), sizeof(double), 0);
  if (mesh_->plan().tp_index != 0) return absl::OkStatus();
  SHOAL_RETURN_IF_ERROR(model_->FinalNorm(hidden, normed_.data()));
  const auto* p = reinterpret_cast<const uint8_t*>(normed_.data());
  out.insert(out.end(), p, p + normed_.size() * sizeof(float));
  return absl::OkStatus();
}

absl::StatusOr<std::vector<ShardRow>> Rank::Collect(const Batch& batch) {
  SHOAL_CHECK(mesh_->world().rank() == 0, "results go to rank 0");
  std::vector<ShardRow> merged;
  const std::vector<Batch::LogitRow> rows = ResultRows(batch);
  if (rows.empty()) return merged;
  for (int t = 0; t < plan_.tp; ++t) {
    const RankPlan& from = plan_.ranks[mesh_->last_stage_rank(t)];
    std::vector<uint8_t> bytes;
    if (from.rank == 0) {
      SHOAL_CHECK(!own_results_.empty(), "results are collected after Run");
      bytes = std::move(own_results_.front());
      own_results_.erase(own_results_.begin());
    } else {
      int64_t size = 0;
      for (const Batch::LogitRow& r : rows) size += ResultBytes(r, from, config_.dim);
      bytes.resize(size);
      SHOAL_RETURN_IF_ERROR(mesh_->world().Recv(bytes.data(), size, from.rank, kResultTag));
    }
    SHOAL_ASSIGN_OR_RETURN(std::vector<ShardRow> shard, DecodeResults(batch, bytes, from));
    if (t == 0) {
      merged = std::move(shard);
    } else {
      for (size_t i = 0; i < merged.size(); ++i) Merge(merged[i], std::move(shard[i]));
    }
  }
  for (size_t i = 0; i < merged.size(); ++i) {
    if (rows[i].candidates > 0) {
      merged[i].candidates = MergeCandidates(std::move(merged[i].candidates), rows[i].candidates);
    }
  }
  return merged;
}

absl::StatusOr<std::vector<ShardRow>> Rank::DecodeResults(const Batch& batch,
                                                          const std::vector<uint8_t>& bytes,
                                                          const RankPlan& from) const {
  std::vector<ShardRow> out;
  const uint8_t* p = bytes.data();
  for (const Batch::LogitRow& row : ResultRows(batch)) {
    const uint8_t* const end = p + ResultBytes(row, from, config_.dim);
    if (end > bytes.data() + bytes.size())
      return absl::InternalError("a result message ends early");
    ShardRow shard;
    std::memcpy(&shard.log_sum_exp, p, sizeof(double));
    p += sizeof(double);
    if (WantsHidden(row)) {
      shard.hidden.resize((end - p) / sizeof(float));
      if (end > p) std::memcpy(shard.hidden.data(), p, end - p);
    } else if (row.target >= 0) {
      std::memcpy(&shard.target_logit, p, sizeof(float));
    } else if (row.candidates > 0) {
      shard.candidates.resize((end - p) / sizeof(Candidate));
      std::memcpy(shard.candidates.data(), p, end - p);
      std::erase_if(shard.candidates, [](const Candidate& c) { return c.token < 0; });
    } else {
      shard.all.resize((end - p) / sizeof(float));
      std::memcpy(shard.all.data(), p, end - p);
    }
    p = end;
    out.push_back(std::move(shard));
  }
  return out;
}

absl::Status Rank::RunWorker() {
  for (;;) {
    Batch batch;
    SHOAL_RETURN_IF_ERROR(BroadcastBatch(mesh_->world(), batch));
    if (batch.kind == Batch::Kind::kStop) return Run(batch);
    if (absl::Status s = Run(batch); !s.ok()) {
      mesh_->world().Abort(s);
      return s;
    }
  }
}

}  // namespace shoal
