// Rotary position tables (RoFormer, arXiv:2104.09864) with linear scaling, YaRN (arXiv:2309.00071)
// and the per-dimension divisors of Llama 3 (rope_freqs.weight).
#pragma once

#include <vector>

#include "kernels/backend.h"
#include "shard/model_config.h"

namespace shoal {

// Owns the tables that RopeTable views point into. Immutable.
class RopeTables {
 public:
  RopeTables(const ModelConfig& config, int positions);
  RopeTable view() const;

 private:
  int rotary_dim_;
  int positions_;
  bool neox_;
  std::vector<float> cos_, sin_;  // [positions, rotary_dim / 2]
};

}  // namespace shoal
