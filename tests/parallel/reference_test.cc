// The model against the papers: logits of tiny random models beside a forward pass in double that
// shares nothing with the kernels but the reading of tensors.
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <memory>
#include <numbers>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "parallel/engine.h"
#include "tests/shard/gguf_writer.h"

namespace shoal {
namespace {

using Row = std::vector<double>;
using Rows = std::vector<Row>;

// What the metadata says, read here once more so that a misreading shows.
struct Facts {
  std::string arch;
  int layers, dim, heads, kv_heads, head_dim, rotary, experts = 0, used = 0, window = 0;
  double base, factor = 1, original = 0;
  bool neox, yarn = false, glm = false, cohere = false, minimax = false, llama4 = false,
             mistral = false, dots = false, hunyuan = false, bailing = false, gemma = false,
             linear = false;
  int step = 1, temperature_length = 0;
  int dense = 0, groups = 1, groups_used = 1;
};

class Reference {
 public:
  Reference(const Checkpoint& c, const TinyModel& m) : c_(c) {
    f_.arch = m.architecture;
    f_.layers = m.layers;
    f_.dim = m.dim;
    f_.heads = m.heads;
    f_.kv_heads = m.kv_heads;
    f_.head_dim = f_.rotary = m.head_dim;
    f_.experts = m.experts;
    f_.used = m.experts_used;
    f_.window = m.window;
    f_.base = 10000;
    f_.cohere = m.architecture == "command-r" || m.architecture == "cohere2";
    f_.llama4 = m.architecture == "llama4";
    f_.step = m.moe_step;
    f_.temperature_length = m.temperature_length;
    f_.mistral = m.architecture == "mistral3";
    f_.dots = m.architecture == "dots1";
    f_.hunyuan = m.architecture == "hunyuan-moe";
    f_.neox = m.architecture != "llama" && !f_.cohere && !f_.llama4 && !f_.mistral;
    f_.glm = m.architecture == "glm4moe";
    f_.minimax = m.architecture == "minimax-m2";
    f_.bailing = m.architecture == "bailingmoe2";
    f_.gemma = m.architecture == "gemma3";
    if (f_.gemma) f_.base = 50000;
    const bool glm4 = m.architecture == "glm4";
    if (glm4) f_.neox = false;
    if (f_.glm || glm4 || f_.minimax || f_.bailing) f_.rotary = m.head_dim / 2;
    f_.linear = m.rope_scaling == "linear";
    f_.dense = f_.glm || f_.dots || f_.bailing ? m.dense_layers : 0;
    f_.groups = m.expert_groups;
    f_.groups_used = m.expert_groups_used;
    f_.yarn = m.rope_scaling == "yarn";
    f_.factor = m.rope_scaling_factor;
    f_.original = f_.mistral ? m.temperature_length : m.context;
    if (Has("rope_freqs.weight")) factors_ = Vector("rope_freqs.weight");
  }

  // Logits of every position.
  Rows Logits(const std::vector<int32_t>& tokens) {
    const Rows table = Matrix("token_embd.weight");
    Rows x;
    for (const int32_t t : tokens) x.push_back(table[t]);
    for (Row& row : x) {
      for (double& value : row) value *= f_.gemma ? std::sqrt(static_cast<double>(f_.dim)) : 1;
    }
    for (int layer = 0; layer < f_.layers; ++layer) {
      blk_ = "blk." + std::to_string(layer) + ".";
      if (f_.cohere) {
        Rows n = x;
        for (Row& row : n) row = Norm(row, Vector(blk_ + "attn_norm.weight"));
        Attention(layer, x);
        for (size_t i = 0; i < x.size(); ++i) Add(x[i], Mlp(n[i], ""));
        continue;
      }
      Attention(layer, x);
      const bool renamed = f_.arch == "gpt-oss" || f_.glm || f_.arch == "seed_oss",
                 dense = f_.llama4 ? layer % f_.step != f_.step - 1 : layer < f_.dense;
      const Row norm = Vector(blk_ + (renamed ? "post_attention_norm.weight" : "ffn_norm.weight"));
      for (Row& row : x) {
        const Row n = Norm(row, norm);
        const Row y = f_.experts > 0 && !dense ? Moe(n) : Mlp(n, "");
        Add(row, Sandwiched() ? Norm(y, Vector(blk_ + "post_ffw_norm.weight")) : y);
      }
    }
    const Row norm = Vector("output_norm.weight");
    const Rows head = Has("output.weight") ? Matrix("output.weight") : table;
    Rows logits;
    for (const Row& row : x) logits.push_back(Product(head, Norm(row, norm)));
    for (Row& row : logits) {
      for (double& logit : row) logit *= f_.cohere ? 0.25 : 1;
    }
    return logits;
  }

 private:
  bool Has(const std::string& name) const { return c_.FindTensor(name) != nullptr; }
  Rows Matrix(const std::string& name, int64_t index = 0) const {
    const TensorInfo* t = c_.FindTensor(name);
    SHOAL_CHECK(t != nullptr, "the test's model has the tensor");
    const int64_t row_bytes = RowBytes(t->type, t->cols());
    std::vector<uint8_t> bytes(row_bytes * t->rows());
    SHOAL_CHECK(c_.Read(*t, index * t->rows() * row_bytes, bytes.size(), bytes.data()).ok(),
                "read");
    Rows rows(t->rows());
    std::vector<float> row(t->cols());
    for (int64_t r = 0; r < t->rows(); ++r) {
      DequantizeRow(t->type, bytes.data() + r * row_bytes, row.data(), t->cols());
      rows[r].assign(row.begin(), row.end());
    }
    return rows;
  }
  Row Vector(const std::string& name) const { return Matrix(name)[0]; }

  bool Sandwiched() const { return Has(blk_ + "post_ffw_norm.weight"); }

  static Row Product(const Rows& w, const Row& x) {
    Row y;
    for (const Row& row : w) {
      double sum = 0;
      for (size_t i = 0; i < x.size(); ++i) sum += row[i] * x[i];
      y.push_back(sum);
    }
    return y;
  }
  static void Add(Row& x, const Row& y) {
    for (size_t i = 0; i < x.size(); ++i) x[i] += y[i];
  }
  Row Norm(const Row& x, const Row& weight) const {
    const double n = static_cast<double>(x.size());
    double mean = 0, squares = 0;
    for (const double v : x) mean += f_.cohere ? v / n : 0;  // LayerNorm
    for (const double v : x) squares += (v - mean) * (v - mean);
    Row y;
    for (size_t i = 0; i < x.size(); ++i) {
      y.push_back((x[i] - mean) * weight[i] / std::sqrt(squares / n + 1e-5));
    }
    return y;
  }
  // weight * x + bias, where there is one
  Row Linear(const std::string& name, const Row& x) const {
    Row y = Product(Matrix(blk_ + name + ".weight"), x);
    if (Has(blk_ + name + ".bias")) Add(y, Vector(blk_ + name + ".bias"));
    return y;
  }

  // RoFormer; YaRN's frequencies are those of section 3 of its paper.
  void Rotate(double* x, int pos, bool gemma_window = false) const {
    const int half = f_.rotary / 2;
    double magnitude = 1;
    for (int i = 0; i < half; ++i) {
      double frequency = std::pow(gemma_window ? 10000 : f_.base, -2.0 * i / f_.rotary);
      if (f_.linear && !gemma_window) frequency /= f_.factor;
      if (!factors_.empty()) frequency /= factors_[i];
      if (f_.yarn) {
        const auto dim = [&](double turns) {
          return f_.rotary * std::log(f_.original / (turns * 2 * std::numbers::pi)) /
                 (2 * std::log(f_.base));
        };
        double low = dim(32), high = dim(1);
        if (f_.arch != "gpt-oss") low = std::floor(low), high = std::ceil(high);
        low = std::max(low, 0.0);
        const double ramp = std::clamp((i - low) / (high - low), 0.0, 1.0);
        frequency = frequency * (1 - ramp) + frequency / f_.factor * ramp;
        magnitude = 1 + 0.1 * std::log(f_.factor);
        // DeepSeek's, with mscale 1 and mscale_all_dim 0.5
        if (f_.mistral) magnitude /= 1 + 0.1 * 0.5 * std::log(f_.factor);
      }
      double& a = x[f_.neox ? i : 2 * i];
      double& b = x[f_.neox ? i + half : 2 * i + 1];
      const double c = std::cos(pos * frequency), s = std::sin(pos * frequency), a0 = a;
      a = (a0 * c - b * s) * magnitude;
      b = (a0 * s + b * c) * magnitude;
    }
  }
  // Each head of a row: the norm, where there is one, and the rotation.
  Row Heads(Row x, int layer, int pos, const char* norm) const {
    if (f_.minimax) x = Norm(x, Vector(blk_ + norm));
    for (size_t at = 0; at < x.size(); at += f_.head_dim) {
      if (f_.hunyuan) Rotate(&x[at], pos);
      if (Has(blk_ + norm) && !f_.minimax) {
        const Row head(x.begin() + at, x.begin() + at + f_.head_dim);
        const Rows weights = Matrix(blk_ + norm);
        const Row normed = Norm(head, weights[weights.size() > 1 ? at / f_.head_dim : 0]);
        std::copy(normed.begin(), normed.end(), x.begin() + at);
      }
      if (f_.hunyuan) continue;
      const bool rotate = (f_.arch != "cohere2" && !f_.llama4) || layer % 4 != 3;
      if (rotate) Rotate(&x[at], pos, f_.gemma && f_.window > 0 && layer % 6 != 5);
      if (f_.llama4 && rotate) {
        const Row head =
            Norm(Row(x.begin() + at, x.begin() + at + f_.head_dim), Row(f_.head_dim, 1.0));
        std::copy(head.begin(), head.end(), x.begin() + at);
      }
    }
    return x;
  }

  std::array<Row, 3> Qkv(const Row& n) const {
    if (!f_.bailing) return {Linear("attn_q", n), Linear("attn_k", n), Linear("attn_v", n)};
    const Row all = Linear("attn_qkv", n);
    const auto k = all.begin() + f_.heads * f_.head_dim, v = k + f_.kv_heads * f_.head_dim;
    return {Row(all.begin(), k), Row(k, v), Row(v, all.end())};
  }

  void Attention(int layer, Rows& x) const {
    const Row norm = Vector(blk_ + "attn_norm.weight");
    const bool full = f_.window == 0 || (f_.arch == "gpt-oss" && layer % 2 == 1) ||
                      ((f_.arch == "cohere2" || f_.llama4) && layer % 4 == 3) ||
                      (f_.gemma && layer % 6 == 5);
    const double score_dim = f_.gemma && f_.layers == 62 ? f_.dim / f_.heads : f_.head_dim;
    const Row sinks = Has(blk_ + "attn_sinks.weight") ? Vector(blk_ + "attn_sinks.weight") : Row();
    Rows k, v, out;
    for (int pos = 0; pos < static_cast<int>(x.size()); ++pos) {
      const Row n = Norm(x[pos], norm);
      const auto [q_row, k_row, v_row] = Qkv(n);
      Row q = Heads(q_row, layer, pos, "attn_q_norm.weight");
      if (f_.llama4 && layer % 4 == 3) {  // a temperature instead of positions
        for (double& value : q) value *= 1 + 0.1 * std::log((pos + 1) / f_.temperature_length + 1);
      }
      if (f_.mistral) {
        for (double& value : q) value *= 1 + 0.1 * std::log(pos / f_.temperature_length + 1);
      }
      k.push_back(Heads(k_row, layer, pos, "attn_k_norm.weight"));
      v.push_back(v_row);
      Row attended(q.size());
      for (int h = 0; h < f_.heads; ++h) {
        const int64_t at = h / (f_.heads / f_.kv_heads) * f_.head_dim;
        double sum = sinks.empty() ? 0 : std::exp(sinks[h]);
        Row value(f_.head_dim);
        const int seen = f_.llama4 ? pos % f_.window + 1 : f_.window;
        for (int t = full ? 0 : std::max(0, pos - seen + 1); t <= pos; ++t) {
          double dot = 0;
          for (int d = 0; d < f_.head_dim; ++d) dot += q[h * f_.head_dim + d] * k[t][at + d];
          const double weight = std::exp(dot / std::sqrt(score_dim));
          sum += weight;
          for (int d = 0; d < f_.head_dim; ++d) value[d] += weight * v[t][at + d];
        }
        for (int d = 0; d < f_.head_dim; ++d) attended[h * f_.head_dim + d] = value[d] / sum;
      }
      const Row o = Linear("attn_output", attended);
      out.push_back(Sandwiched() ? Norm(o, Vector(blk_ + "post_attention_norm.weight")) : o);
    }
    for (size_t i = 0; i < x.size(); ++i) Add(x[i], out[i]);
  }

  Row Gated(const Row& gate, const Row& up) const {
    Row y;
    for (size_t i = 0; i < gate.size(); ++i) {
      const bool clamped = f_.arch == "gpt-oss";
      if (f_.gemma) {
        const double inner = std::sqrt(2 / M_PI) * (gate[i] + 0.044715 * std::pow(gate[i], 3));
        y.push_back(gate[i] * (1 + std::tanh(inner)) / 2 * up[i]);
        continue;
      }
      const double g = clamped ? std::min(gate[i], 7.0) : gate[i];
      const double u = clamped ? std::clamp(up[i], -7.0, 7.0) + 1 : up[i];
      y.push_back(g / (1 + std::exp(-(clamped ? 1.702 : 1) * g)) * u);
    }
    return y;
  }
  Row Mlp(const Row& n, const std::string& suffix) const {
    if (f_.arch == "glm4") {
      const Row both = Linear("ffn_up", n);
      const auto up = both.begin() + static_cast<int64_t>(both.size()) / 2;
      return Linear("ffn_down", Gated(Row(both.begin(), up), Row(up, both.end())));
    }
    return Linear("ffn_down" + suffix,
                  Gated(Linear("ffn_gate" + suffix, n), Linear("ffn_up" + suffix, n)));
  }
  Row OfExpert(const std::string& part, int64_t expert, const Row& x) const {
    const std::string name = blk_ + "ffn_" + part + "_exps";
    Row y = Product(Matrix(name + ".weight", expert), x);
    if (Has(name + ".bias")) Add(y, Matrix(name + ".bias")[expert]);
    return y;
  }
  // The router scales the input of its one expert.
  Row MoeOfLlama4(const Row& n) const {
    const Row logits = Linear("ffn_gate_inp", n);
    const int64_t e = std::max_element(logits.begin(), logits.end()) - logits.begin();
    Row input = n;
    for (double& value : input) value /= 1 + std::exp(-logits[e]);
    Row out = OfExpert("down", e, Gated(OfExpert("gate", e, input), OfExpert("up", e, input)));
    Add(out, Mlp(n, "_shexp"));
    return out;
  }
  // DeepSeek-V3: experts of other groups than those whose two best sum to the most are out.
  void KeepBestGroups(Row& score) const {
    const int size = f_.experts / f_.groups;
    std::vector<std::pair<double, int>> sums;
    for (int g = 0; g < f_.groups; ++g) {
      Row of(score.begin() + g * size, score.begin() + (g + 1) * size);
      std::sort(of.rbegin(), of.rend());
      sums.push_back({of[0] + of[1], g});
    }
    std::sort(sums.rbegin(), sums.rend());
    for (int i = f_.groups_used; i < f_.groups; ++i) {
      std::fill_n(score.begin() + sums[i].second * size, size, -1e9);
    }
  }
  Row Moe(const Row& n) const {
    if (f_.llama4) return MoeOfLlama4(n);
    Row weight = Linear("ffn_gate_inp", n);
    const bool sigmoid = f_.glm || f_.minimax || f_.dots || f_.bailing;
    for (double& w : weight) w = sigmoid ? 1 / (1 + std::exp(-w)) : std::exp(w);
    Row score = weight;
    if (sigmoid) Add(score, Vector(blk_ + "exp_probs_b.bias"));
    if (f_.groups > 1) KeepBestGroups(score);
    std::vector<int> order(f_.experts);
    for (int e = 0; e < f_.experts; ++e) order[e] = e;
    std::sort(order.begin(), order.end(), [&](int a, int b) { return score[a] > score[b]; });
    double sum = 0;
    for (int i = 0; i < f_.used; ++i) sum += weight[order[i]];
    Row out = Has(blk_ + "ffn_up_shexp.weight") ? Mlp(n, "_shexp") : Row(f_.dim);
    for (int i = 0; i < f_.used; ++i) {
      const int e = order[i];
      Row y = OfExpert("down", e, Gated(OfExpert("gate", e, n), OfExpert("up", e, n)));
      for (double& value : y)
        value *= weight[e] / sum * (f_.glm || f_.dots || f_.bailing ? 1.5 : 1);
      Add(out, y);
    }
    return out;
  }

  const Checkpoint& c_;
  Facts f_;
  Row factors_;  // of the rotation; empty: none
  std::string blk_;
};

TinyModel Small(const std::string& architecture) {
  TinyModel m;
  m.architecture = architecture;
  m.layers = 4;
  m.dim = 96;
  m.heads = 6;
  m.kv_heads = 2;
  m.head_dim = 32;
  m.ffn = 64;
  m.vocab = 300;
  return m;
}

std::vector<TinyModel> Models() {
  std::vector<TinyModel> models = {
      Small("llama"),       Small("qwen2"),    Small("qwen3"),      Small("qwen3moe"),
      Small("gpt-oss"),     Small("glm4moe"),  Small("glm4moe"),    Small("command-r"),
      Small("command-r"),   Small("cohere2"),  Small("minimax-m2"), Small("llama4"),
      Small("llama4"),      Small("mistral3"), Small("seed_oss"),   Small("dots1"),
      Small("hunyuan-moe"), Small("qwen3vl"),  Small("qwen3vlmoe"), Small("bailingmoe2"),
      Small("gemma3"),      Small("gemma3"),   Small("glm4")};
  models[0].window = 11;
  models[1].rope_scaling = "yarn";
  models[3].experts = 6;
  models[4].experts = 8;
  models[4].experts_used = 4;
  models[4].window = 11;
  models[4].rope_scaling = "yarn";
  models[5].experts = models[6].experts = 6;
  models[6].shared_experts = 2;
  models[6].head_norms = true;
  models[6].dense_layers = 0;
  models[8].head_norms = true;
  models[9].layers = 8;
  models[9].window = 11;
  models[10].experts = 6;
  for (int i : {11, 12}) {
    models[i].experts = 6;
    models[i].experts_used = 1;
    models[i].layers = 8;
    models[i].window = 11;
  }
  models[13].rope_scaling = "yarn";
  for (int i : {15, 16, 18}) models[i].experts = 6;
  models[19].experts = 12;
  models[19].experts_used = 3;
  models[19].expert_groups = 4;
  models[19].expert_groups_used = 2;
  models[20].window = models[21].window = 11;
  models[20].layers = 7;
  models[20].rope_scaling = "linear";
  models[21].layers = 62;
  models[21].heads = 4;
  models[15].kv_heads = models[15].heads;  // as dots.llm1
  models[12].moe_step = 1;
  models[12].rope_factors = true;
  return models;
}

class ReferenceTest : public testing::TestWithParam<TinyModel> {
 protected:
  void SetUp() override {
    const int fd = mkstemp(path_);
    close(fd);
    TinyModelGguf(GetParam()).WriteTo(path_);
  }
  void TearDown() override { std::remove(path_); }
  char path_[32] = "/tmp/shoal_reference_XXXXXX";
};

TEST_P(ReferenceTest, LogitsAreThoseOfThePaper) {
  const auto checkpoint = *OpenCheckpoint(path_);
  const auto config = ReadModelConfig(*checkpoint);
  ASSERT_TRUE(config.ok()) << config.status();
  EngineOptions options;
  options.kv_type = KvType::kF32;
  options.sequences = 1;
  options.rows = 16;
  options.cpu.threads = 1;
  options.cpu.pin = false;
  options = *ResolveOptions(*config, options);
  const auto world = MakeInProcessCommunicators(1);
  auto rank = Rank::Create(*world[0], *checkpoint, *config, options, nullptr);
  ASSERT_TRUE(rank.ok()) << rank.status();
  Engine engine(*std::move(rank), options);
  std::vector<int32_t> tokens;
  for (int i = 0; i < 40; ++i) tokens.push_back((i * 37 + 11) % config->vocab);
  const auto scores = engine.ScoreText(tokens, 1, /*want_logits=*/true);
  ASSERT_TRUE(scores.ok()) << scores.status();
  const Rows expected = Reference(*checkpoint, GetParam()).Logits(tokens);
  double difference = 0, norm = 0;
  for (size_t i = 0; i < scores->size(); ++i) {
    for (int j = 0; j < config->vocab; ++j) {
      difference += std::pow((*scores)[i].logits[j] - expected[i][j], 2);
      norm += expected[i][j] * expected[i][j];
    }
  }
  // f32 through four layers: some hundred roundings of 2^-24 of the logits' size.
  EXPECT_LT(difference, 1e-10 * norm);
}

INSTANTIATE_TEST_SUITE_P(Models, ReferenceTest, testing::ValuesIn(Models()), [](const auto& info) {
  std::string name = info.param.architecture;
  std::replace(name.begin(), name.end(), '-', '_');
  return name + std::to_string(info.index);
});

}  // namespace
}  // namespace shoal
