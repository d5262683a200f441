// Rotary position tables (RoFormer, arXiv:2104.09864) with linear scaling, YaRN (arXiv:2309.00071)
// and the per-dimension divisors of Llama 3 (rope_freqs.weight).
#pragma once

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "shard/model_config.h"

namespace shoal {

// Owns the tables that RopeTable views point into, in memory of the backend's device.
class RopeTables {
 public:
  static absl::StatusOr<RopeTables> Create(Backend& backend, const ModelConfig& config,
                                           int positions);
  RopeTable view() const;

 private:
  int rotary_dim_ = 0;
  int positions_ = 0;
  bool neox_ = false;
  DeviceMemory cos_, sin_;  // f32 [positions, rotary_dim / 2]
};

}  // namespace shoal
