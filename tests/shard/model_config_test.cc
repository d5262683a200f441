// What ReadModelConfig makes of metadata and tensors, and what it refuses.
#include "shard/model_config.h"

#include <cmath>
#include <functional>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "shard/gguf.h"
#include "tests/shard/gguf_writer.h"

namespace shoal {
namespace {

using ::testing::HasSubstr;

absl::StatusOr<ModelConfig> ConfigOf(const GgufWriter& w) {
  const std::string bytes = w.Bytes();
  std::vector<std::unique_ptr<ByteSource>> parts;
  parts.push_back(MakeMemorySource(
      "test.gguf",
      absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size())));
  auto c = OpenGguf(std::move(parts));
  if (!c.ok()) return c.status();
  return ReadModelConfig(**c);
}

TinyModel Small(const std::string& architecture) {
  TinyModel m;
  m.architecture = architecture;
  m.dim = 64;
  m.heads = 4;
  m.kv_heads = 2;
  m.head_dim = 32;  // heads * head_dim = 128, not dim
  m.ffn = 96;
  m.vocab = 48;
  return m;
}

void ExpectRefused(const GgufWriter& w, absl::StatusCode code, const std::string& text) {
  const absl::Status s = ConfigOf(w).status();
  EXPECT_EQ(s.code(), code) << s;
  EXPECT_THAT(std::string(s.message()), HasSubstr(text));
}

TEST(ModelConfig, EveryArchitecture) {
  for (const char* name : {"llama", "qwen2", "qwen3", "qwen3moe", "gpt-oss", "glm4moe", "command-r",
                           "cohere2", "minimax-m2"}) {
    TinyModel m = Small(name);
    const bool gpt_oss = m.architecture == "gpt-oss";
    const bool glm = m.architecture == "glm4moe";
    const bool minimax = m.architecture == "minimax-m2";
    if (m.architecture == "qwen3moe" || gpt_oss || glm || minimax) m.experts = 4;
    const bool cohere = m.architecture == "command-r" || m.architecture == "cohere2";
    if (gpt_oss || m.architecture == "cohere2") m.window = 16;
    const auto c = ConfigOf(TinyModelGguf(m));
    ASSERT_TRUE(c.ok()) << name << ": " << c.status();
    EXPECT_EQ(c->architecture, name);
    EXPECT_EQ(c->layers, 2);
    EXPECT_EQ(c->dim, 64);
    EXPECT_EQ(c->heads, 4);
    EXPECT_EQ(c->kv_heads, 2);
    EXPECT_EQ(c->head_dim, 32);
    EXPECT_EQ(c->ffn, 96);
    EXPECT_EQ(c->vocab, 48);
    EXPECT_EQ(c->context, 256);
    EXPECT_EQ(c->rotary_dim, glm || minimax ? 16 : 32);
    EXPECT_EQ(c->rope_neox, m.architecture != "llama" && !cohere);
    EXPECT_EQ(c->experts, m.experts);
    EXPECT_EQ(c->experts_used, m.experts > 0 ? 2 : 0);
    EXPECT_FLOAT_EQ(c->norm_eps, 1e-5f);
    EXPECT_EQ(c->tied_embeddings, cohere);
    EXPECT_EQ(c->parallel_ffn, cohere);
    EXPECT_EQ(c->norm, cohere ? NormKind::kLayer : NormKind::kRms);
    EXPECT_FLOAT_EQ(c->logit_scale, cohere ? 0.25f : 1);
    EXPECT_EQ(c->window, m.window);
    EXPECT_EQ(c->window_of(0), m.window);
    EXPECT_EQ(c->window_of(1), gpt_oss ? 0 : m.window);
    EXPECT_EQ(c->activation, gpt_oss ? Activation::kClampedSwiGlu : Activation::kSwiGlu);
    EXPECT_EQ(c->rope_scaling.kind, RopeScaling::Kind::kNone);
    EXPECT_TRUE(c->rope_factors.empty());
  }
}

TEST(ModelConfig, MixtralStackedAndSeparate) {
  for (const bool separate : {false, true}) {
    TinyModel m = Small("llama");
    m.experts = 4;
    m.separate_experts = separate;
    const auto c = ConfigOf(TinyModelGguf(m));
    ASSERT_TRUE(c.ok()) << c.status();
    EXPECT_EQ(c->experts, 4);
    EXPECT_EQ(c->experts_used, 2);
    EXPECT_TRUE(c->renormalize_experts);
  }
}

TEST(ModelConfig, WindowTiedAndRopeFactors) {
  TinyModel m = Small("llama");
  m.window = 17;
  m.tied = true;
  m.rope_factors = true;
  m.attention_biases = true;
  const auto c = ConfigOf(TinyModelGguf(m));
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_EQ(c->window, 17);
  EXPECT_TRUE(c->tied_embeddings);
  ASSERT_EQ(c->rope_factors.size(), 16u);
  EXPECT_FLOAT_EQ(c->rope_factors[0], 1.0f);
  EXPECT_FLOAT_EQ(c->rope_factors[8], 4.5f);
}

TEST(ModelConfig, DenseLayersSharedExpertsAndDrafts) {
  TinyModel m = Small("glm4moe");
  m.layers = 3;
  m.experts = 4;
  m.shared_experts = 2;
  m.draft_layers = 2;
  const GgufWriter good = TinyModelGguf(m);
  const auto c = ConfigOf(good);
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_EQ(c->layers, 3);
  EXPECT_EQ(c->unused_layers, 2);
  EXPECT_EQ(c->dense_layers, 1);
  EXPECT_EQ(c->dense_ffn, 256);
  EXPECT_EQ(c->shared_ffn, 192);
  EXPECT_FALSE(c->has_experts(0));
  EXPECT_TRUE(c->has_experts(1));
  EXPECT_EQ(c->ffn_of(0), 256);
  EXPECT_EQ(c->ffn_of(1), 96);
  EXPECT_TRUE(c->sigmoid_router);
  EXPECT_FLOAT_EQ(c->expert_scale, 1.5f);
  for (const char* name :
       {"blk.1.exp_probs_b.bias", "blk.2.ffn_up_shexp.weight", "blk.0.ffn_gate.weight"}) {
    GgufWriter w = good;
    std::erase_if(w.entries, [&](const GgufWriter::Entry& e) { return e.name == name; });
    ExpectRefused(w, absl::StatusCode::kInvalidArgument,
                  "tensor '" + std::string(name) + "' is missing");
  }
  m.draft_layers = 0;
  GgufWriter w = TinyModelGguf(m);
  w.U32("glm4moe.expert_group_count", 4);
  ExpectRefused(w, absl::StatusCode::kInvalidArgument,
                "expert_group_count is 4 for 4 experts, expected equal groups of 2 or more");
  w = TinyModelGguf(m);
  w.I32s("glm4moe.rope.dimension_sections", {0, 0, 0, 0});
  EXPECT_TRUE(ConfigOf(w).ok());
  w = TinyModelGguf(m);
  w.I32s("glm4moe.rope.dimension_sections", {8, 12, 12, 0});
  ExpectRefused(w, absl::StatusCode::kUnimplemented, "(rope.dimension_sections) are not known");
  m.architecture = "gpt-oss";
  m.window = 16;
  w = TinyModelGguf(m);
  w.U32("gpt-oss.expert_shared_count", 1);
  ExpectRefused(w, absl::StatusCode::kUnimplemented, "gpt-oss with shared experts is not known");
  m.architecture = "qwen3moe";
  w = TinyModelGguf(m);
  w.U32("qwen3moe.expert_gating_func", 2);
  ExpectRefused(w, absl::StatusCode::kUnimplemented, "with the expert gating 2 is not known");
}

TEST(ModelConfig, WindowsOfSomeLayers) {
  TinyModel m = Small("llama");
  m.window = 17;
  EXPECT_EQ(ConfigOf(TinyModelGguf(m))->window_of(1), 17);
  m = Small("gpt-oss");
  m.experts = 4;
  m.layers = 6;
  ExpectRefused(TinyModelGguf(m), absl::StatusCode::kInvalidArgument,
                "'gpt-oss.attention.sliding_window' is missing");
  m.window = 16;
  m.rope_scaling = "yarn";
  GgufWriter w = TinyModelGguf(m);
  auto c = ConfigOf(w);
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_EQ(c->window_of(4), 16);
  EXPECT_EQ(c->window_of(5), 0);
  EXPECT_FALSE(c->rope_scaling.whole_bounds);
  EXPECT_EQ(c->seen_of(0, 6, 100), (100 + 16) / 2.0);
  EXPECT_EQ(c->seen_of(1, 2, 100), 100);
  EXPECT_EQ(c->seen_of(0, 6, 10), 10);
  w.U32("gpt-oss.attention.sliding_window_pattern", 3);
  c = ConfigOf(w);
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_EQ(c->window_of(4), 16);
  EXPECT_EQ(c->window_of(5), 0);
  EXPECT_EQ(c->window_of(3), 16);
}

TEST(ModelConfig, WindowsLayerByLayer) {
  TinyModel m = Small("cohere2");
  m.layers = 5;
  m.window = 16;
  const auto c = ConfigOf(TinyModelGguf(m));
  ASSERT_TRUE(c.ok()) << c.status();
  for (int layer = 0; layer < 5; ++layer) {
    EXPECT_EQ(c->window_of(layer), layer == 3 ? 0 : 16);
    EXPECT_EQ(c->rotates(layer), layer != 3);
  }
  constexpr const char* kKey = "cohere2.attention.sliding_window_pattern";
  GgufWriter listed = TinyModelGguf(m);
  listed.Array(kKey, 7, 5, std::string("\1\0\0\1\1", 5));  // booleans
  GgufWriter numbers = TinyModelGguf(m);
  numbers.I32s(kKey, {1, 0, 0, 1, 1});
  for (const GgufWriter* w : {&listed, &numbers}) {
    const auto each = ConfigOf(*w);
    ASSERT_TRUE(each.ok()) << each.status();
    for (int layer = 0; layer < 5; ++layer) {
      const bool full = layer == 1 || layer == 2;
      EXPECT_EQ(each->window_of(layer), full ? 0 : 16) << layer;
      EXPECT_EQ(each->rotates(layer), !full) << layer;
    }
  }
  GgufWriter w = TinyModelGguf(m);
  w.I32s(kKey, {1, 0, 0, 1});
  ExpectRefused(w, absl::StatusCode::kInvalidArgument, "has 4 entries for 5 layers");
  w = TinyModelGguf(m);
  w.I32s(kKey, {});
  ExpectRefused(w, absl::StatusCode::kInvalidArgument, "is an empty array");
  m = Small("llama");
  m.window = 16;
  w = TinyModelGguf(m);
  w.I32s("llama.attention.sliding_window_pattern", {1, 0});
  ExpectRefused(w, absl::StatusCode::kUnimplemented,
                "llama with windows in some layers only is not known");
}

TEST(ModelConfig, NormsOfWholeRows) {
  TinyModel m = Small("minimax-m2");
  m.experts = 4;
  GgufWriter w = TinyModelGguf(m);
  w.F32("minimax-m2.expert_weights_scale", 2.5f);
  const auto c = ConfigOf(w);
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_EQ(c->qk_norm, QkNorm::kRowRms);
  EXPECT_EQ(c->rotary_dim, 16);
  EXPECT_TRUE(c->sigmoid_router);
  EXPECT_TRUE(c->renormalize_experts);
  EXPECT_FLOAT_EQ(c->expert_scale, 2.5f);
  for (const char* name : {"blk.0.attn_q_norm.weight", "blk.1.exp_probs_b.bias"}) {
    w = TinyModelGguf(m);
    std::erase_if(w.entries, [&](const GgufWriter::Entry& e) { return e.name == name; });
    ExpectRefused(w, absl::StatusCode::kInvalidArgument,
                  "tensor '" + std::string(name) + "' is missing");
  }
}

TEST(ModelConfig, ChunksTemperatureAndExpertsInSomeLayers) {
  TinyModel m = Small("llama4");
  m.layers = 6;
  m.experts = 4;
  m.experts_used = 1;
  const GgufWriter good = TinyModelGguf(m);
  auto c = ConfigOf(good);
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_FALSE(c->rope_neox);
  EXPECT_TRUE(c->chunked);
  EXPECT_TRUE(c->weigh_expert_input);
  EXPECT_TRUE(c->sigmoid_router);
  EXPECT_FALSE(c->renormalize_experts);
  EXPECT_EQ(c->qk_norm, QkNorm::kPlain);
  EXPECT_EQ(c->window_of(0), 8192);
  EXPECT_EQ(c->window_of(3), 0);
  EXPECT_TRUE(c->rotates(2));
  EXPECT_FALSE(c->rotates(3));
  EXPECT_EQ(c->seen_of(0, 1, 100000), 4096);
  EXPECT_EQ(c->seen_of(0, 1, 100), 100);
  EXPECT_EQ(c->temperature_length, 20);
  EXPECT_FLOAT_EQ(c->temperature_scale, 0.1f);
  EXPECT_EQ(c->shared_ffn, 96);
  for (int layer = 0; layer < 6; ++layer) {
    EXPECT_EQ(c->has_experts(layer), layer % 2 == 1);
    EXPECT_EQ(c->ffn_of(layer), layer % 2 == 1 ? 96 : 256);
  }
  GgufWriter w = good;
  w.U32("llama4.attention.sliding_window", 0);
  ExpectRefused(w, absl::StatusCode::kUnimplemented, "without chunks of attention");
  m.moe_step = 1;
  m.experts = 128;
  m.ffn = 32;
  c = ConfigOf(TinyModelGguf(m));
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_EQ(c->qk_norm, QkNorm::kHeadRms);
  EXPECT_EQ(c->dense_ffn, 0);
  m.experts_used = 2;
  ExpectRefused(TinyModelGguf(m), absl::StatusCode::kUnimplemented,
                "llama4 with 2 experts for a token is not known");
}

TEST(ModelConfig, TemperatureInAllLayersAndYarnsMultiplier) {
  TinyModel m = Small("mistral3");
  m.rope_scaling = "yarn";
  auto c = ConfigOf(TinyModelGguf(m));
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_EQ(c->temperature_length, 20);
  EXPECT_EQ(c->temperature_offset, 0);
  EXPECT_TRUE(c->has_temperature(0));
  EXPECT_TRUE(c->rotates(0));
  EXPECT_FLOAT_EQ(c->rope_scaling.attn_factor, static_cast<float>(1 / (1 + 0.05 * std::log(4.0))));
  m.temperature_scale = 0;
  c = ConfigOf(TinyModelGguf(m));
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_FALSE(c->has_temperature(0));
  m.temperature_scale = -1;
  ExpectRefused(TinyModelGguf(m), absl::StatusCode::kInvalidArgument,
                "is -1, expected no negative number");
  m.temperature_scale = 0.1f;
  m.rope_scaling = "";
  ExpectRefused(TinyModelGguf(m), absl::StatusCode::kInvalidArgument,
                "temperature_scale needs rope.scaling.original_context_length");
}

TEST(ModelConfig, ExpertsOfDotsAndHunyuan) {
  TinyModel m = Small("dots1");
  m.experts = 4;
  m.kv_heads = m.heads;
  GgufWriter w = TinyModelGguf(m);
  std::erase_if(w.entries,
                [](const GgufWriter::Entry& e) { return e.name == "blk.1.exp_probs_b.bias"; });
  auto c = ConfigOf(w);
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_TRUE(c->sigmoid_router);
  EXPECT_FALSE(c->has_experts(0));
  EXPECT_EQ(c->ffn_of(0), 256);
  EXPECT_EQ(c->shared_ffn, 96);
  m.architecture = "hunyuan-moe";
  c = ConfigOf(TinyModelGguf(m));
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_EQ(c->qk_norm, QkNorm::kHeadRmsBehind);
  EXPECT_EQ(c->shared_ffn, 256);
  EXPECT_TRUE(c->renormalize_experts);
  EXPECT_FALSE(c->sigmoid_router);
}

TEST(ModelConfig, ExpertsInGroups) {
  TinyModel m = Small("bailingmoe2");
  m.experts = 8;
  m.experts_used = 3;
  m.expert_groups = 4;
  m.expert_groups_used = 2;
  auto c = ConfigOf(TinyModelGguf(m));
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_EQ(c->expert_groups, 4);
  EXPECT_EQ(c->expert_groups_used, 2);
  EXPECT_EQ(c->unused_layers, 1);
  EXPECT_EQ(c->shared_ffn, m.ffn);
  EXPECT_EQ(c->rotary_dim, m.head_dim / 2);
  m.expert_groups_used = 1;  // two experts for three
  ExpectRefused(TinyModelGguf(m), absl::StatusCode::kInvalidArgument,
                "expert_group_used_count' is 1, expected an integer from 2 to 4");
  m.expert_groups = 3;
  ExpectRefused(TinyModelGguf(m), absl::StatusCode::kInvalidArgument,
                "expert_group_count is 3 for 8 experts");
}

TEST(ModelConfig, GemmaHasTwoRotations) {
  TinyModel m = Small("gemma3");
  m.layers = 7;
  m.window = 24;
  m.rope_scaling = "linear";
  auto c = ConfigOf(TinyModelGguf(m));
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_EQ(c->activation, Activation::kGeGlu);
  EXPECT_EQ(c->window_of(4), 24);
  EXPECT_EQ(c->window_of(5), 0);
  EXPECT_EQ(c->rope_base, 50000);
  EXPECT_EQ(c->window_rope_base, 10000);
  EXPECT_EQ(c->embedding_scale, std::sqrt(static_cast<float>(m.dim)));
  EXPECT_EQ(c->score_dim(), m.head_dim);
  m.layers = 62;
  m.window = 0;
  GgufWriter w = TinyModelGguf(m);
  w.F32("gemma3.rope.freq_base_swa", 20000);
  c = ConfigOf(w);
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_EQ(c->score_dim(), m.dim / m.heads);
  EXPECT_EQ(c->window_of(0), 0);
  EXPECT_EQ(c->window_rope_base, 0);
  w.F32("gemma3.final_logit_softcapping", 30);
  ExpectRefused(w, absl::StatusCode::kUnimplemented, "capped logits");
}

TEST(ModelConfig, GateAndUpInOneTensor) {
  TinyModel m = Small("glm4");
  GgufWriter w = TinyModelGguf(m);
  const auto c = ConfigOf(w);
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_EQ(c->rotary_dim, m.head_dim / 2);
  for (GgufWriter::Entry& e : w.entries) {
    if (e.name == "blk.1.ffn_up.weight") e.dims[1] -= 32;
  }
  ExpectRefused(w, absl::StatusCode::kInvalidArgument,
                "tensor 'blk.1.ffn_up.weight' has the shape");
}

TEST(ModelConfig, TextHasOnePositionOnAllAxes) {
  for (const char* architecture : {"qwen3vl", "qwen3vlmoe"}) {
    TinyModel m = Small(architecture);
    m.experts = m.architecture == "qwen3vlmoe" ? 4 : 0;
    const auto c = ConfigOf(TinyModelGguf(m));
    ASSERT_TRUE(c.ok()) << c.status();
    EXPECT_TRUE(c->rope_neox);
  }
}

TEST(ModelConfig, NormsOfEachHead) {
  TinyModel m = Small("command-r");
  m.head_norms = true;
  const auto c = ConfigOf(TinyModelGguf(m));
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_EQ(c->qk_norm, QkNorm::kHeadLayer);
  GgufWriter w = TinyModelGguf(m);
  for (GgufWriter::Entry& e : w.entries) {
    if (e.name == "blk.1.attn_k_norm.weight") e.dims = {32};
  }
  ExpectRefused(w, absl::StatusCode::kInvalidArgument,
                "'blk.1.attn_k_norm.weight' has the shape [32], the metadata says [32, 2]");
  m.head_norms = false;
  m.layers = 64;  // Command R+
  ExpectRefused(TinyModelGguf(m), absl::StatusCode::kInvalidArgument,
                "tensor 'blk.0.attn_q_norm.weight' is missing");
}

TEST(ModelConfig, RopeScaling) {
  TinyModel m = Small("llama");
  m.rope_scaling = "linear";
  auto c = ConfigOf(TinyModelGguf(m));
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_EQ(c->rope_scaling.kind, RopeScaling::Kind::kLinear);
  EXPECT_FLOAT_EQ(c->rope_scaling.factor, 4);
  m.rope_scaling = "yarn";
  GgufWriter w = TinyModelGguf(m);
  w.F32("llama.rope.scaling.attn_factor", 0.5f);
  w.F32("llama.rope.scaling.yarn_beta_fast", 24);
  c = ConfigOf(w);
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_EQ(c->rope_scaling.kind, RopeScaling::Kind::kYarn);
  EXPECT_EQ(c->rope_scaling.original_context, 256);
  EXPECT_FLOAT_EQ(c->rope_scaling.attn_factor, 0.5f);
  EXPECT_FLOAT_EQ(c->rope_scaling.beta_fast, 24);
  EXPECT_FLOAT_EQ(c->rope_scaling.beta_slow, 1);
  m.rope_scaling = "longrope";
  ExpectRefused(TinyModelGguf(m), absl::StatusCode::kUnimplemented,
                "'longrope' is not known; known are: none, linear, yarn");
  m.rope_scaling = "";
  w = TinyModelGguf(m);
  w.F32("llama.rope.scale_linear", 2);  // the old key, without a type
  c = ConfigOf(w);
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_EQ(c->rope_scaling.kind, RopeScaling::Kind::kLinear);
  EXPECT_FLOAT_EQ(c->rope_scaling.factor, 2);
}

TEST(ModelConfigBadInput, UnknownArchitectureIsNamedWithWhatIsKnown) {
  ExpectRefused(TinyModelGguf(Small("mamba")), absl::StatusCode::kUnimplemented,
                "'mamba' is not known; known are: llama, qwen2, qwen3, qwen3moe, gpt-oss, "
                "glm4moe");
  TinyModel m = Small("qwen2");
  m.experts = 4;
  ExpectRefused(TinyModelGguf(m), absl::StatusCode::kUnimplemented, "qwen2 with 4 experts");
}

TEST(ModelConfigBadInput, MissingTensor) {
  const GgufWriter good = TinyModelGguf(Small("qwen2"));
  for (const char* name : {"token_embd.weight", "output_norm.weight", "blk.1.attn_k.bias",
                           "blk.0.ffn_down.weight", "blk.1.attn_norm.weight"}) {
    GgufWriter w = good;
    std::erase_if(w.entries, [&](const GgufWriter::Entry& e) { return e.name == name; });
    ASSERT_LT(w.entries.size(), good.entries.size());
    ExpectRefused(w, absl::StatusCode::kInvalidArgument,
                  "tensor '" + std::string(name) + "' is missing");
  }
  TinyModel m = Small("qwen3moe");
  m.experts = 4;
  GgufWriter w = TinyModelGguf(m);
  std::erase_if(w.entries,
                [&](const GgufWriter::Entry& e) { return e.name == "blk.1.ffn_up_exps.weight"; });
  ExpectRefused(w, absl::StatusCode::kInvalidArgument, "blk.1.ffn_up_exps.weight");
  m.architecture = "gpt-oss";
  m.window = 16;
  for (const char* name : {"blk.0.attn_sinks.weight", "blk.1.attn_output.bias",
                           "blk.0.ffn_gate_inp.bias", "blk.1.ffn_down_exps.bias"}) {
    w = TinyModelGguf(m);
    std::erase_if(w.entries, [&](const GgufWriter::Entry& e) { return e.name == name; });
    ExpectRefused(w, absl::StatusCode::kInvalidArgument,
                  "tensor '" + std::string(name) + "' is missing");
  }
  w = TinyModelGguf(m);
  for (GgufWriter::Entry& e : w.entries) {
    if (e.name == "blk.0.ffn_up_exps.bias") std::swap(e.dims[0], e.dims[1]);
  }
  ExpectRefused(w, absl::StatusCode::kInvalidArgument,
                "'blk.0.ffn_up_exps.bias' has the shape [4, 96], the metadata says [96, 4]");
}

TEST(ModelConfigBadInput, ShapeThatContradictsTheMetadata) {
  GgufWriter w = TinyModelGguf(Small("llama"));
  for (GgufWriter::Entry& e : w.entries) {
    if (e.name == "blk.1.attn_v.weight") e.dims = {32, 128};
  }
  ExpectRefused(w, absl::StatusCode::kInvalidArgument,
                "'blk.1.attn_v.weight' has the shape [32, 128], the metadata says [64, 64]");
}

TEST(ModelConfigBadInput, TensorThatTheGraphDoesNotHave) {
  GgufWriter w = TinyModelGguf(Small("llama"));
  w.Tensor("blk.0.attn_sinks.weight", DType::kF32, {4}, std::string(16, '\0'));
  ExpectRefused(w, absl::StatusCode::kUnimplemented, "'blk.0.attn_sinks.weight' is no part");
}

TEST(ModelConfigBadInput, RopeFactorsMustBePositive) {
  GgufWriter w = TinyModelGguf(Small("llama"));
  w.Tensor("rope_freqs.weight", DType::kF32, {16}, std::string(64, '\0'));
  ExpectRefused(w, absl::StatusCode::kInvalidArgument, "positive divisors");
}

// Each of these numbers alone makes the file wrong; the message names the key or the contradiction.
TEST(ModelConfigBadInput, NumbersOutOfRange) {
  const auto spoiled = [](const std::string& key, uint32_t value) {
    const std::string good = TinyModelGguf(Small("llama")).Bytes();
    const std::string needle = GgufWriter::Text("llama." + key) + GgufWriter::Pod(uint32_t{4});
    std::string bytes = good;
    const size_t at = bytes.find(needle);
    EXPECT_NE(at, std::string::npos) << key;
    bytes.replace(at + needle.size(), 4, GgufWriter::Pod(value));
    return bytes;
  };
  const auto refused = [&](const std::string& key, uint32_t value, const std::string& text) {
    const std::string bytes = spoiled(key, value);
    std::vector<std::unique_ptr<ByteSource>> parts;
    parts.push_back(MakeMemorySource(
        "test.gguf",
        absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size())));
    const auto c = OpenGguf(std::move(parts));
    ASSERT_TRUE(c.ok()) << c.status();
    const absl::Status s = ReadModelConfig(**c).status();
    EXPECT_EQ(s.code(), absl::StatusCode::kInvalidArgument) << key << ": " << s;
    EXPECT_THAT(std::string(s.message()), HasSubstr(text));
  };
  refused("block_count", 0, "block_count' is 0, expected an integer from 1");
  refused("block_count", 3, "'blk.2.attn_norm.weight' is missing");
  refused("block_count", UINT32_MAX, "block_count");
  refused("embedding_length", UINT32_MAX, "embedding_length");
  refused("embedding_length", 32, "token_embd.weight");
  refused("attention.head_count", 0, "head_count");
  refused("attention.head_count", 3, "no multiple of attention.head_count_kv");
  refused("attention.head_count", 8, "attn_q.weight");
  refused("attention.head_count_kv", 0, "head_count_kv");
  refused("attention.head_count_kv", 4, "attn_k.weight");
  refused("attention.key_length", 31, "even");
  refused("attention.key_length", 514, "from 2 to 512");
  refused("attention.value_length", 0, "value_length");
  refused("rope.dimension_count", 34, "rope.dimension_count");
  refused("rope.dimension_count", 3, "even");
  refused("feed_forward_length", 0, "feed_forward_length");
  refused("feed_forward_length", 64, "ffn_gate.weight");
  refused("context_length", 0, "context_length");
  refused("vocab_size", 47, "vocab_size is 47, but token_embd.weight has 48 rows");
}

TEST(ModelConfigBadInput, TokensMustMatchTheEmbedding) {
  TinyModel m = Small("llama");
  GgufWriter w = TinyModelGguf(m);
  for (GgufWriter::Entry& e : w.entries) {
    if (e.name == "token_embd.weight" || e.name == "output.weight") e.dims[1] = 40;
  }
  // vocab_size says 48 as well; either way the message names the embedding.
  ExpectRefused(w, absl::StatusCode::kInvalidArgument, "token_embd.weight has 40 rows");
}

}  // namespace
}  // namespace shoal
