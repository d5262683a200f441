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
  static int64_t Bytes(const ModelConfig& config, int positions);
  // of_window: of a layer with a window, which may have a table of its own.
  RopeTable view(bool of_window) const;
  // QkvArgs::q_scale of layers that do not rotate; null where there is none.
  const float* temperatures() const { return temperatures_.as<float>(); }

 private:
  struct Angles {
    DeviceMemory cos, sin;  // f32 [positions, rotary_dim / 2], or empty
  };
  static absl::StatusOr<Angles> MakeAngles(Backend& backend, const ModelConfig& config,
                                           int positions);

  int rotary_dim_ = 0;
  int positions_ = 0;
  bool neox_ = false;
  Angles all_, window_;        // window_: empty where all layers rotate alike
  DeviceMemory temperatures_;  // f32 [positions], or empty
};

}  // namespace shoal
