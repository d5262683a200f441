// The tensors of each architecture: names, shapes, and which of them a model must have.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "shard/checkpoint.h"
#include "shard/model_config.h"
#include "shard/weight_layout.h"

namespace shoal {

struct TensorSpec {
  Role role;
  std::string name;
  std::vector<int64_t> dims;  // contiguous axis first; one entry: a vector
  bool required = true;
  bool stacked_vectors = false;  // one for each expert or head, {cols, experts or heads}
  int64_t first_row = 0;         // where those of the role begin in a tensor of several roles
  bool is_vector() const { return dims.size() == 1 || stacked_vectors; }
};

inline constexpr const char* kRopeFactorsName = "rope_freqs.weight";

// Embedding, output norm, head.
std::vector<TensorSpec> GlobalTensors(const ModelConfig& config);
// Everything of a layer but what each expert has.
std::vector<TensorSpec> LayerTensors(const ModelConfig& config, int layer);
// kGate, kUp or kDown of all experts of a layer as one stacked tensor, {cols, rows, experts}...
TensorSpec StackedExperts(const ModelConfig& config, Role role, int layer);
// ...or of one expert, as older files hold it.
TensorSpec SeparateExpert(const ModelConfig& config, Role role, int layer, int expert);

// The biases of all experts of a layer, stacked; none where the architecture has none.
std::vector<TensorSpec> ExpertBiases(const ModelConfig& config, int layer);

// Where one expert's matrix lies.
struct ExpertSource {
  const TensorInfo* tensor = nullptr;  // null when absent
  int64_t matrix = 0;
};
ExpertSource FindExpert(const Checkpoint& checkpoint, const ModelConfig& config, Role role,
                        int layer, int expert);

// "[4096, 32000]"
std::string DimsText(const std::vector<int64_t>& dims);

}  // namespace shoal
