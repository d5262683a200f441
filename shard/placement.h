// Which units of a rank stay in memory and which are streamed, for a given number of bytes; and how
// fast that is.
//
// Pure functions: `shoal plan` prints them, the loader obeys them.
#pragma once

#include <cstdint>
#include <string>
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
  int64_t used_bytes = 0;   // that one token of decode multiplies

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

// What a machine was measured to do with this model's weights.
struct MachineSpeed {
  double read_bytes_per_s = 0;     // from where the weights are, as the streamer reads them
  double decode_bytes_per_s = 0;   // weights multiplied with one row
  double prefill_bytes_per_s = 0;  // weights multiplied with a batch, counted once per row
  double link_bytes_per_s = 0;     // between ranks
};

struct Forecast {
  double compute_s = 0;  // of one token
  double stream_s = 0;
  double decode_tokens_per_s = 0;
  double prefill_tokens_per_s = 0;
  std::string bound;  // "reading weights", "computing"
};
// decode: max(compute, bytes_per_token / read), as reading and computing overlap. Prefill: chunks
// of `rows`.
Forecast Predict(const Placement& placement, const MachineSpeed& speed, int rows);

}  // namespace shoal
