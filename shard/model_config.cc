#include "shard/model_config.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string_view>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/backend.h"
#include "kernels/status_macros.h"
#include "shard/byte_reader.h"
#include "shard/tensor_names.h"

namespace shoal {
namespace {

// Of the key expert_gating_func. Where the chosen experts' weights are made to sum to 1, the two
// kinds of softmax are the same.
constexpr int kSoftmax = 1, kSigmoid = 2, kSoftmaxOfChosen = 3;

struct Architecture {
  const char* name;
  bool rope_neox = false;  // pairs (i, i + rotary_dim / 2) instead of (2i, 2i + 1)
  bool may_be_moe = false;
  bool must_be_moe = false;
  int window_period = 0;  // as of ModelConfig, as are those below
  bool yarn_whole_bounds = true;
  Activation activation = Activation::kSwiGlu;
  int gating = kSoftmax;
  bool has_shared_expert = false;   // and dense layers, a scale of weights, layers for drafts
  bool has_shared_columns = false;  // an FFN beside the experts, of its own size
  NormKind norm = NormKind::kRms;
  QkNorm qk_norm = QkNorm::kHeadRms;
  bool parallel_ffn = false;
  bool window_rope_only = false;
  bool has_logit_scale = false;
  bool is_llama4 = false;     // what only that has
  bool is_gemma3 = false;     // likewise
  bool axes_are_one = false;  // positions of several axes, which are the same for text
  bool has_temperature = false;
};
constexpr Architecture kArchitectures[] = {
    {.name = "llama", .may_be_moe = true},
    {.name = "qwen2", .rope_neox = true},
    {.name = "qwen3", .rope_neox = true},
    {.name = "qwen3moe", .rope_neox = true, .may_be_moe = true, .must_be_moe = true},
    {.name = "gpt-oss",
     .rope_neox = true,
     .may_be_moe = true,
     .must_be_moe = true,
     .window_period = 2,
     .yarn_whole_bounds = false,
     .activation = Activation::kClampedSwiGlu,
     .gating = kSoftmaxOfChosen},
    {.name = "glm4moe",
     .rope_neox = true,
     .may_be_moe = true,
     .must_be_moe = true,
     .gating = kSigmoid,
     .has_shared_expert = true},
    {.name = "command-r",
     .norm = NormKind::kLayer,
     .qk_norm = QkNorm::kHeadLayer,
     .parallel_ffn = true,
     .has_logit_scale = true},
    {.name = "cohere2",
     .window_period = 4,
     .norm = NormKind::kLayer,
     .parallel_ffn = true,
     .window_rope_only = true,
     .has_logit_scale = true},
    {.name = "minimax-m2",
     .rope_neox = true,
     .may_be_moe = true,
     .must_be_moe = true,
     .gating = kSigmoid,
     .qk_norm = QkNorm::kRowRms},
    {.name = "llama4",
     .may_be_moe = true,
     .must_be_moe = true,
     .window_period = 4,
     .gating = kSigmoid,
     .has_shared_expert = true,
     .qk_norm = QkNorm::kPlain,
     .window_rope_only = true,
     .is_llama4 = true},
    {.name = "mistral3", .has_temperature = true},
    {.name = "seed_oss", .rope_neox = true},
    {.name = "dots1",
     .rope_neox = true,
     .may_be_moe = true,
     .must_be_moe = true,
     .gating = kSigmoid,
     .has_shared_expert = true},
    {.name = "hunyuan-moe",
     .rope_neox = true,
     .may_be_moe = true,
     .must_be_moe = true,
     .has_shared_columns = true,
     .qk_norm = QkNorm::kHeadRmsBehind},
    {.name = "qwen3vl", .rope_neox = true, .axes_are_one = true},
    {.name = "qwen3vlmoe",
     .rope_neox = true,
     .may_be_moe = true,
     .must_be_moe = true,
     .axes_are_one = true},
    {.name = "bailingmoe2",
     .rope_neox = true,
     .may_be_moe = true,
     .must_be_moe = true,
     .gating = kSigmoid,
     .has_shared_expert = true},
    {.name = "gemma3",
     .rope_neox = true,
     .window_period = 6,
     .activation = Activation::kGeGlu,
     .is_gemma3 = true},
    {.name = "glm4"},
};

// Far above any published model; they keep products of two sizes small and hostile files cheap.
constexpr int64_t kMaxLayers = 1024;
constexpr int64_t kMaxDim = 1 << 18;
constexpr int64_t kMaxHeads = 4096;
constexpr int64_t kMaxHeadDim = 512;  // what the kernels hold
constexpr int64_t kMaxFfn = 1 << 21;
constexpr int64_t kMaxVocab = 1 << 22;
constexpr int64_t kMaxContext = 1 << 26;
constexpr int64_t kMaxExperts = 1024;

// Reads keys below "<architecture>.", remembers nothing else.
class Keys {
 public:
  Keys(const Checkpoint& c, std::string prefix) : c_(c), prefix_(std::move(prefix)) {}

  bool Has(const char* key) const { return c_.FindMetadata(prefix_ + key) != nullptr; }

  absl::StatusOr<int> Int(const char* key, int64_t min, int64_t max) const {
    SHOAL_ASSIGN_OR_RETURN(const int64_t n, MetadataInt(c_, prefix_ + key, min, max));
    return static_cast<int>(n);
  }
  absl::StatusOr<int> IntOr(const char* key, int64_t min, int64_t max, int fallback) const {
    if (!Has(key)) return fallback;
    return Int(key, min, max);
  }
  absl::StatusOr<bool> BoolOr(const char* key, bool fallback) const {
    const MetadataValue* value = c_.FindMetadata(prefix_ + key);
    if (value == nullptr) return fallback;
    if (const bool* b = std::get_if<bool>(value)) return *b;
    return absl::InvalidArgumentError(
        absl::StrCat(c_.Files()[0], ": metadata key '", prefix_, key, "' is no boolean"));
  }
  // An array; empty when the key is absent or holds one value.
  absl::StatusOr<std::vector<bool>> Bools(const char* key) const {
    const MetadataValue* value = c_.FindMetadata(prefix_ + key);
    const auto* array = value == nullptr ? nullptr : std::get_if<std::vector<int64_t>>(value);
    if (array == nullptr) return std::vector<bool>();
    if (array->empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat(c_.Files()[0], ": metadata key '", prefix_, key, "' is an empty array"));
    }
    return std::vector<bool>(array->begin(), array->end());
  }
  absl::StatusOr<float> PositiveOr(const char* key, float fallback) const {
    return FloatOr(key, fallback, "a positive number", [](double x) { return x > 0; });
  }
  absl::StatusOr<float> NonNegativeOr(const char* key, float fallback) const {
    return FloatOr(key, fallback, "no negative number", [](double x) { return x >= 0; });
  }

 private:
  absl::StatusOr<float> FloatOr(const char* key, float fallback, const char* expected,
                                bool (*accepts)(double)) const {
    if (!Has(key)) return fallback;
    SHOAL_ASSIGN_OR_RETURN(const double x, MetadataFloat(c_, prefix_ + key));
    if (!(accepts(x) && x <= 1e30)) {
      return absl::InvalidArgumentError(absl::StrCat(c_.Files()[0], ": metadata key '", prefix_,
                                                     key, "' is ", x, ", expected ", expected));
    }
    return static_cast<float>(x);
  }

  const Checkpoint& c_;
  const std::string prefix_;
};

absl::Status Malformed(const Checkpoint& c, const std::string& text) {
  return absl::InvalidArgumentError(absl::StrCat(c.Files()[0], ": ", text));
}

absl::StatusOr<const Architecture*> FindArchitecture(const Checkpoint& c) {
  SHOAL_ASSIGN_OR_RETURN(const std::string name, MetadataString(c, "general.architecture"));
  std::string known;
  for (const Architecture& a : kArchitectures) {
    if (name == a.name) return &a;
    absl::StrAppend(&known, known.empty() ? "" : ", ", a.name);
  }
  return absl::UnimplementedError(absl::StrCat(
      c.Files()[0], ": the architecture '", Printable(name), "' is not known; known are: ", known));
}

absl::Status ReadRopeScaling(const Checkpoint& c, const Keys& keys, ModelConfig& m) {
  std::string type = "none";
  const std::string type_key = m.architecture + ".rope.scaling.type";
  RopeScaling& r = m.rope_scaling;
  SHOAL_ASSIGN_OR_RETURN(r.factor, keys.PositiveOr("rope.scale_linear", 1));  // older name
  SHOAL_ASSIGN_OR_RETURN(r.factor, keys.PositiveOr("rope.scaling.factor", r.factor));
  if (c.FindMetadata(type_key) != nullptr) {
    SHOAL_ASSIGN_OR_RETURN(type, MetadataString(c, type_key));
  } else if (r.factor != 1) {
    type = "linear";  // what a factor without a type has always meant
  }
  if (type == "none") {
    r.factor = 1;
    return absl::OkStatus();
  }
  if (type == "linear") {
    r.kind = RopeScaling::Kind::kLinear;
    return absl::OkStatus();
  }
  if (type != "yarn") {
    return absl::UnimplementedError(absl::StrCat(c.Files()[0], ": rope scaling '", Printable(type),
                                                 "' is not known; known are: none, linear, yarn"));
  }
  r.kind = RopeScaling::Kind::kYarn;
  SHOAL_ASSIGN_OR_RETURN(r.original_context, keys.IntOr("rope.scaling.original_context_length", 1,
                                                        kMaxContext, m.context));
  SHOAL_ASSIGN_OR_RETURN(r.attn_factor, keys.PositiveOr("rope.scaling.yarn_attn_factor", 1));
  SHOAL_ASSIGN_OR_RETURN(r.attn_factor, keys.PositiveOr("rope.scaling.attn_factor", r.attn_factor));
  // As DeepSeek's code has it: the magnitude of cos and sin is divided by that of this multiplier.
  SHOAL_ASSIGN_OR_RETURN(const float multiplier,
                         keys.NonNegativeOr("rope.scaling.yarn_log_multiplier", 0));
  if (r.factor > 1) {
    r.attn_factor /= static_cast<float>(1 + 0.1 * multiplier * std::log(r.factor));
  }
  SHOAL_ASSIGN_OR_RETURN(r.beta_fast, keys.PositiveOr("rope.scaling.yarn_beta_fast", r.beta_fast));
  SHOAL_ASSIGN_OR_RETURN(r.beta_slow, keys.PositiveOr("rope.scaling.yarn_beta_slow", r.beta_slow));
  return absl::OkStatus();
}

// Mistral's (Ministral 3, Devstral 2): as in llama4, but in all layers, counted from the context
// that the model was first trained for.
absl::Status ReadTemperature(const Checkpoint& c, const Keys& keys, ModelConfig& m) {
  SHOAL_ASSIGN_OR_RETURN(m.temperature_scale, keys.NonNegativeOr("attention.temperature_scale", 0));
  if (m.temperature_scale == 0) return absl::OkStatus();
  SHOAL_ASSIGN_OR_RETURN(m.temperature_length,
                         keys.IntOr("rope.scaling.original_context_length", 0, kMaxContext, 0));
  if (m.temperature_length == 0) {
    return Malformed(c, "attention.temperature_scale needs rope.scaling.original_context_length");
  }
  m.temperature_offset = 0;
  m.temperature_everywhere = true;
  return absl::OkStatus();
}

absl::Status ReadRope(const Checkpoint& c, const Keys& keys, const Architecture& arch,
                      ModelConfig& m) {
  SHOAL_ASSIGN_OR_RETURN(m.rope_base, keys.PositiveOr("rope.freq_base", 10000));
  SHOAL_ASSIGN_OR_RETURN(m.rotary_dim,
                         keys.IntOr("rope.dimension_count", 2, m.head_dim, m.head_dim));
  if (m.rotary_dim % 2 != 0) {
    return Malformed(
        c, absl::StrCat("rope.dimension_count is ", m.rotary_dim, ", expected an even number"));
  }
  SHOAL_ASSIGN_OR_RETURN(const std::vector<bool> sections, keys.Bools("rope.dimension_sections"));
  if (!arch.axes_are_one && std::find(sections.begin(), sections.end(), true) != sections.end()) {
    return absl::UnimplementedError(absl::StrCat(
        c.Files()[0], ": positions of several axes (rope.dimension_sections) are not known"));
  }
  SHOAL_RETURN_IF_ERROR(ReadRopeScaling(c, keys, m));
  const TensorInfo* factors = c.FindTensor(kRopeFactorsName);
  if (factors == nullptr) return absl::OkStatus();
  const int64_t n = m.rotary_dim / 2;
  if (factors->type != DType::kF32 || factors->dims != std::vector<int64_t>{n}) {
    return Malformed(c, absl::StrCat("tensor ", kRopeFactorsName, " is ", Info(factors->type).name,
                                     " ", DimsText(factors->dims), ", expected f32 [", n, "]"));
  }
  m.rope_factors.resize(n);
  SHOAL_RETURN_IF_ERROR(
      c.Read(*factors, 0, factors->bytes, reinterpret_cast<uint8_t*>(m.rope_factors.data())));
  for (const float f : m.rope_factors) {
    if (!(f > 0 && std::isfinite(f))) {
      return Malformed(c, absl::StrCat("tensor ", kRopeFactorsName, " holds ", f,
                                       ", expected positive divisors"));
    }
  }
  return absl::OkStatus();
}

absl::Status ReadHeads(const Checkpoint& c, const Keys& keys, ModelConfig& m) {
  SHOAL_ASSIGN_OR_RETURN(m.heads, keys.Int("attention.head_count", 1, kMaxHeads));
  SHOAL_ASSIGN_OR_RETURN(m.kv_heads, keys.IntOr("attention.head_count_kv", 1, kMaxHeads, m.heads));
  if (m.heads % m.kv_heads != 0) {
    return Malformed(c, absl::StrCat("attention.head_count is ", m.heads,
                                     ", no multiple of attention.head_count_kv, ", m.kv_heads));
  }
  if (!keys.Has("attention.key_length") && m.dim % m.heads != 0) {
    return Malformed(
        c, absl::StrCat("embedding_length is ", m.dim, ", no multiple of attention.head_count, ",
                        m.heads, ", and attention.key_length is missing"));
  }
  SHOAL_ASSIGN_OR_RETURN(m.head_dim,
                         keys.IntOr("attention.key_length", 2, kMaxHeadDim, m.dim / m.heads));
  if (m.head_dim < 2 || m.head_dim > kMaxHeadDim || m.head_dim % 2 != 0) {
    return Malformed(c, absl::StrCat("the head size is ", m.head_dim,
                                     ", expected an even number from 2 to ", kMaxHeadDim));
  }
  SHOAL_ASSIGN_OR_RETURN(const int v_dim,
                         keys.IntOr("attention.value_length", 1, kMaxHeadDim, m.head_dim));
  if (v_dim != m.head_dim) {
    return absl::UnimplementedError(absl::StrCat(c.Files()[0], ": attention.value_length ", v_dim,
                                                 " differs from the key length ", m.head_dim,
                                                 ", which no architecture known here has"));
  }
  return absl::OkStatus();
}

// The windows of llama4 are chunks, and its other layers have no positions but a temperature. Its
// files say nothing of either; the names are those of other architectures.
absl::Status ReadChunks(const Checkpoint& c, const Keys& keys, ModelConfig& m) {
  constexpr int kLength = 8192;
  m.chunked = true;
  SHOAL_ASSIGN_OR_RETURN(m.window, keys.IntOr("attention.sliding_window", 0, INT32_MAX, kLength));
  if (m.window == 0) {
    return absl::UnimplementedError(
        absl::StrCat(c.Files()[0], ": llama4 without chunks of attention is not known"));
  }
  SHOAL_ASSIGN_OR_RETURN(m.temperature_length,
                         keys.IntOr("attention.temperature_length", 1, INT32_MAX, kLength));
  SHOAL_ASSIGN_OR_RETURN(m.temperature_scale, keys.PositiveOr("attention.temperature_scale", 0.1f));
  return absl::OkStatus();
}

absl::Status ReadWindow(const Checkpoint& c, const Keys& keys, const Architecture& arch,
                        ModelConfig& m) {
  constexpr const char* kWindow = "attention.sliding_window";
  constexpr const char* kPattern = "attention.sliding_window_pattern";
  m.window_rope_only = arch.window_rope_only;
  if (arch.window_period == 0) {
    SHOAL_ASSIGN_OR_RETURN(m.window, keys.IntOr(kWindow, 0, INT32_MAX, 0));
    if (m.window == 0 || !keys.Has(kPattern)) return absl::OkStatus();
    return absl::UnimplementedError(absl::StrCat(c.Files()[0], ": ", arch.name,
                                                 " with windows in some layers only is not known"));
  }
  if (arch.is_llama4) {
    SHOAL_RETURN_IF_ERROR(ReadChunks(c, keys, m));
  } else if (arch.is_gemma3) {  // the smallest have none
    SHOAL_ASSIGN_OR_RETURN(m.window, keys.IntOr(kWindow, 0, INT32_MAX, 0));
    if (m.window == 0) return absl::OkStatus();
    SHOAL_ASSIGN_OR_RETURN(m.window_rope_base, keys.PositiveOr("rope.freq_base_swa", 10000));
  } else {
    SHOAL_ASSIGN_OR_RETURN(m.window, keys.Int(kWindow, 1, INT32_MAX));
  }
  SHOAL_ASSIGN_OR_RETURN(m.windowed, keys.Bools(kPattern));
  if (m.windowed.empty()) {
    SHOAL_ASSIGN_OR_RETURN(m.window_period,
                           keys.IntOr(kPattern, 0, kMaxLayers, arch.window_period));
  } else if (static_cast<int>(m.windowed.size()) < m.layers) {
    return Malformed(c, absl::StrCat(kPattern, " has ", m.windowed.size(), " entries for ",
                                     m.layers, " layers"));
  }
  return absl::OkStatus();
}

// Which experts may be chosen together.
absl::Status ReadExpertGroups(const Checkpoint& c, const Keys& keys, ModelConfig& m) {
  SHOAL_ASSIGN_OR_RETURN(const int groups, keys.IntOr("expert_group_count", 0, INT32_MAX, 0));
  if (groups <= 1) return absl::OkStatus();
  if (groups > kMaxExpertGroups || m.experts % groups != 0 || m.experts / groups < 2) {
    return Malformed(c, absl::StrCat("expert_group_count is ", groups, " for ", m.experts,
                                     " experts, expected equal groups of 2 or more, at most ",
                                     kMaxExpertGroups));
  }
  const int size = m.experts / groups;
  m.expert_groups = groups;
  SHOAL_ASSIGN_OR_RETURN(
      m.expert_groups_used,
      keys.Int("expert_group_used_count", (m.experts_used + size - 1) / size, groups));
  return absl::OkStatus();
}

// What the paper has in place of keys: embeddings times sqrt(dim), and in the largest model scores
// over sqrt(dim / heads); llama.cpp tells it by its layers, too.
absl::Status ReadGemma3(const Checkpoint& c, const Keys& keys, ModelConfig& m) {
  constexpr int kLayersOf27B = 62;
  m.embedding_scale = std::sqrt(static_cast<float>(m.dim));
  m.scores_by_dim = m.layers == kLayersOf27B;
  SHOAL_ASSIGN_OR_RETURN(const float cap, keys.NonNegativeOr("final_logit_softcapping", 0));
  if (cap == 0) return absl::OkStatus();
  return absl::UnimplementedError(
      absl::StrCat(c.Files()[0], ": gemma3 with capped logits is not known"));
}

// What glm4moe, dots1, llama4 and bailingmoe2 have besides their experts.
absl::Status ReadSharedExpert(const Checkpoint& c, const Keys& keys, int shared, ModelConfig& m) {
  SHOAL_ASSIGN_OR_RETURN(const int columns,
                         keys.IntOr("expert_shared_feed_forward_length", 1, kMaxFfn, m.ffn));
  if (int64_t{shared} * columns > kMaxFfn) {
    return Malformed(c,
                     absl::StrCat(shared, " shared experts of ", columns, " columns are too many"));
  }
  m.shared_ffn = shared * columns;
  SHOAL_ASSIGN_OR_RETURN(m.renormalize_experts, keys.BoolOr("expert_weights_norm", false));
  SHOAL_RETURN_IF_ERROR(ReadExpertGroups(c, keys, m));
  SHOAL_ASSIGN_OR_RETURN(m.dense_layers, keys.IntOr("leading_dense_block_count", 0, m.layers, 0));
  SHOAL_ASSIGN_OR_RETURN(m.moe_step, keys.IntOr("interleave_moe_layer_step", 1, kMaxLayers, 1));
  if (m.dense_layers == 0 && m.moe_step == 1) return absl::OkStatus();
  SHOAL_ASSIGN_OR_RETURN(m.dense_ffn, keys.Int("feed_forward_length", 1, kMaxFfn));
  return absl::OkStatus();
}

absl::Status ReadExperts(const Checkpoint& c, const Keys& keys, const Architecture& arch,
                         ModelConfig& m) {
  SHOAL_ASSIGN_OR_RETURN(m.experts, keys.IntOr("expert_count", 0, kMaxExperts, 0));
  if (m.experts == 0) {
    if (arch.must_be_moe) return Malformed(c, absl::StrCat(arch.name, ".expert_count is missing"));
    SHOAL_ASSIGN_OR_RETURN(m.ffn, keys.Int("feed_forward_length", 1, kMaxFfn));
    return absl::OkStatus();
  }
  if (!arch.may_be_moe) {
    return absl::UnimplementedError(
        absl::StrCat(c.Files()[0], ": ", arch.name, " with ", m.experts, " experts is not known"));
  }
  SHOAL_ASSIGN_OR_RETURN(m.experts_used, keys.Int("expert_used_count", 1, m.experts));
  const char* ffn_key =
      keys.Has("expert_feed_forward_length") ? "expert_feed_forward_length" : "feed_forward_length";
  SHOAL_ASSIGN_OR_RETURN(m.ffn, keys.Int(ffn_key, 1, kMaxFfn));
  SHOAL_ASSIGN_OR_RETURN(const int gating,
                         keys.IntOr("expert_gating_func", 0, INT32_MAX, arch.gating));
  SHOAL_ASSIGN_OR_RETURN(const int shared,
                         keys.IntOr("expert_shared_count", 0, INT32_MAX, arch.is_llama4 ? 1 : 0));
  const bool softmax = arch.gating != kSigmoid && gating == kSoftmax;
  const bool other = gating != 0 && gating != arch.gating && !softmax;
  if (arch.has_shared_columns) {
    SHOAL_ASSIGN_OR_RETURN(m.shared_ffn,
                           keys.IntOr("expert_shared_feed_forward_length", 1, kMaxFfn, m.ffn));
  }
  if (other || (shared > 0 && !arch.has_shared_expert && !arch.has_shared_columns)) {
    return absl::UnimplementedError(absl::StrCat(
        c.Files()[0], ": ", arch.name,
        other ? absl::StrCat(" with the expert gating ", gating) : " with shared experts",
        " is not known"));
  }
  if (arch.is_llama4 && m.experts_used > 1) {
    return absl::UnimplementedError(absl::StrCat(c.Files()[0], ": llama4 with ", m.experts_used,
                                                 " experts for a token is not known"));
  }
  m.weigh_expert_input = arch.is_llama4;
  // Maverick has 128 experts and no norm of q and k; llama.cpp tells it from Scout so, too.
  if (arch.is_llama4 && m.experts == 128) m.qk_norm = QkNorm::kHeadRms;
  m.sigmoid_router = arch.gating == kSigmoid;
  if (m.sigmoid_router) {
    SHOAL_ASSIGN_OR_RETURN(m.expert_scale, keys.PositiveOr("expert_weights_scale", 1));
  }
  return arch.has_shared_expert ? ReadSharedExpert(c, keys, shared, m) : absl::OkStatus();
}

// Layers at the end that draft further tokens.
absl::Status ReadDraftLayers(const Checkpoint& c, const Keys& keys, ModelConfig& m) {
  SHOAL_ASSIGN_OR_RETURN(m.unused_layers, keys.IntOr("nextn_predict_layers", 0, kMaxLayers, 0));
  if (m.unused_layers >= m.layers) {
    return Malformed(c, absl::StrCat("nextn_predict_layers is ", m.unused_layers,
                                     ", but block_count is ", m.layers));
  }
  m.layers -= m.unused_layers;
  return absl::OkStatus();
}

// Rows of the embedding, which the tokenizer and the metadata must agree with.
absl::Status ReadVocab(const Checkpoint& c, const Keys& keys, ModelConfig& m) {
  const TensorInfo* embedding = c.FindTensor("token_embd.weight");
  if (embedding == nullptr) {
    return Malformed(c, c.tensors().empty()
                            ? "holds a vocabulary only, no weights; give a model's file"
                            : "tensor 'token_embd.weight' is missing");
  }
  if (embedding->rows() > kMaxVocab) {
    return Malformed(c, absl::StrCat("a vocabulary of ", embedding->rows(), ", at most ", kMaxVocab,
                                     " is accepted"));
  }
  m.vocab = static_cast<int>(embedding->rows());
  SHOAL_ASSIGN_OR_RETURN(const int key_vocab, keys.IntOr("vocab_size", 1, kMaxVocab, m.vocab));
  if (key_vocab != m.vocab) {
    return Malformed(c, absl::StrCat("vocab_size is ", key_vocab, ", but token_embd.weight has ",
                                     m.vocab, " rows"));
  }
  if (const MetadataValue* value = c.FindMetadata("tokenizer.ggml.tokens")) {
    const auto* tokens = std::get_if<std::vector<std::string>>(value);
    if (tokens == nullptr || static_cast<int64_t>(tokens->size()) != m.vocab) {
      return Malformed(
          c, absl::StrCat("tokenizer.ggml.tokens has ", tokens == nullptr ? 0 : tokens->size(),
                          " tokens, but token_embd.weight has ", m.vocab, " rows"));
    }
  }
  m.tied_embeddings = c.FindTensor("output.weight") == nullptr;
  return absl::OkStatus();
}

// Checks tensors against what the metadata promises, and that nothing else is there.
class TensorChecker {
 public:
  explicit TensorChecker(const Checkpoint& c) : c_(c) { known_.insert(kRopeFactorsName); }

  absl::Status Check(const TensorSpec& spec) {
    known_.insert(spec.name);
    const TensorInfo* t = c_.FindTensor(spec.name);
    if (t == nullptr) {
      if (!spec.required) return absl::OkStatus();
      return Malformed(
          c_, absl::StrCat("tensor '", spec.name, "' is missing, expected ", DimsText(spec.dims)));
    }
    const int64_t rows = spec.dims.size() > 1 ? spec.dims[1] : 1;
    const int64_t matrices = spec.dims.size() > 2 ? spec.dims[2] : 1;
    if (t->cols() != spec.dims[0] || t->rows() != rows || t->matrices() != matrices) {
      return Malformed(c_,
                       absl::StrCat("tensor '", spec.name, "' has the shape ", DimsText(t->dims),
                                    ", the metadata says ", DimsText(spec.dims)));
    }
    if (spec.is_vector() && Info(t->type).block_elems != 1) {
      return Malformed(c_, absl::StrCat("tensor '", spec.name, "' is ", Info(t->type).name,
                                        ", expected f32, f16 or bf16"));
    }
    return absl::OkStatus();
  }

  absl::Status CheckExperts(const ModelConfig& m, int layer) {
    for (const Role role : {Role::kGate, Role::kUp, Role::kDown}) {
      const TensorSpec stacked = StackedExperts(m, role, layer);
      const bool separate = c_.FindTensor(stacked.name) == nullptr &&
                            c_.FindTensor(SeparateExpert(m, role, layer, 0).name) != nullptr;
      if (!separate) {
        SHOAL_RETURN_IF_ERROR(Check(stacked));
        continue;
      }
      for (int e = 0; e < m.experts; ++e) {
        SHOAL_RETURN_IF_ERROR(Check(SeparateExpert(m, role, layer, e)));
      }
    }
    for (const TensorSpec& spec : ExpertBiases(m, layer)) SHOAL_RETURN_IF_ERROR(Check(spec));
    return absl::OkStatus();
  }

  // A tensor we do not know would be a part of the graph that we do not compute.
  absl::Status CheckNothingElse(const ModelConfig& m) const {
    for (const TensorInfo& t : c_.tensors()) {
      const bool rope_table = absl::EndsWith(t.name, ".attn_rot_embd.weight");  // old, never read
      if (!known_.contains(t.name) && !rope_table && !OfUnusedLayer(m, t.name)) {
        return absl::UnimplementedError(absl::StrCat(c_.Files()[0], ": tensor '", Printable(t.name),
                                                     "' is no part of the architecture ",
                                                     m.architecture, " as known here"));
      }
    }
    return absl::OkStatus();
  }

 private:
  static bool OfUnusedLayer(const ModelConfig& m, const std::string& name) {
    for (int layer = m.layers; layer < m.layers + m.unused_layers; ++layer) {
      if (absl::StartsWith(name, absl::StrCat("blk.", layer, "."))) return true;
    }
    return false;
  }

  const Checkpoint& c_;
  absl::flat_hash_set<std::string> known_;
};

}  // namespace

absl::StatusOr<ModelConfig> ReadModelConfig(const Checkpoint& c) {
  SHOAL_ASSIGN_OR_RETURN(const Architecture* arch, FindArchitecture(c));
  ModelConfig m;
  m.architecture = arch->name;
  m.rope_neox = arch->rope_neox;
  m.rope_scaling.whole_bounds = arch->yarn_whole_bounds;
  m.activation = arch->activation;
  m.norm = arch->norm;
  m.qk_norm = arch->qk_norm;
  m.parallel_ffn = arch->parallel_ffn;
  if (const MetadataValue* name = c.FindMetadata("general.name")) {
    if (const auto* text = std::get_if<std::string>(name)) m.name = *text;
  }
  const Keys keys(c, m.architecture + ".");
  SHOAL_ASSIGN_OR_RETURN(m.layers, keys.Int("block_count", 1, kMaxLayers));
  SHOAL_ASSIGN_OR_RETURN(m.dim, keys.Int("embedding_length", 1, kMaxDim));
  SHOAL_ASSIGN_OR_RETURN(m.context, keys.Int("context_length", 1, kMaxContext));
  if (arch->has_shared_expert) SHOAL_RETURN_IF_ERROR(ReadDraftLayers(c, keys, m));
  SHOAL_RETURN_IF_ERROR(ReadHeads(c, keys, m));
  SHOAL_RETURN_IF_ERROR(ReadWindow(c, keys, *arch, m));
  SHOAL_RETURN_IF_ERROR(ReadExperts(c, keys, *arch, m));
  SHOAL_RETURN_IF_ERROR(ReadVocab(c, keys, m));
  const char* eps = m.norm == NormKind::kRms ? "attention.layer_norm_rms_epsilon"
                                             : "attention.layer_norm_epsilon";
  if (!keys.Has(eps)) {
    return Malformed(c, absl::StrCat("metadata key '", m.architecture, ".", eps, "' is missing"));
  }
  SHOAL_ASSIGN_OR_RETURN(m.norm_eps, keys.PositiveOr(eps, 0));
  if (arch->has_logit_scale) {
    SHOAL_ASSIGN_OR_RETURN(m.logit_scale, keys.PositiveOr("logit_scale", 1));
  }

  TensorChecker tensors(c);
  for (const TensorSpec& spec : GlobalTensors(m)) SHOAL_RETURN_IF_ERROR(tensors.Check(spec));
  for (int layer = 0; layer < m.layers; ++layer) {
    for (const TensorSpec& spec : LayerTensors(m, layer)) {
      SHOAL_RETURN_IF_ERROR(tensors.Check(spec));
    }
    if (m.has_experts(layer)) SHOAL_RETURN_IF_ERROR(tensors.CheckExperts(m, layer));
  }
  SHOAL_RETURN_IF_ERROR(tensors.CheckNothingElse(m));
  SHOAL_RETURN_IF_ERROR(ReadRope(c, keys, *arch, m));
  if (arch->is_gemma3) SHOAL_RETURN_IF_ERROR(ReadGemma3(c, keys, m));
  if (arch->has_temperature) SHOAL_RETURN_IF_ERROR(ReadTemperature(c, keys, m));
  return m;
}

}  // namespace shoal
