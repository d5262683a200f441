// Everything one rank owns, sized from the plan before the first token: weights, KV blocks,
// workspace, model.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "comm/communicator.h"
#include "kernels/backend.h"
#include "offload/kv_pager.h"
#include "offload/memory_budget.h"
#include "parallel/batch.h"
#include "parallel/kv_cache.h"
#include "parallel/mesh.h"
#include "parallel/model.h"
#include "parallel/sampler.h"
#include "parallel/scheduler.h"
#include "shard/checkpoint.h"
#include "shard/model_config.h"
#include "shard/shard_cache.h"
#include "shard/shard_file.h"
#include "shard/shard_plan.h"
#include "shard/weight_layout.h"
#include "shard/weight_store.h"

namespace shoal {

// KV pages on disk.
struct KvDiskOptions {
  std::string dir;                               // where the file of each rank lies
  bool keep = false;                             // pages serve later runs too
  int64_t bytes = 0;                             // of each rank's file; 0: nothing goes to disk
  std::function<void(const std::string&)> warn;  // once, from any thread
  int64_t dir_bytes_max = 0;  // of all files kept in `dir`, other models' too; 0: no limit
};

struct EngineOptions {
  ShardRequest shard;
  Wire wire = Wire::kF32;
  KvType kv_type = KvType::kF16;
  int context = 0;    // tokens of a sequence; 0: the trained length, at most 4096
  int sequences = 1;  // admitted at once
  int rows = 512;     // of a batch
  int kv_tokens = 0;  // KV pool; 0: context * sequences; less than a context: see StreamsKv
  bool prefix_cache = true;
  // Tokens that are guessed for a sequence and checked in one step (parallel/drafter.h);
  // kAutoDraft: kUsualDraft where weights are streamed, else none.
  static constexpr int kAutoDraft = -1, kUsualDraft = 7, kMostDraft = 64;
  int draft_max = kAutoDraft;
  bool draft_adaptive = true;  // false: always as many as may be, for tests
  KvDiskOptions kv_disk;
  // Weights that are streamed from a GGUF are packed once into this folder, for this run and later
  // ones (shard/shard_cache.h); empty: they are packed again for each token.
  std::string disk_cache;
  int64_t disk_cache_bytes_max = 0;              // of the whole folder; 0: no limit
  std::function<void(const std::string&)> warn;  // of what was mended or is slower; any thread
  // Bytes for all that the rank holds, negative when there is less than nothing; 0: no limit,
  // nothing is streamed.
  int64_t memory = 0;
  CpuOptions cpu;
  // Makes the rank's device, on the rank's thread; null: the CPU with the options above.
  std::function<absl::StatusOr<std::unique_ptr<Backend>>()> make_backend;
  int64_t device_memory = 0;  // bytes of a device with its own memory; 0: what is free there
};

// Options with every default filled in and checked against the model (kInvalidArgument: say what
// the model allows).
absl::StatusOr<EngineOptions> ResolveOptions(const ModelConfig& config, EngineOptions options);
// Pages that the file of every rank of the plan can hold.
int KvPageRecords(const ModelConfig& config, const EngineOptions& options, const ShardPlan& plan);
// Whether a context may be larger than the KV pool, because its first pages are read from disk for
// each step.
bool StreamsKv(const EngineOptions& options, int page_records);

// Bytes a rank takes, by what for.
struct RankMemory {
  int64_t weights = 0;   // with what streams them
  int64_t streamed = 0;  // of the model, not in memory: read again for each token
  int64_t kv = 0;        // with the staging of its pages
  int64_t workspace = 0;
  int64_t resident = 0;  // of weights: stays; the rest of them streams
  int64_t allowed = 0;   // that the rank may take for all this; 0: no limit
  int64_t total() const { return weights + kv + workspace; }
};

// What a rank has done since it started, and what it holds. Travels between ranks as it is.
struct RankStats {
  int64_t steps = 0;
  double step_seconds = 0;  // in forward passes and their results
  double all_reduce_seconds =
      0;  // of those: in sums over the group, waiting for the others included
  double stream_wait_seconds = 0;  // of those: for weights that were not there yet
  int64_t bytes_streamed = 0;      // of weights, read again and again
  RankMemory memory;
};

// What a last-stage rank says about one logit row. Either candidates or the whole shard or a score.
struct ShardRow {
  std::vector<Candidate> candidates;
  std::vector<float> all;
  double log_sum_exp = 0;
  float target_logit = 0;     // -inf when the target lies in another shard
  std::vector<float> hidden;  // [dim], when the row asked for it
};

class Rank {
 public:
  using Progress = std::function<void(int64_t done, int64_t total)>;
  // Collective: every rank calls it with the same options. Loads the weights.
  static absl::StatusOr<std::unique_ptr<Rank>> Create(Communicator& world,
                                                      const Checkpoint& checkpoint,
                                                      const ModelConfig& config,
                                                      const EngineOptions& options,
                                                      const Progress& progress);

  // What Create would allocate on rank `plan.rank` with all weights in memory. Pure.
  static absl::StatusOr<RankMemory> MemoryNeeded(const Checkpoint& checkpoint,
                                                 const ModelConfig& config,
                                                 const EngineOptions& options, const RankPlan& plan,
                                                 const Backend& backend);
  // The same of a device that is elsewhere: what Backend::WorkspaceBytes is there, and whether it
  // computes in host memory.
  static absl::StatusOr<RankMemory> MemoryNeeded(
      const Checkpoint& checkpoint, const ModelConfig& config, const EngineOptions& options,
      const RankPlan& plan, absl::FunctionRef<int64_t(const Backend::Limits&)> workspace,
      bool in_host_memory);

  // The KV bytes of one token on rank `plan.rank`. Pure.
  static int64_t KvTokenBytes(const ModelConfig& config, const EngineOptions& options,
                              const RankPlan& plan);
  // Host memory that KV pages pass through on their way to disk, part of MemoryNeeded's kv where KV
  // is host memory too. Pure.
  static int64_t KvStagingBytes(const ModelConfig& config, const EngineOptions& options,
                                const RankPlan& plan);
  // On the rank that holds most of them.
  static absl::StatusOr<int64_t> KvTokenBytes(const Checkpoint& checkpoint,
                                              const ModelConfig& config,
                                              const EngineOptions& options);

  // Runs a broadcast batch: forward, then (last stage) its results to rank 0, which keeps its own.
  absl::Status Run(const Batch& batch);
  // Rank 0 only, once after each stats batch: what every rank sent.
  absl::StatusOr<std::vector<RankStats>> CollectStats();
  // Rank 0 only: the results of a forward or fetch batch, one entry for each logit (or fetched)
  // row, merged over the vocabulary shards.
  absl::StatusOr<std::vector<ShardRow>> Collect(const Batch& batch);
  // Rank 0 only, after Run of a kListPages batch: the pages that all ranks have, the least recently
  // written first.
  absl::StatusOr<std::vector<KeptPage>> CollectPages();
  // Rank 0 only, after Run of a kAwaitLoads batch: which of the `count` loads worked on all ranks.
  absl::StatusOr<std::vector<bool>> CollectLoads(int count);
  // Rank 0 only, after Run of a kAwaitStream batch: records that some rank could not read since the
  // last one.
  absl::StatusOr<std::vector<int>> CollectStreamFailures();

  const Mesh& mesh() const { return *mesh_; }
  const ShardPlan& plan() const { return plan_; }
  int page_records() const { return page_records_; }  // that its file can hold
  const RankMemory& memory() const { return memory_; }
  const WeightStore& weights() const { return weights_; }
  KvPager* pager() const { return pager_.get(); }  // null: nothing goes to disk
  std::string DescribeBackend() const { return backend_->Describe(); }

  // The loop of every rank but 0: until a stop batch. An error breaks the communicator for all.
  absl::Status RunWorker();

 private:
  Rank() = default;
  absl::Status OpenPager(const Checkpoint& checkpoint);
  absl::Status RunPages(const Batch& batch);
  absl::Status LoadWeights(const Checkpoint& checkpoint, const Progress& progress);
  absl::Status LoadDeviceWeights(const Checkpoint& checkpoint, const Progress& progress);
  WeightStoreOptions StoreOptions(const Progress& progress) const;
  using OpenStore =
      std::function<absl::StatusOr<WeightStore>(const Checkpoint&, const WeightStoreOptions&)>;
  absl::StatusOr<WeightStore> OpenCached(const Checkpoint& checkpoint, bool streams,
                                         const Progress& progress, const OpenStore& open);
  absl::Status DoesNotFit(int64_t budget, int64_t least, const char* flag) const;
  RankStats StatsNow() const;
  absl::Status Compute(const Batch& batch);
  absl::StatusOr<std::vector<uint8_t>> ComputeResults(const Batch& batch);
  absl::Status AppendHidden(const float* hidden, std::vector<uint8_t>& out);
  absl::StatusOr<std::vector<ShardRow>> DecodeResults(const Batch& batch,
                                                      const std::vector<uint8_t>& bytes,
                                                      const RankPlan& from) const;

  ModelConfig config_;
  EngineOptions options_;
  ShardPlan plan_;
  RankMemory memory_;
  std::unique_ptr<MemoryBudget> budget_;  // of host memory, for all that memory_ counts
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Mesh> mesh_;
  WeightLayout layout_;
  std::optional<CachedShards> cached_;  // what weights_ reads, with a disk cache
  WeightStore weights_;
  std::unique_ptr<KvCache> kv_;
  std::unique_ptr<KvPager> pager_;  // uses kv_
  int page_records_ = 0;
  std::vector<uint8_t> own_loads_;  // rank 0: its answer to kAwaitLoads
  std::vector<int> own_failures_;   // rank 0: its answer to kAwaitStream
  std::unique_ptr<Model> model_;
  std::vector<float> normed_;  // [dim]
  RankStats stats_;            // its counters
  // Hidden rows of the last few steps, so that whole logit rows can be asked for again.
  struct Kept {
    int64_t step = -1;
    std::vector<float> hidden;
    std::vector<Batch::LogitRow> rows;
  };
  std::vector<Kept> kept_;
  std::vector<std::vector<uint8_t>>
      own_results_;  // rank 0 as part of the last stage: queue of results
};

}  // namespace shoal
