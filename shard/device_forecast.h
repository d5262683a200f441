// How fast a placement on a GPU is: from what its memory, its tensor cores and its link do, and the
// shares of those that this project's kernels reach.
//
// Pure functions; `shoal plan` prints what they say.
#pragma once

#include "shard/device_store.h"
#include "shard/forecast.h"
#include "shard/model_config.h"
#include "shard/weight_layout.h"

namespace shoal {

// Measured, or from a data sheet.
struct DeviceSpeed {
  double read_bytes_per_s = 0;  // of its memory
  double operations_per_s = 0;  // f16 products with f32 sums; a multiply-add is two
  double link_bytes_per_s = 0;  // from pinned host memory
};

// What of a rank's model counts there besides the bytes of its parts.
struct DeviceWork {
  double bytes_per_weight = 0;
  double kv_bytes_per_token = 0;    // of the rank's layers and heads
  double attention_operations = 0;  // of one row that attends to one token, in all layers
};

// As Predict reads it: what is streamed comes over the link.
MachineSpeed SpeedOnDevice(const DeviceSpeed& device, const DeviceWork& work);

// Weights that host memory does not hold come from a disk of `disk_bytes_per_s` first (0: not
// measured, not waited for). `bound`, of decode: "the GPU's memory", "the link to the GPU" or
// "reading weights".
Forecast PredictOnDevice(const WeightLayout& layout, const ModelConfig& config,
                         const DevicePlacement& placement, const DeviceSpeed& device,
                         const DeviceWork& device_work, double disk_bytes_per_s,
                         const Workload& work);

}  // namespace shoal
