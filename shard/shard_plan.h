// Which rank holds which part of the model: a pure function of the config and what the user asked
// for.
//
// Ranks are numbered stage * tp + tp_index. Any tp, any pp, unequal shares: query heads are cut in
// contiguous runs (a KV head that two ranks need is held by both), FFN columns in multiples of the
// cut, vocabulary anywhere.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "shard/checkpoint.h"
#include "shard/model_config.h"

namespace shoal {

struct Extent {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t size() const { return end - begin; }
  friend bool operator==(const Extent&, const Extent&) = default;
};

struct RankPlan {
  int rank = 0;
  int stage = 0;
  int tp_index = 0;
  Extent layers;
  Extent q_heads;
  Extent kv_heads;
  Extent ffn;                // columns of the FFN (of every expert)
  Extent dense_ffn;          // of the FFN of layers without experts, in a model that has experts
  Extent shared_ffn;         // of the FFN beside the experts
  Extent vocab;              // rows of embedding and head
  bool first_stage = false;  // holds its rows of the embedding
  bool last_stage = false;   // holds the output norm and its rows of the head
};

struct ShardRequest {
  int tp = 1;
  int pp = 1;
  std::vector<double> split = {};      // relative shares of the tp ranks; empty: equal
  std::vector<int> stage_layers = {};  // layers of each stage; empty: balanced by bytes
  // Relative sizes of the stages' memory, which bytes are balanced for; empty: equal. Of no effect
  // when the layers are given.
  std::vector<double> stage_shares = {};
};

struct ShardPlan {
  int tp = 1;
  int pp = 1;
  std::vector<RankPlan> ranks;  // [pp * tp]
  int world() const { return tp * pp; }
};

// Gives unequal ranks unequal parts, by the memory of each (bytes[rank]; ranks are ordered as in
// the plan): stages where the request does not say their layers, tensor-parallel shares when
// `split_too`. Ranks that differ by less than a tenth count as equal, so that what other programs
// take of a GPU does not change the plan from run to run. REQUIRES: bytes of tp * pp ranks, all
// above 0.
void BalanceByMemory(const std::vector<int64_t>& bytes, bool split_too, ShardRequest& request);

// kInvalidArgument with the reason: tp beyond what heads / FFN / vocabulary allow, pp beyond the
// layers, bad split, stages that do not make up the model.
absl::StatusOr<ShardPlan> MakeShardPlan(const ModelConfig& config, const Checkpoint& checkpoint,
                                        const ShardRequest& request);

}  // namespace shoal
