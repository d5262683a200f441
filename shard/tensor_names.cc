#include "shard/tensor_names.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/check.h"

namespace shoal {
namespace {

const char* FfnPart(Role role) {
  switch (role) {
    case Role::kGate:
      return "ffn_gate";
    case Role::kUp:
      return "ffn_up";
    default:
      SHOAL_CHECK(role == Role::kDown, "an FFN has kGate, kUp and kDown");
      return "ffn_down";
  }
}

// dims of one matrix of an FFN
std::vector<int64_t> FfnDims(int64_t dim, int64_t ffn, Role role) {
  return role == Role::kDown ? std::vector<int64_t>{ffn, dim} : std::vector<int64_t>{dim, ffn};
}

}  // namespace

std::vector<TensorSpec> GlobalTensors(const ModelConfig& c) {
  return {
      {Role::kEmbedding, "token_embd.weight", {c.dim, c.vocab}},
      {Role::kOutputNorm, "output_norm.weight", {c.dim}},
      {Role::kHead, "output.weight", {c.dim, c.vocab}, /*required=*/false},
  };
}

std::vector<TensorSpec> LayerTensors(const ModelConfig& c, int layer) {
  const std::string blk = absl::StrCat("blk.", layer, ".");
  const int64_t q = int64_t{c.heads} * c.head_dim;
  const int64_t kv = int64_t{c.kv_heads} * c.head_dim;
  std::vector<TensorSpec> out = {{Role::kAttnNorm, blk + "attn_norm.weight", {c.dim}}};
  const bool bailing = c.architecture == "bailingmoe2";
  if (bailing) {
    const TensorSpec all = {Role::kQ, blk + "attn_qkv.weight", {c.dim, q + 2 * kv}};
    out.insert(out.end(), 3, all);
    out[2].role = Role::kK;
    out[2].first_row = q;
    out[3].role = Role::kV;
    out[3].first_row = q + kv;
  } else {
    out.push_back({Role::kQ, blk + "attn_q.weight", {c.dim, q}});
    out.push_back({Role::kK, blk + "attn_k.weight", {c.dim, kv}});
    out.push_back({Role::kV, blk + "attn_v.weight", {c.dim, kv}});
  }
  out.push_back({Role::kO, blk + "attn_output.weight", {q, c.dim}});
  const bool gpt_oss = c.architecture == "gpt-oss";
  const bool glm = c.architecture == "glm4moe";
  const bool dots = c.architecture == "dots1";
  const bool llama =
      c.architecture == "llama" || c.architecture == "llama4" || c.architecture == "mistral3";
  const bool seed = c.architecture == "seed_oss";
  const bool gemma = c.architecture == "gemma3";
  const bool glm4 = c.architecture == "glm4";
  if (gpt_oss || glm || c.architecture == "qwen2" || llama || seed || glm4) {
    const bool required = gpt_oss || c.architecture == "qwen2";
    out.push_back({Role::kQBias, blk + "attn_q.bias", {q}, required});
    out.push_back({Role::kKBias, blk + "attn_k.bias", {kv}, required});
    out.push_back({Role::kVBias, blk + "attn_v.bias", {kv}, required});
  }
  if (gpt_oss || llama) {
    out.push_back({Role::kOBias, blk + "attn_output.bias", {c.dim}, /*required=*/gpt_oss});
  }
  if (gpt_oss) out.push_back({Role::kSinks, blk + "attn_sinks.weight", {c.heads}});
  const bool qwen3 = c.architecture.rfind("qwen3", 0) == 0;
  if (glm || qwen3 || dots || bailing || gemma || c.qk_norm == QkNorm::kHeadRmsBehind) {
    out.push_back({Role::kQNorm, blk + "attn_q_norm.weight", {c.head_dim}, /*required=*/!glm});
    out.push_back({Role::kKNorm, blk + "attn_k_norm.weight", {c.head_dim}, /*required=*/!glm});
  }
  if (c.qk_norm == QkNorm::kHeadLayer) {
    // Command R+ has them, the smaller ones do not; llama.cpp tells them apart so, too.
    const bool required = c.layers >= 64;
    out.push_back(
        {Role::kQNorm, blk + "attn_q_norm.weight", {c.head_dim, c.heads}, required, true});
    out.push_back(
        {Role::kKNorm, blk + "attn_k_norm.weight", {c.head_dim, c.kv_heads}, required, true});
  }
  const bool minimax = c.architecture == "minimax-m2";
  if (minimax) {
    out.push_back({Role::kQNorm, blk + "attn_q_norm.weight", {q}});
    out.push_back({Role::kKNorm, blk + "attn_k_norm.weight", {kv}});
  }
  if (gemma || glm4) {
    out.push_back({Role::kAttnPostNorm, blk + "post_attention_norm.weight", {c.dim}});
  }
  const char* ffn_norm = c.parallel_ffn           ? "attn_norm.weight"  // the same for both
                         : gpt_oss || glm || seed ? "post_attention_norm.weight"
                                                  : "ffn_norm.weight";
  out.push_back({Role::kFfnNorm, blk + ffn_norm, {c.dim}});
  if (c.has_experts(layer)) {
    out.push_back({Role::kRouter, blk + "ffn_gate_inp.weight", {c.dim, c.experts}});
    if (gpt_oss) out.push_back({Role::kRouterBias, blk + "ffn_gate_inp.bias", {c.experts}});
    if (glm || minimax || dots || bailing) {
      const bool required = glm || minimax;
      out.push_back({Role::kChoiceBias, blk + "exp_probs_b.bias", {c.experts}, required});
    }
    if (c.shared_ffn == 0) return out;
    const int shared = c.shared_ffn;
    out.push_back({Role::kSharedGate, blk + "ffn_gate_shexp.weight", {c.dim, shared}});
    out.push_back({Role::kSharedUp, blk + "ffn_up_shexp.weight", {c.dim, shared}});
    out.push_back({Role::kSharedDown, blk + "ffn_down_shexp.weight", {shared, c.dim}});
    return out;
  }
  for (const Role role : {Role::kGate, Role::kUp, Role::kDown}) {
    const std::vector<int64_t> dims = FfnDims(c.dim, c.ffn_of(layer), role);
    out.push_back({role, absl::StrCat(blk, FfnPart(role), ".weight"), dims});
  }
  if (glm4) {  // gate and up in one tensor
    TensorSpec& gate = out[out.size() - 3];
    TensorSpec& up = out[out.size() - 2];
    up.dims[1] *= 2;
    up.first_row = c.ffn;
    gate.name = up.name;
    gate.dims = up.dims;
  }
  if (gemma || glm4) out.push_back({Role::kFfnPostNorm, blk + "post_ffw_norm.weight", {c.dim}});
  return out;
}

TensorSpec StackedExperts(const ModelConfig& c, Role role, int layer) {
  TensorSpec spec{role, absl::StrCat("blk.", layer, ".", FfnPart(role), "_exps.weight"),
                  FfnDims(c.dim, c.ffn, role)};
  spec.dims.push_back(c.experts);
  return spec;
}

TensorSpec SeparateExpert(const ModelConfig& c, Role role, int layer, int expert) {
  return {role, absl::StrCat("blk.", layer, ".", FfnPart(role), ".", expert, ".weight"),
          FfnDims(c.dim, c.ffn, role)};
}

std::vector<TensorSpec> ExpertBiases(const ModelConfig& c, int layer) {
  if (c.architecture != "gpt-oss") return {};
  const std::string blk = absl::StrCat("blk.", layer, ".ffn_");
  std::vector<TensorSpec> out = {
      {Role::kGateBias, blk + "gate_exps.bias", {c.ffn, c.experts}},
      {Role::kUpBias, blk + "up_exps.bias", {c.ffn, c.experts}},
      {Role::kDownBias, blk + "down_exps.bias", {c.dim, c.experts}},
  };
  for (TensorSpec& spec : out) spec.stacked_vectors = true;
  return out;
}

ExpertSource FindExpert(const Checkpoint& checkpoint, const ModelConfig& config, Role role,
                        int layer, int expert) {
  if (const TensorInfo* t = checkpoint.FindTensor(StackedExperts(config, role, layer).name)) {
    return {t, expert};
  }
  return {checkpoint.FindTensor(SeparateExpert(config, role, layer, expert).name), 0};
}

std::string DimsText(const std::vector<int64_t>& dims) {
  return absl::StrCat("[", absl::StrJoin(dims, ", "), "]");
}

}  // namespace shoal
