// The model on one rank: its layers, its heads, its FFN columns, its rows of the vocabulary.
//
// There is one model and it is the parallel one; a single machine is a world of one. The forward
// pass is Model::Forward in model.cc.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/device_memory.h"
#include "offload/weight_source.h"
#include "parallel/batch.h"
#include "parallel/kv_cache.h"
#include "parallel/linear.h"
#include "parallel/mesh.h"
#include "parallel/rope.h"
#include "shard/weight_layout.h"

namespace shoal {

struct ModelLimits {
  int rows = 0;        // of a batch
  int context = 0;     // of a sequence
  int logit_rows = 0;  // of one call of Head
};

// Used by the rank's engine thread only. Borrows everything it is given. Activations live in the
// backend's memory; what goes in and out (kept rows, hidden rows, logits) is host memory.
class Model {
 public:
  static absl::StatusOr<std::unique_ptr<Model>> Create(
      const ModelConfig& config, const WeightLayout& layout, const ModelLimits& limits, Wire wire,
      const Mesh& mesh, Backend& backend, WeightSource& weights, KvCache& kv, KvPager* pager);
  ~Model();

  // What the backend must reserve, and the bytes of the model's own activations, for the plan.
  static Backend::Limits BackendLimits(const ModelConfig& config, const RankPlan& plan,
                                       const ModelLimits& limits);
  static int64_t ActivationBytes(const ModelConfig& config, const RankPlan& plan,
                                 const ModelLimits& limits);

  // Runs this stage over the batch. The first stage embeds, later ones receive the hidden state,
  // all but the last send it on; the last keeps the hidden rows that batch.logits names, see
  // hidden_logit_rows.
  absl::Status Forward(const Batch& batch);

  // Last stage only. The kept rows of the latest batch: [batch.logits.size(), dim]. Head may be
  // given them at once; whoever looks at them calls AwaitKeptRows first.
  const float* kept_rows() const { return kept_; }
  void AwaitKeptRows() { backend_.Wait(); }
  // logits [n, vocab_rows()] = head * norm(hidden rows), until the next call of Forward or Head.
  // n <= limits.logit_rows.
  absl::Status Head(const float* hidden, int n, bool prefill);
  // The first n rows of them in host memory, until the next call of anything here.
  const float* Logits(int n);
  // Their best and their sums, as Backend::ReduceLogits; false: look at the rows.
  bool ReduceLogits(absl::Span<const LogitRequest> requests, int candidates,
                    LogitSummary* summaries, LogitCandidate* best);
  // Last stage only. out [dim] = norm(hidden [dim]): what the head sees of one row.
  absl::Status FinalNorm(const float* hidden, float* out);
  int vocab_rows() const { return static_cast<int>(plan_.vocab.size()); }
  int dim() const { return config_.dim; }

 private:
  class Unit;  // a weight unit held for as long as it is used
  class ExpertTables;
  struct Slices {
    int q = 0, k = 0, v = 0, all = 0;
  };  // widths of q, k, v and their sum

  Model(const ModelConfig& config, const WeightLayout& layout, const ModelLimits& limits, Wire wire,
        const Mesh& mesh, Backend& backend, WeightSource& weights, KvCache& kv, KvPager* pager);
  absl::Status Allocate();
  int FirstExpert() const;
  int IndexOf(WeightUnit::Kind kind, int layer, int expert = -1) const;
  absl::StatusOr<Unit> Get(WeightUnit::Kind kind, int layer, int expert = -1);
  absl::Status RunLayers(const Batch& batch);
  int RowsOfStep() const;
  bool IsDecodeStep(const Batch& batch) const;
  absl::Status FindFixedWeights();
  absl::Status Embed(const Batch& batch);
  absl::Status Attention(int layer);
  AttentionShape HeadsOf(int layer, const float* sinks) const;
  // A segment whose first pages are on disk.
  struct Streamed {
    int slot = 0;
    int segment = 0;
    int pages = 0;
  };
  int FirstPage(const Streamed& s, int layer) const;  // that its rows see there
  void AnnounceStream();
  absl::Status AttendStreamed(const Streamed& s, int layer, const AttentionShape& heads,
                              const float* q, int64_t q_stride, float* out, int64_t out_stride);
  absl::Status FeedForward(int layer);
  LinearInput Norm(const float* x, const float* weight) const {
    return LinearInput::Norm(config_.norm, x, config_.dim, weight, config_.norm_eps);
  }
  // What partial_ is added to; `norm`: weights of the norm of the sum, or null.
  Residual Sum(const float* norm) const { return {x_, partial_, norm, config_.norm_eps}; }
  absl::StatusOr<const float*> SquaresOfRows(int q_cols, int k_cols);
  absl::Status Mlp(int layer);
  absl::Status AddSharedExpert(int layer, const LinearInput& input);
  absl::Status MixtureOfExperts(int layer);
  absl::Status HoldChosenExperts(int layer, ExpertTables& tables, std::vector<Unit>& held);
  absl::Status PrepareRuns(const Batch& batch);
  void KeepLogitRows(const Batch& batch);
  const float* OnDevice(const float* hidden, int n);

  const ModelConfig& config_;
  const WeightLayout& layout_;
  const ModelLimits limits_;
  const Wire wire_;
  const Mesh& mesh_;
  const RankPlan plan_;
  Backend& backend_;
  WeightSource& weights_;
  KvCache& kv_;
  KvPager* const pager_;  // null: all KV blocks are in memory
  RopeTables rope_;
  AttentionShape heads_;                          // without what differs from layer to layer
  std::vector<std::vector<int>> units_of_layer_;  // attention, then as WeightLayout has them
  int embedding_unit_ = -1;
  int head_unit_ = -1;
  bool all_fixed_ = false;  // every unit of the layers, and the embedding, stays where it is
  // Of each layer its experts, where all of them stay where they are; else null.
  std::vector<std::unique_ptr<ExpertTables>> fixed_experts_;

  // The batch at hand.
  RowCount rows_;
  std::vector<Segment> segments_;
  std::vector<Segment> in_memory_;  // those of them whose KV blocks all are
  std::vector<Streamed> streamed_;  // the others
  std::vector<int32_t> flat_table_;
  std::vector<int32_t> local_ids_;

  // Activations, one row per token.
  DeviceMemory storage_;
  float* x_ = nullptr;               // [rows, dim] hidden state
  float* partial_ = nullptr;         // [rows, dim] what the all-reduce sums
  float* qkv_ = nullptr;             // [rows, (q + 2 kv heads) * head_dim]
  float* squares_ = nullptr;         // [rows, 2], QkvArgs::squares
  float* attended_ = nullptr;        // [rows, q heads * head_dim]
  float* gate_ = nullptr;            // [rows, ffn] and up behind it
  float* router_ = nullptr;          // [rows, experts]
  float* expert_weights_ = nullptr;  // [rows, used]
  int32_t* expert_ids_ = nullptr;    // [rows, used]
  DeviceMemory logits_;              // f32 [limits.logit_rows, vocab_rows()]
  // [logit rows, dim], and which rows of x_ they are: in the host's own memory, or in staging where
  // the device has memory of its own.
  float* kept_ = nullptr;
  std::vector<int32_t> kept_from_;
  std::vector<float> kept_own_;
  DeviceMemory kept_staging_;
};

}  // namespace shoal
