// What a checkpoint's metadata says about the model: sizes and the switches of its graph.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/activation.h"
#include "shard/checkpoint.h"

namespace shoal {

struct RopeScaling {
  enum class Kind { kNone, kLinear, kYarn };
  Kind kind = Kind::kNone;
  float factor = 1;
  int original_context = 0;  // YaRN
  float attn_factor = 1;     // YaRN: multiplies cos and sin, on top of 0.1 ln(factor) + 1
  float beta_fast = 32, beta_slow = 1;
  bool whole_bounds = true;  // YaRN: its ramp begins and ends at whole dimensions
};

struct ModelConfig {
  std::string architecture;  // "llama", "qwen2", "qwen3", "qwen3moe", "gpt-oss", "glm4moe"
  std::string name;
  int layers = 0;
  int dim = 0;
  int heads = 0;
  int kv_heads = 0;
  int head_dim = 0;  // heads * head_dim may differ from dim
  int ffn = 0;       // of a dense layer; of one expert when experts > 0
  int vocab = 0;
  int context = 0;  // trained length
  int experts = 0;  // 0: dense
  int experts_used = 0;
  bool renormalize_experts = true;
  bool sigmoid_router = false;  // see RouterArgs
  float expert_scale = 1;       // of the experts' weights
  int dense_layers = 0;         // so many layers at the front have no experts but an FFN of...
  int dense_ffn = 0;            // ...so many columns
  int shared_ffn = 0;           // columns of an FFN beside the experts that every token takes
  int unused_layers = 0;        // at the end: for drafts of several tokens, not computed here
  Activation activation = Activation::kSwiGlu;
  float norm_eps = 1e-5f;
  float rope_base = 10000;
  int rotary_dim = 0;
  bool rope_neox = false;
  RopeScaling rope_scaling;
  std::vector<float>
      rope_factors;              // rope_freqs.weight: divisors [rotary_dim / 2], empty when absent
  int window = 0;                // sliding window, 0 = none
  int window_period = 0;         // the last of every so many layers sees all; 0: none does
  bool tied_embeddings = false;  // head = token_embd

  int group() const { return heads / kv_heads; }
  bool has_experts(int layer) const { return experts > 0 && layer >= dense_layers; }
  // Columns of a layer's FFN, or of each of its experts.
  int ffn_of(int layer) const { return layer < dense_layers ? dense_ffn : ffn; }
  // Tokens that a row behind a context of so many sees, mean over layers [begin, end).
  double seen_of(int begin, int end, int context) const {
    double sum = 0;
    for (int layer = begin; layer < end; ++layer) {
      sum += window_of(layer) > 0 ? std::min(window_of(layer), context) : context;
    }
    return sum / std::max(1, end - begin);
  }
  int window_of(int layer) const {
    return window_period > 0 && layer % window_period == window_period - 1 ? 0 : window;
  }
};

// kInvalidArgument (malformed or contradicting metadata, missing tensor, wrong shape) or
// kUnimplemented (architecture or type not known: the message lists what is).
absl::StatusOr<ModelConfig> ReadModelConfig(const Checkpoint& checkpoint);

}  // namespace shoal
