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
  std::vector<TensorSpec> out = {
      {Role::kAttnNorm, blk + "attn_norm.weight", {c.dim}},
      {Role::kQ, blk + "attn_q.weight", {c.dim, q}},
      {Role::kK, blk + "attn_k.weight", {c.dim, kv}},
      {Role::kV, blk + "attn_v.weight", {c.dim, kv}},
      {Role::kO, blk + "attn_output.weight", {q, c.dim}},
  };
  const bool gpt_oss = c.architecture == "gpt-oss";
  const bool glm = c.architecture == "glm4moe";
  if (gpt_oss || glm || c.architecture == "qwen2" || c.architecture == "llama") {
    const bool required = gpt_oss || c.architecture == "qwen2";
    out.push_back({Role::kQBias, blk + "attn_q.bias", {q}, required});
    out.push_back({Role::kKBias, blk + "attn_k.bias", {kv}, required});
    out.push_back({Role::kVBias, blk + "attn_v.bias", {kv}, required});
  }
  if (gpt_oss || c.architecture == "llama") {
    out.push_back({Role::kOBias, blk + "attn_output.bias", {c.dim}, /*required=*/gpt_oss});
  }
  if (gpt_oss) out.push_back({Role::kSinks, blk + "attn_sinks.weight", {c.heads}});
  if (glm || c.architecture == "qwen3" || c.architecture == "qwen3moe") {
    out.push_back({Role::kQNorm, blk + "attn_q_norm.weight", {c.head_dim}, /*required=*/!glm});
    out.push_back({Role::kKNorm, blk + "attn_k_norm.weight", {c.head_dim}, /*required=*/!glm});
  }
  const char* ffn_norm = gpt_oss || glm ? "post_attention_norm.weight" : "ffn_norm.weight";
  out.push_back({Role::kFfnNorm, blk + ffn_norm, {c.dim}});
  if (c.has_experts(layer)) {
    out.push_back({Role::kRouter, blk + "ffn_gate_inp.weight", {c.dim, c.experts}});
    if (gpt_oss) out.push_back({Role::kRouterBias, blk + "ffn_gate_inp.bias", {c.experts}});
    if (glm) out.push_back({Role::kChoiceBias, blk + "exp_probs_b.bias", {c.experts}});
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
