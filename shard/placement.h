// Which units of a rank stay in memory and which are streamed, for a given number of bytes.
//
// Pure functions: `shoal plan` prints what they say, the loader obeys.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "offload/weight_streamer.h"
#include "shard/model_config.h"
#include "shard/weight_layout.h"

namespace shoal {

struct Placement {
  std::vector<Tier> tiers;  // of each unit
  std::vector<int> cycle;   // the streamed ones, in execution order
  int64_t ring_bytes = 0;
  int expert_slots = 0;
  int64_t slot_bytes = 0;

  int64_t resident_bytes = 0;  // R: stays in memory
  int64_t streamed_bytes = 0;  // through the ring, each pass
  // Experts that one token of decode is expected to read, when all are equally likely.
  int64_t demand_bytes = 0;
  int64_t held_bytes =
      0;  // resident, ring, slots and embedding rows: what the weights take of the budget
  int64_t total_bytes = 0;  // W: all units

  bool streams() const { return streamed_bytes + demand_bytes > 0; }
  int64_t bytes_per_token() const { return streamed_bytes + demand_bytes; }
};

// `budget` bytes for weights and what streams them; everything stays resident when it fits. `rows`
// is the largest batch (embedding rows are read for it). kResourceExhausted names the least that
// works.
absl::StatusOr<Placement> PlaceWeights(const WeightLayout& layout, const ModelConfig& config,
                                       int64_t budget, int rows);
// The smallest budget that PlaceWeights accepts.
int64_t LeastWeightBytes(const WeightLayout& layout, const ModelConfig& config, int rows);

}  // namespace shoal
