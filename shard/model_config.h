// What a checkpoint's metadata says about the model: sizes and the switches of its graph.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/activation.h"
#include "kernels/norm.h"
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
  std::string architecture;  // "llama", "qwen2", "qwen3", "qwen3moe", "gpt-oss", "glm4moe",
                             // "command-r", "cohere2", "minimax-m2", "llama4", "mistral3",
                             // "seed_oss", "dots1", "hunyuan-moe", "qwen3vl", "qwen3vlmoe",
                             // "bailingmoe2", "gemma3", "glm4"
  std::string name;
  int layers = 0;
  int dim = 0;
  int heads = 0;
  int kv_heads = 0;
  int head_dim = 0;            // heads * head_dim may differ from dim
  bool scores_by_dim = false;  // scores are divided by sqrt(dim / heads), not sqrt(head_dim)
  int ffn = 0;                 // of a dense layer; of one expert when experts > 0
  int vocab = 0;
  int context = 0;  // trained length
  int experts = 0;  // 0: dense
  int experts_used = 0;
  bool renormalize_experts = true;
  bool sigmoid_router = false;                    // see RouterArgs
  int expert_groups = 1, expert_groups_used = 1;  // likewise
  float expert_scale = 1;                         // of the experts' weights
  bool weigh_expert_input = false;  // the one expert's input is weighted, not what it gives
  int moe_step = 1;                 // only the last of every so many layers has experts
  int dense_layers = 0;   // so many layers at the front have none; layers without have an FFN of...
  int dense_ffn = 0;      // ...so many columns
  int shared_ffn = 0;     // columns of an FFN beside the experts that every token takes
  int unused_layers = 0;  // at the end: for drafts of several tokens, not computed here
  Activation activation = Activation::kSwiGlu;
  NormKind norm = NormKind::kRms;
  float norm_eps = 1e-5f;
  QkNorm qk_norm = QkNorm::kHeadRms;  // where its weights are there
  // x + attention(n) + ffn(n) with n = norm(x), in place of a norm for each.
  bool parallel_ffn = false;
  float logit_scale = 1;
  float embedding_scale = 1;
  float rope_base = 10000;
  int rotary_dim = 0;
  bool rope_neox = false;
  RopeScaling rope_scaling;
  std::vector<float>
      rope_factors;               // rope_freqs.weight: divisors [rotary_dim / 2], empty when absent
  int window = 0;                 // sliding window, 0 = none
  bool chunked = false;           // see AttentionShape
  int window_period = 0;          // the last of every so many layers sees all; 0: none does
  std::vector<bool> windowed;     // [layers], in place of the period; or empty
  float window_rope_base = 0;     // of layers with a window, without scaling; 0: as in the others
  bool window_rope_only = false;  // layers that see all do not rotate q and k
  bool tied_embeddings = false;   // head = token_embd

  // q times 1 + temperature_scale * ln(1 + floor((pos + temperature_offset) / temperature_length))
  int temperature_length = 0;  // 0: as it is
  int temperature_offset = 1;
  float temperature_scale = 0;
  bool temperature_everywhere = false;  // not only in layers that do not rotate

  int group() const { return heads / kv_heads; }
  int score_dim() const { return scores_by_dim ? dim / heads : head_dim; }
  bool has_experts(int layer) const {
    return experts > 0 && layer >= dense_layers && (layer + 1) % moe_step == 0;
  }
  // Columns of a layer's FFN, or of each of its experts.
  int ffn_of(int layer) const { return experts > 0 && !has_experts(layer) ? dense_ffn : ffn; }
  // Tokens that a row behind a context of so many sees, mean over layers [begin, end).
  double seen_of(int begin, int end, int context) const {
    double sum = 0;
    for (int layer = begin; layer < end; ++layer) {
      const int most = window_of(layer) > 0 ? window_of(layer) : context;
      sum += context <= most ? context : chunked ? most / 2.0 : most;
    }
    return sum / std::max(1, end - begin);
  }
  bool rotates(int layer) const { return !window_rope_only || window_of(layer) > 0; }
  bool has_temperature(int layer) const {
    return temperature_length > 0 && (temperature_everywhere || !rotates(layer));
  }
  int window_of(int layer) const {
    if (!windowed.empty()) return windowed[layer] ? window : 0;
    return window_period > 0 && layer % window_period == window_period - 1 ? 0 : window;
  }
};

// kInvalidArgument (malformed or contradicting metadata, missing tensor, wrong shape) or
// kUnimplemented (architecture or type not known: the message lists what is).
absl::StatusOr<ModelConfig> ReadModelConfig(const Checkpoint& checkpoint);

}  // namespace shoal
