// Writes GGUF files for tests: any metadata and tensors (also wrong ones), and whole tiny random
// models.
//
//   GgufWriter w;                       // a file piece by piece
//   w.String("general.architecture", "llama");
//   w.Tensor("x", DType::kF32, {4, 2}, bytes);
//   w.WriteTo(path);
//
//   TinyModel m;                        // a complete model with a tokenizer
//   m.architecture = "qwen2"; m.type = DType::kQ4_0;
//   TinyModelGguf(m).WriteTo(path);
//
// The same options give the same bytes. Needs no test framework.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "kernels/check.h"
#include "kernels/dtype.h"

namespace shoal {

class GgufWriter {
 public:
  // What stands in the file about a tensor; tests may spoil it.
  struct Entry {
    std::string name;
    std::vector<uint64_t> dims;
    uint32_t type = 0;
    uint64_t offset = 0;  // in the data section
  };

  uint32_t version = 3;
  uint64_t alignment = 32;  // other than 32: write general.alignment yourself
  std::vector<Entry> entries;
  std::string data;  // the data section

  void U16(const std::string& key, uint16_t v) { Pair(key, 2, Pod(v)); }
  void U32(const std::string& key, uint32_t v) { Pair(key, 4, Pod(v)); }
  void I32(const std::string& key, int32_t v) { Pair(key, 5, Pod(v)); }
  void F32(const std::string& key, float v) { Pair(key, 6, Pod(v)); }
  void Bool(const std::string& key, bool v) { Pair(key, 7, Pod(static_cast<uint8_t>(v))); }
  void U64(const std::string& key, uint64_t v) { Pair(key, 10, Pod(v)); }
  void String(const std::string& key, const std::string& v) { Pair(key, 8, Text(v)); }
  void Strings(const std::string& key, const std::vector<std::string>& v) {
    std::string body;
    for (const std::string& s : v) body += Text(s);
    Array(key, 8, v.size(), body);
  }
  void F32s(const std::string& key, const std::vector<float>& v) { PodArray(key, 6, v); }
  void I32s(const std::string& key, const std::vector<int32_t>& v) { PodArray(key, 5, v); }
  // Any value, as it is: for wrong ones.
  void Pair(const std::string& key, uint32_t type, const std::string& value) {
    pairs_ += Text(key) + Pod(type) + value;
    ++pair_count_;
  }
  void Array(const std::string& key, uint32_t type, uint64_t count, const std::string& body) {
    Pair(key, 9, Pod(type) + Pod(count) + body);
  }

  void Tensor(const std::string& name, DType type, const std::vector<uint64_t>& dims,
              const std::string& bytes) {
    Pad(data);
    entries.push_back({name, dims, Info(type).ggml_id, data.size()});
    data += bytes;
  }

  // The file up to the data section.
  std::string Header() const {
    std::string out = "GGUF" + Pod(version) + Pod(uint64_t{entries.size()}) + Pod(pair_count_);
    out += pairs_;
    for (const Entry& e : entries) {
      out += Text(e.name) + Pod(static_cast<uint32_t>(e.dims.size()));
      for (const uint64_t d : e.dims) out += Pod(d);
      out += Pod(e.type) + Pod(e.offset);
    }
    Pad(out);
    return out;
  }
  std::string Bytes() const { return Header() + data; }
  void WriteTo(const std::string& path) const {
    const std::string bytes = Bytes();
    std::ofstream file(path, std::ios::binary | std::ios::trunc);
    file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    file.close();
    SHOAL_CHECK(file.good(), "the test's GGUF must be written");
  }

  template <typename T>
  static std::string Pod(T v) {
    std::string s(sizeof(T), '\0');
    std::memcpy(s.data(), &v, sizeof(T));
    return s;
  }
  static std::string Text(const std::string& s) { return Pod(uint64_t{s.size()}) + s; }

 private:
  void Pad(std::string& s) const { s.resize((s.size() + alignment - 1) / alignment * alignment); }
  template <typename T>
  void PodArray(const std::string& key, uint32_t type, const std::vector<T>& v) {
    std::string body(v.size() * sizeof(T), '\0');
    if (!v.empty()) std::memcpy(body.data(), v.data(), body.size());
    Array(key, type, v.size(), body);
  }

  std::string pairs_;
  uint64_t pair_count_ = 0;
};

// A small model. The defaults fit every type: all row lengths are multiples of 256.
struct TinyModel {
  std::string architecture = "llama";  // llama, qwen2, qwen3, qwen3moe, gpt-oss,
                                       // glm4moe, command-r, cohere2, minimax-m2, llama4,
                                       // mistral3, seed_oss, dots1, hunyuan-moe, qwen3vl(moe),
                                       // bailingmoe2, gemma3, glm4
  int layers = 2;
  int dim = 256;
  int heads = 8;
  int kv_heads = 4;
  int head_dim = 32;  // heads * head_dim may differ from dim
  int ffn = 512;      // of one expert when there are experts
  int vocab = 320;    // from 259 on the tokenizer has all bytes
  int context = 256;
  int experts = 0;  // llama with experts is a Mixtral
  int experts_used = 2;
  int moe_step = 2;  // llama4 only
  int temperature_length = 20;
  float temperature_scale = 0.1f;                 // mistral3
  int expert_groups = 1, expert_groups_used = 1;  // bailingmoe2
  int dense_layers =
      1;  // glm4moe, dots1, bailingmoe2, as up to head_norms; the FFN is llama4's too
  int dense_ffn = 256;
  int shared_experts = 1;
  int draft_layers = 1;           // behind the others
  bool head_norms = false;        // of q and k; command-r too
  bool separate_experts = false;  // one tensor for each expert, as older files have them
  bool tied = false;              // command-r, cohere2: always
  bool rope_factors = false;      // Llama-3's rope_freqs.weight
  bool attention_biases = false;  // llama only: q, k, v and output biases; qwen2 always has q, k, v
  int window = 0;                 // Mistral's sliding window
  std::string rope_scaling;       // "", "linear", "yarn"
  float rope_scaling_factor = 4;
  DType type = DType::kF32;                               // of every matrix but the router
  std::function<DType(const std::string& name)> type_of;  // overrides `type` when set
  uint32_t seed = 1;
};

namespace tiny_model_internal {

// Small, fast and the same everywhere, which std::normal_distribution is not.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u + 1) {}
  float Uniform() {  // [-1, 1)
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<float>(static_cast<int32_t>(state_ >> 32)) * 0x1p-31f;
  }
  // About normal, standard deviation 1 (a sum of three uniforms).
  float Normal() { return Uniform() + Uniform() + Uniform(); }

 private:
  uint64_t state_;
};

class Builder {
 public:
  explicit Builder(const TinyModel& m) : m_(m), random_(m.seed) {}

  GgufWriter Build() {
    Metadata();
    Tokenizer();
    const uint64_t dim = m_.dim;
    Matrix("token_embd.weight", {dim, U(m_.vocab)}, 1.0f);
    for (int layer = 0; layer < m_.layers + draft_layers(); ++layer) {
      layer_ = layer;
      Layer("blk." + std::to_string(layer) + ".");
    }
    Vector("output_norm.weight", m_.dim, 1.0f, 0.1f);
    if (!m_.tied && !cohere())
      Matrix("output.weight", {dim, U(m_.vocab)}, 2.0f / std::sqrt(float(m_.dim)));
    if (m_.rope_factors) {
      std::vector<float> f(m_.head_dim / 2);
      for (size_t i = 0; i < f.size(); ++i) f[i] = 1.0f + 7.0f * float(i) / float(f.size());
      Floats("rope_freqs.weight", f);
    }
    return std::move(w_);
  }

 private:
  bool glm() const { return m_.architecture == "glm4moe"; }
  bool dots() const { return m_.architecture == "dots1"; }
  bool hunyuan() const { return m_.architecture == "hunyuan-moe"; }
  bool seed() const { return m_.architecture == "seed_oss"; }
  bool bailing() const { return m_.architecture == "bailingmoe2"; }
  bool gemma() const { return m_.architecture == "gemma3"; }
  bool glm4() const { return m_.architecture == "glm4"; }
  bool dense_at_front() const { return glm() || dots() || bailing(); }
  int draft_layers() const { return glm() || bailing() ? m_.draft_layers : 0; }
  bool llama4() const { return m_.architecture == "llama4"; }
  bool minimax() const { return m_.architecture == "minimax-m2"; }
  bool cohere() const { return m_.architecture == "command-r" || m_.architecture == "cohere2"; }
  static uint64_t U(int n) { return static_cast<uint64_t>(n); }

  void Metadata() {
    const std::string a = m_.architecture + ".";
    w_.String("general.architecture", m_.architecture);
    w_.String("general.name", "tiny random " + m_.architecture);
    w_.U32(a + "block_count", m_.layers + draft_layers());
    w_.U32(a + "context_length", m_.context);
    w_.U32(a + "embedding_length", m_.dim);
    w_.U32(a + "feed_forward_length", dense_at_front() || llama4() ? m_.dense_ffn : m_.ffn);
    w_.U32(a + "attention.head_count", m_.heads);
    w_.U32(a + "attention.head_count_kv", m_.kv_heads);
    w_.U32(a + "attention.key_length", m_.head_dim);
    w_.U32(a + "attention.value_length", m_.head_dim);
    const bool half_rotates = glm() || glm4() || minimax() || bailing();
    w_.U32(a + "rope.dimension_count", half_rotates ? m_.head_dim / 2 : m_.head_dim);
    w_.U32(a + "vocab_size", m_.vocab);
    w_.F32(a + "rope.freq_base", gemma() ? 50000.0f : 10000.0f);
    w_.F32(a + (cohere() ? "attention.layer_norm_epsilon" : "attention.layer_norm_rms_epsilon"),
           1e-5f);
    if (cohere()) w_.F32(a + "logit_scale", 0.25f);
    if (m_.window > 0) w_.U32(a + "attention.sliding_window", m_.window);
    if (m_.experts > 0) {
      w_.U32(a + "expert_count", m_.experts);
      w_.U32(a + "expert_used_count", m_.experts_used);
      w_.U32(a + "expert_feed_forward_length", m_.ffn);
    }
    if (hunyuan()) {
      w_.U32(a + "expert_shared_count", 1);
      w_.U32(a + "expert_shared_feed_forward_length", m_.dense_ffn);
    }
    if (m_.architecture == "mistral3") {
      w_.F32(a + "attention.temperature_scale", m_.temperature_scale);
      w_.F32(a + "rope.scaling.yarn_log_multiplier", 0.5f);
    }
    if (m_.architecture.rfind("qwen3vl", 0) == 0) {
      const int half = m_.head_dim / 2;
      w_.I32s(a + "rope.dimension_sections", {(half + 2) / 3, (half + 1) / 3, half / 3, 0});
    }
    if (glm() || bailing()) w_.U32(a + "nextn_predict_layers", m_.draft_layers);
    if (bailing()) {
      w_.U32(a + "expert_shared_feed_forward_length", m_.ffn);
      w_.U32(a + "expert_group_count", m_.expert_groups);
      w_.U32(a + "expert_group_used_count", m_.expert_groups_used);
    }
    if (dense_at_front()) {
      w_.U32(a + "expert_shared_count", m_.shared_experts);
      w_.U32(a + "leading_dense_block_count", m_.dense_layers);
      w_.U32(a + "expert_gating_func", 2);
      w_.Bool(a + "expert_weights_norm", true);
      w_.F32(a + "expert_weights_scale", 1.5f);
    }
    if (llama4()) {
      w_.U32(a + "interleave_moe_layer_step", m_.moe_step);
      w_.U32(a + "attention.temperature_length", m_.temperature_length);
    }
    if (minimax()) w_.U32(a + "expert_gating_func", 2);
    if (!m_.rope_scaling.empty()) {
      w_.String(a + "rope.scaling.type", m_.rope_scaling);
      w_.F32(a + "rope.scaling.factor", m_.rope_scaling_factor);
      w_.U32(a + "rope.scaling.original_context_length",
             m_.architecture == "mistral3" ? m_.temperature_length : m_.context);
    }
  }

  // SentencePiece-like: <unk> <s> </s>, all bytes, then letters and pairs with falling scores.
  void Tokenizer() {
    std::vector<std::string> tokens = {"<unk>", "<s>", "</s>"};
    std::vector<int32_t> types = {2, 3, 3};
    if (m_.vocab >= 259) {
      for (int b = 0; b < 256; ++b) {
        char name[8];
        std::snprintf(name, sizeof(name), "<0x%02X>", b);
        tokens.push_back(name);
        types.push_back(6);
      }
    }
    const std::string space = "\xE2\x96\x81";  // U+2581, SentencePiece's space
    std::vector<std::string> pieces = {space};
    for (char c = 'a'; c <= 'z'; ++c) pieces.push_back(std::string(1, c));
    for (char c = 'a'; c <= 'z'; ++c) pieces.push_back(space + c);
    for (char c = 'a'; c <= 'z'; ++c) {
      for (char d = 'a'; d <= 'z'; ++d) pieces.push_back(std::string{c, d});
    }
    for (size_t i = 0; tokens.size() < U(m_.vocab); ++i) {
      tokens.push_back(i < pieces.size() ? pieces[i] : "piece" + std::to_string(i));
      types.push_back(1);
    }
    tokens.resize(m_.vocab);
    types.resize(m_.vocab);
    std::vector<float> scores(m_.vocab, 0.0f);
    for (int i = 259; i < m_.vocab; ++i) scores[i] = static_cast<float>(259 - i);
    w_.String("tokenizer.ggml.model", "llama");
    w_.String("tokenizer.ggml.pre", "default");
    w_.Strings("tokenizer.ggml.tokens", tokens);
    w_.F32s("tokenizer.ggml.scores", scores);
    w_.I32s("tokenizer.ggml.token_type", types);
    w_.U32("tokenizer.ggml.bos_token_id", 1);
    w_.U32("tokenizer.ggml.eos_token_id", 2);
    w_.U32("tokenizer.ggml.unknown_token_id", 0);
    w_.Bool("tokenizer.ggml.add_bos_token", true);
    w_.Bool("tokenizer.ggml.add_eos_token", false);
  }

  void Layer(const std::string& blk) {
    const uint64_t dim = m_.dim, q = U(m_.heads * m_.head_dim), kv = U(m_.kv_heads * m_.head_dim);
    const bool qwen3 = m_.architecture.rfind("qwen3", 0) == 0;
    const bool gpt_oss = m_.architecture == "gpt-oss";
    Vector(blk + "attn_norm.weight", m_.dim, 1.0f, 0.1f);
    if (bailing()) {
      Linear(blk + "attn_qkv.weight", {dim, q + 2 * kv});
    } else {
      Linear(blk + "attn_q.weight", {dim, q});
      Linear(blk + "attn_k.weight", {dim, kv});
      Linear(blk + "attn_v.weight", {dim, kv});
    }
    Linear(blk + "attn_output.weight", {q, dim});
    if (m_.architecture == "qwen2" || m_.attention_biases || gpt_oss || glm() || glm4() || seed()) {
      Vector(blk + "attn_q.bias", m_.heads * m_.head_dim, 0.0f, 0.3f);
      Vector(blk + "attn_k.bias", m_.kv_heads * m_.head_dim, 0.0f, 0.3f);
      Vector(blk + "attn_v.bias", m_.kv_heads * m_.head_dim, 0.0f, 0.3f);
    }
    if (gpt_oss || (m_.attention_biases && m_.architecture == "llama")) {
      Vector(blk + "attn_output.bias", m_.dim, 0.0f, 0.3f);
    }
    if (gpt_oss) Vector(blk + "attn_sinks.weight", m_.heads, 1.0f, 1.0f);
    if (qwen3 || dots() || hunyuan() || bailing() || gemma() || (glm() && m_.head_norms)) {
      Vector(blk + "attn_q_norm.weight", m_.head_dim, 1.0f, 0.1f);
      Vector(blk + "attn_k_norm.weight", m_.head_dim, 1.0f, 0.1f);
    }
    if (minimax()) {
      Vector(blk + "attn_q_norm.weight", m_.heads * m_.head_dim, 1.0f, 0.3f);
      Vector(blk + "attn_k_norm.weight", m_.kv_heads * m_.head_dim, 1.0f, 0.3f);
    }
    if (m_.architecture == "command-r" && m_.head_norms) {
      Matrix(blk + "attn_q_norm.weight", {U(m_.head_dim), U(m_.heads)}, 1.0f, DType::kF32);
      Matrix(blk + "attn_k_norm.weight", {U(m_.head_dim), U(m_.kv_heads)}, 1.0f, DType::kF32);
    }
    if (gemma() || glm4()) {
      Vector(blk + "post_attention_norm.weight", m_.dim, 1.0f, 0.3f);
      Vector(blk + "post_ffw_norm.weight", m_.dim, 1.0f, 0.3f);
    }
    if (!cohere()) {
      const bool renamed = gpt_oss || glm() || seed();
      Vector(blk + (renamed ? "post_attention_norm.weight" : "ffn_norm.weight"), m_.dim, 1.0f,
             0.1f);
    }
    Ffn(blk);
  }

  void Ffn(const std::string& blk) {
    const uint64_t dim = m_.dim, experts = m_.experts;
    const bool dense = (dense_at_front() && layer_ < m_.dense_layers) ||
                       (llama4() && (layer_ + 1) % m_.moe_step != 0);
    const uint64_t ffn = dense ? m_.dense_ffn : m_.ffn;
    if (glm4()) {
      Linear(blk + "ffn_up.weight", {dim, 2 * ffn});
      Linear(blk + "ffn_down.weight", {ffn, dim});
      return;
    }
    if (experts == 0 || dense) {
      Linear(blk + "ffn_gate.weight", {dim, ffn});
      Linear(blk + "ffn_up.weight", {dim, ffn});
      Linear(blk + "ffn_down.weight", {ffn, dim});
      return;
    }
    Matrix(blk + "ffn_gate_inp.weight", {dim, experts}, 1.0f / std::sqrt(float(m_.dim)),
           DType::kF32);
    if (minimax()) Vector(blk + "exp_probs_b.bias", m_.experts, 0.0f, 0.3f);
    if (dense_at_front() || llama4() || hunyuan()) {
      const uint64_t shared = hunyuan() ? U(m_.dense_ffn) : ffn * m_.shared_experts;
      if (dense_at_front()) Vector(blk + "exp_probs_b.bias", m_.experts, 0.0f, 0.3f);
      if (shared > 0) {
        Linear(blk + "ffn_gate_shexp.weight", {dim, shared});
        Linear(blk + "ffn_up_shexp.weight", {dim, shared});
        Linear(blk + "ffn_down_shexp.weight", {shared, dim});
      }
      if (layer_ >= m_.layers) Linear(blk + "nextn.eh_proj.weight", {2 * dim, dim});
    }
    if (m_.architecture == "gpt-oss") {
      Vector(blk + "ffn_gate_inp.bias", m_.experts, 0.0f, 0.3f);
      Vectors(blk + "ffn_gate_exps.bias", m_.ffn, 0.5f);
      Vectors(blk + "ffn_up_exps.bias", m_.ffn, 0.5f);
      Vectors(blk + "ffn_down_exps.bias", m_.dim, 0.3f);
    }
    if (!m_.separate_experts) {
      Linear(blk + "ffn_gate_exps.weight", {dim, ffn, experts});
      Linear(blk + "ffn_up_exps.weight", {dim, ffn, experts});
      Linear(blk + "ffn_down_exps.weight", {ffn, dim, experts});
      return;
    }
    for (uint64_t e = 0; e < experts; ++e) {
      const std::string tail = std::string(".") + std::to_string(e) + ".weight";
      Linear(blk + "ffn_gate" + tail, {dim, ffn});
      Linear(blk + "ffn_up" + tail, {dim, ffn});
      Linear(blk + "ffn_down" + tail, {ffn, dim});
    }
  }

  void Linear(const std::string& name, const std::vector<uint64_t>& dims) {
    Matrix(name, dims, 1.0f / std::sqrt(static_cast<float>(dims[0])));
  }
  void Matrix(const std::string& name, const std::vector<uint64_t>& dims, float deviation) {
    Matrix(name, dims, deviation, m_.type_of ? m_.type_of(name) : m_.type);
  }
  void Matrix(const std::string& name, const std::vector<uint64_t>& dims, float deviation,
              DType type) {
    const int64_t cols = static_cast<int64_t>(dims[0]);
    int64_t rows = 1;
    for (size_t i = 1; i < dims.size(); ++i) rows *= static_cast<int64_t>(dims[i]);
    SHOAL_CHECK(cols % Info(type).block_elems == 0, "choose sizes that fit the type's blocks");
    const int64_t row_bytes = RowBytes(type, cols);
    std::string bytes(rows * row_bytes, '\0');
    std::vector<float> row(cols);
    for (int64_t r = 0; r < rows; ++r) {
      for (float& x : row) x = deviation * random_.Normal();
      QuantizeRow(type, row.data(), bytes.data() + r * row_bytes, cols);
    }
    w_.Tensor(name, type, dims, bytes);
  }
  void Vector(const std::string& name, int n, float mean, float deviation) {
    std::vector<float> v(n);
    for (float& x : v) x = mean + deviation * random_.Normal();
    Floats(name, v);
  }
  // One for each expert.
  void Vectors(const std::string& name, int n, float deviation) {
    Matrix(name, {U(n), U(m_.experts)}, deviation, DType::kF32);
  }
  void Floats(const std::string& name, const std::vector<float>& v) {
    std::string bytes(v.size() * sizeof(float), '\0');
    std::memcpy(bytes.data(), v.data(), bytes.size());
    w_.Tensor(name, DType::kF32, {v.size()}, bytes);
  }

  const TinyModel& m_;
  Random random_;
  GgufWriter w_;
  int layer_ = 0;
};

}  // namespace tiny_model_internal

inline GgufWriter TinyModelGguf(const TinyModel& model) {
  return tiny_model_internal::Builder(model).Build();
}

}  // namespace shoal
