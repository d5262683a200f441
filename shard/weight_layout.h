// What one rank holds, byte by byte, in the order the forward pass uses it.
//
// A unit is what is loaded, streamed or released as one: the embedding rows, a layer's attention
// part, a layer's FFN part (or its router, then each expert), the head. An extent is one packed
// matrix or f32 vector in it. Units start at multiples of 4096, extents at multiples of 64. Shard
// files hold these bytes as they are.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/packed_matrix.h"
#include "shard/checkpoint.h"
#include "shard/model_config.h"
#include "shard/shard_plan.h"

namespace shoal {

// Which role a tensor plays; one extent per role in a unit.
enum class Role : uint8_t {
  kEmbedding,
  kOutputNorm,
  kHead,
  kAttnNorm,
  kQ,
  kK,
  kV,
  kO,
  kQBias,
  kKBias,
  kVBias,
  kOBias,
  kQNorm,
  kKNorm,
  kFfnNorm,
  kGate,
  kUp,
  kDown,
  kRouter,
  kSinks,
  kRouterBias,
  kGateBias,
  kUpBias,
  kDownBias,
  kChoiceBias,
  kSharedGate,
  kSharedUp,
  kSharedDown,
  kAttnPostNorm,
  kFfnPostNorm,
};

struct WeightExtent {
  Role role = Role::kEmbedding;
  std::string tensor;     // name in the checkpoint
  int64_t matrix = 0;     // which expert of a stacked tensor
  int64_t row_begin = 0;  // source rows [row_begin, row_begin + shape.rows); a vector's one row
  int64_t col_begin = 0;  // source columns [col_begin, col_begin + shape.cols)
  PackedShape shape;      // a vector (norm, bias) has rows = 0 and cols floats, stored plain
  int64_t offset = 0;     // from the start of its unit
  int64_t bytes = 0;
  bool is_vector() const { return shape.rows == 0; }
};

struct WeightUnit {
  enum class Kind : uint8_t { kEmbedding, kAttention, kFfn, kRouter, kExpert, kHead };
  Kind kind = Kind::kEmbedding;
  int layer = -1;
  int expert = -1;
  int64_t offset = 0;  // from the start of the rank's weights
  int64_t bytes = 0;
  std::vector<WeightExtent> extents;
  const WeightExtent* Find(Role role) const;  // null when absent
};

struct WeightLayout {
  std::vector<WeightUnit> units;  // in execution order
  int64_t bytes = 0;
};

// The units in order: kEmbedding on the first stage; for each layer kAttention, then kFfn, or
// kRouter (with the FFN norm), kFfn for what all tokens share and one kExpert for each expert;
// kHead (kOutputNorm, kHead) on the last stage. With tied embeddings a rank that holds the
// embedding rows itself (first and last stage at once) has no kHead extent in that unit: the model
// reads kEmbedding as its head. Norms and the router are whole on every rank; kOBias and kDownBias
// only where tp_index is 0, since they must be added once.
absl::StatusOr<WeightLayout> MakeWeightLayout(const Checkpoint& checkpoint,
                                              const ModelConfig& config, const RankPlan& rank);

// Reads, cuts and packs a unit into out[0..unit.bytes), zeros between the extents. Peak extra
// memory: one staging buffer of a few MB. kDataLoss when the file was cut meanwhile. Threads may
// call this at once for different units.
absl::Status LoadUnit(const Checkpoint& checkpoint, const WeightUnit& unit, uint8_t* out);

// Loads all units with `threads` threads into out[0..layout.bytes); progress (may be empty) gets
// bytes done and total, from one thread at a time. The first error stops all threads.
absl::Status LoadAll(const Checkpoint& checkpoint, const WeightLayout& layout, int threads,
                     uint8_t* out, const std::function<void(int64_t, int64_t)>& progress);

}  // namespace shoal
