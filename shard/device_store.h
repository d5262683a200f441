// Opens a rank's weights in the memory of its device: all of them, or as many as fit, with the rest
// streamed from host memory or, through it, from disk.
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "shard/checkpoint.h"
#include "shard/placement.h"
#include "shard/weight_layout.h"
#include "shard/weight_store.h"

namespace shoal {

// Where a rank's units are, for a number of bytes on the device and in host memory.
struct DevicePlacement {
  Placement device;  // kResident, kStreamed and kOnDemand; the embedding is resident
  Placement host;    // of the units that are not resident on the device
  int ring_slots = 0;
  int64_t ring_slot_bytes = 0;
  std::vector<bool> on_device;  // resident there
  bool streams = false;
  int64_t device_bytes = 0;  // all that is taken there
};

// kResourceExhausted when even the least does not fit: `device_least` of the message.
absl::StatusOr<DevicePlacement> PlaceOnDevice(const WeightLayout& layout, const ModelConfig& config,
                                              int64_t device_bytes, int64_t host_bytes, int rows);
// The smallest number of device bytes that PlaceOnDevice accepts.
int64_t LeastDeviceBytes(const WeightLayout& layout, const ModelConfig& config, int rows);

// As OpenWeights; the backend has copies() and outlives the store.
absl::StatusOr<WeightStore> OpenDeviceWeights(const Checkpoint& checkpoint,
                                              const WeightLayout& layout,
                                              const DevicePlacement& placement, Backend& backend,
                                              const WeightStoreOptions& options);

}  // namespace shoal
