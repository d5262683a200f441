// How fast a placement is on a machine: a pass through the weights, part by part, as the streamer
// reads and the kernels multiply.
//
// Pure functions; `shoal plan` prints what they say.
#pragma once

#include <cstdint>
#include <string>

#include "shard/model_config.h"
#include "shard/placement.h"
#include "shard/weight_layout.h"

namespace shoal {

// What a machine was measured to do with this model's weights.
struct MachineSpeed {
  double read_bytes_per_s = 0;        // from where the weights are, as the streamer reads them
  double decode_bytes_per_s = 0;      // weights multiplied with one row
  double prefill_bytes_per_s = 0;     // weights multiplied with a batch, counted once per row
  double kv_bytes_per_s = 0;          // of the KV cache, that one row attends to
  double prefill_kv_bytes_per_s = 0;  // that rows of a batch attend to, counted once per row
  double layer_s = 0;                 // what a layer takes besides, in every pass
  // How much longer each takes while the other goes on; 1: not at all.
  double read_slowdown = 1;
  double decode_slowdown = 1;
  double prefill_slowdown = 1;
};

struct Workload {
  int rows = 1;                 // of a chunk of a prompt
  double kv_bytes = 0;          // of the context that a row of decode attends to, in all layers
  double prefill_kv_bytes = 0;  // of what the rows of a chunk attend to, summed over them
  double idle_s_before = 0;     // a pipeline stage waits this long for the others; reading goes on
};

struct Forecast {
  double compute_s = 0;  // of one token
  double stream_s = 0;
  double decode_s = 0;   // of one token, both
  double prefill_s = 0;  // of a chunk of `rows`
  std::string bound;     // "reading weights", "computing"
};
Forecast Predict(const WeightLayout& layout, const ModelConfig& config, const Placement& placement,
                 const MachineSpeed& speed, const Workload& work);

}  // namespace shoal
