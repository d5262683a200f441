// The model against the papers: logits of tiny random models beside a forward pass in double that
// shares nothing with the kernels but the reading of tensors.
#include <unistd.h>

#include <algorithm>
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
  bool neox, yarn = false, glm = false;
  int dense = 0;
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
    f_.neox = m.architecture != "llama";
    f_.glm = m.architecture == "glm4moe";
    if (f_.glm) f_.rotary = m.head_dim / 2;
    f_.dense = f_.glm ? m.dense_layers : 0;
    f_.yarn = m.rope_scaling == "yarn";
    f_.factor = m.rope_scaling_factor;
    f_.original = m.context;
  }

  // Logits of every position.
  Rows Logits(const std::vector<int32_t>& tokens) {
    const Rows table = Matrix("token_embd.weight");
    Rows x;
    for (const int32_t t : tokens) x.push_back(table[t]);
    for (int layer = 0; layer < f_.layers; ++layer) {
      blk_ = "blk." + std::to_string(layer) + ".";
      Attention(layer, x);
      const bool renamed = f_.arch == "gpt-oss" || f_.glm, dense = layer < f_.dense;
      const Row norm = Vector(blk_ + (renamed ? "post_attention_norm.weight" : "ffn_norm.weight"));
      for (Row& row : x) {
        const Row n = Norm(row, norm);
        Add(row, f_.experts > 0 && !dense ? Moe(n) : Mlp(n, ""));
      }
    }
    const Row norm = Vector("output_norm.weight");
    const Rows head = Has("output.weight") ? Matrix("output.weight") : table;
    Rows logits;
    for (const Row& row : x) logits.push_back(Product(head, Norm(row, norm)));
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
  static Row Norm(const Row& x, const Row& weight) {
    double squares = 0;
    for (const double v : x) squares += v * v;
    Row y;
    for (size_t i = 0; i < x.size(); ++i) {
      y.push_back(x[i] * weight[i] / std::sqrt(squares / static_cast<double>(x.size()) + 1e-5));
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
  void Rotate(double* x, int pos) const {
    const int half = f_.rotary / 2;
    double magnitude = 1;
    for (int i = 0; i < half; ++i) {
      double frequency = std::pow(f_.base, -2.0 * i / f_.rotary);
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
      }
      double& a = x[f_.neox ? i : 2 * i];
      double& b = x[f_.neox ? i + half : 2 * i + 1];
      const double c = std::cos(pos * frequency), s = std::sin(pos * frequency), a0 = a;
      a = (a0 * c - b * s) * magnitude;
      b = (a0 * s + b * c) * magnitude;
    }
  }
  // Each head of a row: the norm, where there is one, and the rotation.
  Row Heads(Row x, int pos, const char* norm) const {
    for (size_t at = 0; at < x.size(); at += f_.head_dim) {
      if (Has(blk_ + norm)) {
        const Row head(x.begin() + at, x.begin() + at + f_.head_dim);
        const Row normed = Norm(head, Vector(blk_ + norm));
        std::copy(normed.begin(), normed.end(), x.begin() + at);
      }
      Rotate(&x[at], pos);
    }
    return x;
  }

  void Attention(int layer, Rows& x) const {
    const Row norm = Vector(blk_ + "attn_norm.weight");
    const bool full = f_.window == 0 || (f_.arch == "gpt-oss" && layer % 2 == 1);
    const Row sinks = Has(blk_ + "attn_sinks.weight") ? Vector(blk_ + "attn_sinks.weight") : Row();
    Rows k, v, out;
    for (int pos = 0; pos < static_cast<int>(x.size()); ++pos) {
      const Row n = Norm(x[pos], norm);
      const Row q = Heads(Linear("attn_q", n), pos, "attn_q_norm.weight");
      k.push_back(Heads(Linear("attn_k", n), pos, "attn_k_norm.weight"));
      v.push_back(Linear("attn_v", n));
      Row attended(q.size());
      for (int h = 0; h < f_.heads; ++h) {
        const int64_t at = h / (f_.heads / f_.kv_heads) * f_.head_dim;
        double sum = sinks.empty() ? 0 : std::exp(sinks[h]);
        Row value(f_.head_dim);
        for (int t = full ? 0 : std::max(0, pos - f_.window + 1); t <= pos; ++t) {
          double dot = 0;
          for (int d = 0; d < f_.head_dim; ++d) dot += q[h * f_.head_dim + d] * k[t][at + d];
          const double weight = std::exp(dot / std::sqrt(static_cast<double>(f_.head_dim)));
          sum += weight;
          for (int d = 0; d < f_.head_dim; ++d) value[d] += weight * v[t][at + d];
        }
        for (int d = 0; d < f_.head_dim; ++d) attended[h * f_.head_dim + d] = value[d] / sum;
      }
      out.push_back(Linear("attn_output", attended));
    }
    for (size_t i = 0; i < x.size(); ++i) Add(x[i], out[i]);
  }

  Row Gated(const Row& gate, const Row& up) const {
    Row y;
    for (size_t i = 0; i < gate.size(); ++i) {
      const bool clamped = f_.arch == "gpt-oss";
      const double g = clamped ? std::min(gate[i], 7.0) : gate[i];
      const double u = clamped ? std::clamp(up[i], -7.0, 7.0) + 1 : up[i];
      y.push_back(g / (1 + std::exp(-(clamped ? 1.702 : 1) * g)) * u);
    }
    return y;
  }
  Row Mlp(const Row& n, const std::string& suffix) const {
    return Linear("ffn_down" + suffix,
                  Gated(Linear("ffn_gate" + suffix, n), Linear("ffn_up" + suffix, n)));
  }
  Row OfExpert(const std::string& part, int expert, const Row& x) const {
    const std::string name = blk_ + "ffn_" + part + "_exps";
    Row y = Product(Matrix(name + ".weight", expert), x);
    if (Has(name + ".bias")) Add(y, Matrix(name + ".bias")[expert]);
    return y;
  }
  Row Moe(const Row& n) const {
    Row weight = Linear("ffn_gate_inp", n);
    for (double& w : weight) w = f_.glm ? 1 / (1 + std::exp(-w)) : std::exp(w);
    Row score = weight;
    if (f_.glm) Add(score, Vector(blk_ + "exp_probs_b.bias"));
    std::vector<int> order(f_.experts);
    for (int e = 0; e < f_.experts; ++e) order[e] = e;
    std::sort(order.begin(), order.end(), [&](int a, int b) { return score[a] > score[b]; });
    double sum = 0;
    for (int i = 0; i < f_.used; ++i) sum += weight[order[i]];
    Row out = Has(blk_ + "ffn_up_shexp.weight") ? Mlp(n, "_shexp") : Row(f_.dim);
    for (int i = 0; i < f_.used; ++i) {
      const int e = order[i];
      Row y = OfExpert("down", e, Gated(OfExpert("gate", e, n), OfExpert("up", e, n)));
      for (double& value : y) value *= weight[e] / sum * (f_.glm ? 1.5 : 1);
      Add(out, y);
    }
    return out;
  }

  const Checkpoint& c_;
  Facts f_;
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
  std::vector<TinyModel> models = {Small("llama"),    Small("qwen2"),   Small("qwen3"),
                                   Small("qwen3moe"), Small("gpt-oss"), Small("glm4moe"),
                                   Small("glm4moe")};
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
