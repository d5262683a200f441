// Placement does not change the answer: pipeline stages give the same bits, tensor-parallel ranks
// the same greedy tokens and logits within the rounding of a different order of sums, whatever the
// architecture and the type.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <ostream>
#include <string>
#include <thread>
#include <vector>

#include "parallel/engine.h"
#include "tests/shard/gguf_writer.h"

namespace shoal {

void PrintTo(const TinyModel& m, std::ostream* out) { *out << m.architecture; }  // for messages

namespace {

struct Placement {
  int tp = 1;
  int pp = 1;
  std::vector<double> split;
  Wire wire = Wire::kF32;
  int rows = 64;
  KvType kv_type = KvType::kF32;  // f16 would round differently where sums differ
};

struct Answer {
  std::vector<std::vector<float>> logits;  // of every scored position
  std::vector<int32_t> greedy;
};

class TempModel {
 public:
  explicit TempModel(const TinyModel& m) {
    char name[] = "/tmp/shoal_parity_XXXXXX";
    const int fd = mkstemp(name);
    close(fd);
    path_ = name;
    TinyModelGguf(m).WriteTo(path_);
  }
  ~TempModel() { std::remove(path_.c_str()); }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

std::vector<int32_t> Text(int n, int vocab) {
  std::vector<int32_t> t;
  for (int i = 0; i < n; ++i) t.push_back((i * 37 + 11) % vocab);
  return t;
}

// Rank 0's part: scores a text, then a fresh engine would be needed to generate, so `score`
// chooses.
absl::StatusOr<Answer> Ask(Engine& engine, int vocab, bool score) {
  Answer a;
  const std::vector<int32_t> text = Text(90, vocab);
  if (score) {
    auto scores = engine.ScoreText(text, 1, /*want_logits=*/true);
    if (!scores.ok()) return scores.status();
    for (auto& s : *scores) a.logits.push_back(std::move(s.logits));
    return a;
  }
  // Two sequences at once, so that batches mix prefill and decode.
  SequenceRequest r;
  r.tokens = text;
  r.max_tokens = 24;
  r.sampling.temperature = 0;
  auto id = engine.Submit(r);
  if (!id.ok()) return id.status();
  r.tokens = Text(33, vocab);
  if (auto other = engine.Submit(r); !other.ok()) return other.status();
  while (!engine.idle()) {
    auto events = engine.Step();
    if (!events.ok()) return events.status();
    for (const TokenEvent& e : *events) {
      if (e.id == *id && e.has_token) a.greedy.push_back(e.token);
    }
  }
  return a;
}

Answer RunAt(const std::string& path, const Placement& p, bool score) {
  auto checkpoint = OpenCheckpoint(path);
  EXPECT_TRUE(checkpoint.ok()) << checkpoint.status();
  auto config = ReadModelConfig(**checkpoint);
  EXPECT_TRUE(config.ok()) << config.status();
  EngineOptions options;
  options.shard = {p.tp, p.pp, p.split};
  options.wire = p.wire;
  options.kv_type = p.kv_type;
  options.sequences = 2;
  options.rows = p.rows;
  options.cpu.threads = 1;
  options.cpu.pin = false;
  options = *ResolveOptions(*config, options);
  const int world = p.tp * p.pp;
  auto worlds = MakeInProcessCommunicators(world);
  Answer answer;
  const auto rank_main = [&](int r) {
    auto rank = Rank::Create(*worlds[r], **checkpoint, *config, options, nullptr);
    ASSERT_TRUE(rank.ok()) << rank.status();
    if (r != 0) {
      const absl::Status s = (*rank)->RunWorker();
      EXPECT_TRUE(s.ok()) << s;
      return;
    }
    Engine engine(*std::move(rank), options);
    auto a = Ask(engine, config->vocab, score);
    ASSERT_TRUE(a.ok()) << a.status();
    answer = *std::move(a);
  };
  std::vector<std::thread> threads;
  for (int r = 1; r < world; ++r) threads.emplace_back(rank_main, r);
  rank_main(0);
  for (auto& t : threads) t.join();
  return answer;
}

// Squared difference over squared norm, over all positions.
double Nmse(const Answer& a, const Answer& b) {
  double diff = 0, norm = 0;
  for (size_t i = 0; i < a.logits.size(); ++i) {
    for (size_t j = 0; j < a.logits[i].size(); ++j) {
      diff += std::pow(static_cast<double>(a.logits[i][j]) - b.logits[i][j], 2);
      norm += std::pow(static_cast<double>(a.logits[i][j]), 2);
    }
  }
  return diff / norm;
}

double MeanKl(const Answer& a, const Answer& b) {
  double kl = 0;
  for (size_t i = 0; i < a.logits.size(); ++i) {
    const double na = LogSumExp(a.logits[i], 1), nb = LogSumExp(b.logits[i], 1);
    for (size_t j = 0; j < a.logits[i].size(); ++j) {
      const double lp = a.logits[i][j] - na;
      kl += std::exp(lp) * (lp - (b.logits[i][j] - nb));
    }
  }
  return kl / static_cast<double>(a.logits.size());
}

std::string NameOf(const testing::TestParamInfo<TinyModel>& info) {
  const TinyModel& m = info.param;
  std::string architecture = m.architecture;
  std::replace(architecture.begin(), architecture.end(), '-', '_');
  return architecture + "_" + Info(m.type).name + (m.experts > 0 ? "_moe" : "") +
         (m.tied ? "_tied" : "") + (m.window > 0 ? "_window" : "") + std::to_string(info.index);
}

class PlacementParity : public testing::TestWithParam<TinyModel> {};

TEST_P(PlacementParity, PipelineIsBitIdentical) {
  const TempModel model(GetParam());
  const Answer plain = RunAt(model.path(), {}, true), greedy = RunAt(model.path(), {}, false);
  ASSERT_FALSE(plain.logits.empty());
  ASSERT_EQ(greedy.greedy.size(), 24u);
  EXPECT_EQ(RunAt(model.path(), {1, 2, {}}, true).logits, plain.logits);
  EXPECT_EQ(RunAt(model.path(), {1, 3, {}}, false).greedy, greedy.greedy);
}

TEST_P(PlacementParity, ChunksOfThePromptDoNotMatter) {
  const TempModel model(GetParam());
  Placement small;
  small.rows = 17;
  EXPECT_EQ(RunAt(model.path(), small, true).logits, RunAt(model.path(), {}, true).logits);
}

TEST_P(PlacementParity, TensorParallelWithinRounding) {
  const TempModel model(GetParam());
  const Answer plain = RunAt(model.path(), {}, true);
  // f32 sums in another order: eps^2 times the length of the sums. With int8 activations such a
  // change can round a few of them to the neighbouring step, 1/127 of their block's largest.
  const bool floats = Info(GetParam().type).block_elems == 1;
  const double bound = floats ? 1e-10 : 5e-4;
  for (const Placement& p :
       {Placement{2, 1, {}}, Placement{3, 1, {}}, Placement{2, 1, {3, 1}}, Placement{2, 2, {}}}) {
    const Answer split = RunAt(model.path(), p, true);
    EXPECT_LT(Nmse(plain, split), bound) << "tp " << p.tp << " pp " << p.pp;
    // The sums of exponentials that it subtracts are rounded too, to about 1e-9 of them.
    EXPECT_LT(MeanKl(plain, split), floats ? 1e-8 : 1e-3) << "tp " << p.tp << " pp " << p.pp;
  }
}

TEST_P(PlacementParity, LossyWiresAddLittle) {
  const TempModel model(GetParam());
  const Answer exact = RunAt(model.path(), {2, 1, {}}, true);
  for (const Wire wire : {Wire::kF16, Wire::kQ8}) {
    const double kl = MeanKl(exact, RunAt(model.path(), {2, 1, {}, wire}, true));
    std::printf("KL divergence that the %s wire adds: %.2e\n", wire == Wire::kF16 ? "f16" : "q8",
                kl);
    // Quantized weights: int8 activations amplify any change to their own rounding noise, on random
    // weights most; and a router may choose another expert.
    const bool smooth = Info(GetParam().type).block_elems == 1 && GetParam().experts == 0;
    EXPECT_LT(kl, smooth ? wire == Wire::kF16 ? 1e-6 : 3e-4 : 1e-2);
  }
}

// Columns are no multiples of 256, as in the real ones.
TinyModel GptOss(DType experts) {
  TinyModel m;
  m.architecture = "gpt-oss";
  m.layers = 3;
  m.dim = 288;
  m.kv_heads = 2;
  m.ffn = 160;
  m.experts = 8;
  m.experts_used = 4;
  m.window = 24;
  m.rope_scaling = "yarn";
  m.rope_scaling_factor = 32;
  m.type = experts;
  m.type_of = [experts](const std::string& name) {
    return name.find("_exps") != std::string::npos || experts == DType::kF32 ? experts
                                                                             : DType::kQ8_0;
  };
  return m;
}

std::vector<TinyModel> Models() {
  std::vector<TinyModel> models;
  TinyModel m;
  m.layers = 3;
  models.push_back(m);
  m.type = DType::kF16;
  m.tied = true;
  models.push_back(m);
  m.tied = false;
  for (const DType t : {DType::kQ8_0, DType::kQ4_0, DType::kQ4_K, DType::kQ6_K}) {
    m.type = t;
    models.push_back(m);
  }
  m.type = DType::kF32;
  m.window = 24;
  models.push_back(m);
  m.window = 0;
  m.architecture = "qwen2";
  models.push_back(m);
  m.architecture = "qwen3";
  m.head_dim = 64;
  models.push_back(m);
  m.head_dim = 32;
  m.architecture = "llama";
  m.experts = 4;
  m.ffn = 128;
  models.push_back(m);
  m.architecture = "qwen3moe";
  m.type = DType::kQ8_0;
  models.push_back(m);
  for (const DType t : {DType::kF32, DType::kMXFP4}) models.push_back(GptOss(t));
  m.architecture = "glm4moe";
  for (const DType t : {DType::kF32, DType::kQ8_0}) {
    m.type = t;
    models.push_back(m);
  }
  m.architecture = "minimax-m2";  // with KV heads that two of three ranks hold
  for (const DType t : {DType::kF32, DType::kQ8_0}) {
    m.type = t;
    models.push_back(m);
  }
  m.expert_groups = 2;
  for (const char* architecture : {"dots1", "hunyuan-moe", "bailingmoe2"}) {
    m.architecture = architecture;
    for (const DType t : {DType::kF32, DType::kQ8_0}) {
      m.type = t;
      models.push_back(m);
    }
  }
  m.architecture = "llama4";
  m.experts_used = 1;
  m.layers = 5;
  m.window = 24;
  for (const DType t : {DType::kF32, DType::kQ8_0}) {
    m.type = t;
    models.push_back(m);
  }
  m.experts = 0;
  m.layers = 7;
  m.ffn = 160;
  for (const char* architecture : {"gemma3", "glm4"}) {  // norms behind sums
    m.architecture = architecture;
    for (const DType t : {DType::kF32, DType::kQ8_0}) {
      m.type = t;
      models.push_back(m);
    }
    m.layers = 3;
  }
  m.head_norms = true;
  for (const DType t : {DType::kF32, DType::kQ8_0}) {
    m.type = t;
    m.architecture = "command-r";
    m.layers = 3;
    m.window = 0;
    models.push_back(m);
    m.architecture = "cohere2";
    m.layers = 5;
    m.window = 24;
    models.push_back(m);
  }
  return models;
}

INSTANTIATE_TEST_SUITE_P(Models, PlacementParity, testing::ValuesIn(Models()), NameOf);

}  // namespace
}  // namespace shoal
