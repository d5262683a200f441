// Whole models on the CUDA backend, whose kernels run on the CPU here, against the CPU backend:
// logits within rounding and the same greedy tokens, on one device, two ranks on one, a device
// beside a CPU, two stages, and with weights that are streamed into too little memory.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cuda_runtime.h"
#include "kernels/cuda/backend.h"
#include "parallel/engine.h"
#include "shard/device_store.h"
#include "tests/shard/gguf_writer.h"
#include "tests/shard/temp_dir.h"

namespace shoal {
namespace {

struct Answer {
  std::vector<std::vector<float>> logits;
  std::vector<int32_t> greedy;
  int64_t streamed = 0;
  int64_t recorded = 0, replayed = 0;  // steps of rank 0's device
};

// The engine's device is left in *made, which may be null.
absl::StatusOr<std::unique_ptr<Backend>> MakeGpu(const cuda::CudaBackend** made) {
  absl::StatusOr<std::unique_ptr<cuda::CudaBackend>> gpu = cuda::CudaBackend::Create(0);
  if (!gpu.ok()) return gpu.status();
  if (made != nullptr) *made = gpu->get();
  return *std::move(gpu);
}
absl::StatusOr<std::unique_ptr<Backend>> MakeGpu() { return MakeGpu(nullptr); }

struct Arrangement {
  std::string devices = "g";  // of each rank: g(pu) or c(pu)
  int tp = 1;
  bool stream = false;  // as little device memory as can be
  std::vector<int> stage_layers = {};
};

SamplingParams Greedy() {
  SamplingParams p;
  p.temperature = 0;
  return p;
}

class SimtParity : public testing::Test {
 protected:
  void Make(const TinyModel& m) {
    TinyModelGguf(m).WriteTo(temp_.File("m.gguf"));
    checkpoint_ = *OpenCheckpoint(temp_.File("m.gguf"));
    config_ = *ReadModelConfig(*checkpoint_);
  }

  std::vector<int32_t> Text(int n) const {
    std::vector<int32_t> t;
    for (int i = 0; i < n; ++i) t.push_back((i * 37 + 11) % config_.vocab);
    return t;
  }

  void Ask(Engine& engine, Answer& a) const {
    for (const auto& [prompt, tokens] : more_) {
      SequenceRequest r;
      r.tokens = Text(prompt);
      r.max_tokens = tokens;
      r.sampling = sampling_;
      ASSERT_TRUE(engine.Submit(r).ok());
    }
    SequenceRequest r;
    r.tokens = Text(21);
    r.max_tokens = 5;
    r.sampling = sampling_;
    auto id = engine.Submit(r);
    ASSERT_TRUE(id.ok()) << id.status();
    r.tokens = Text(3);
    ASSERT_TRUE(engine.Submit(r).ok());  // batches mix prefill and decode
    std::map<uint64_t, std::vector<int32_t>> tokens;
    while (!engine.idle()) {
      auto events = engine.Step();
      ASSERT_TRUE(events.ok()) << events.status();
      for (const TokenEvent& e : *events) {
        if (e.has_token && (e.id == *id || !more_.empty())) tokens[e.id].push_back(e.token);
      }
    }
    for (const auto& [of, text] : tokens) a.greedy.insert(a.greedy.end(), text.begin(), text.end());
    auto scores = engine.ScoreText(Text(36), 1, /*want_logits=*/true);
    ASSERT_TRUE(scores.ok()) << scores.status();
    for (auto& s : *scores) a.logits.push_back(std::move(s.logits));
  }

  Answer Do(const Arrangement& setup, KvType kv = KvType::kF16) {
    const int world = static_cast<int>(setup.devices.size());
    EngineOptions options;
    options.shard = {setup.tp, world / setup.tp, {}, setup.stage_layers};
    options.kv_type = kv;
    options.sequences = 2 + static_cast<int>(more_.size());
    options.context = context_;
    options.rows = 24;
    options.cpu.threads = 1;
    options.cpu.pin = false;
    options = *ResolveOptions(config_, options);
    auto worlds = MakeInProcessCommunicators(world);
    Answer answer;
    const auto rank_main = [&](int r) {
      EngineOptions mine = options;
      const cuda::CudaBackend* gpu = nullptr;
      if (setup.devices[r] == 'g') mine.make_backend = [&gpu] { return MakeGpu(&gpu); };
      if (setup.stream) mine.device_memory = LeastMemory(mine);
      auto rank = Rank::Create(*worlds[r], *checkpoint_, config_, mine, nullptr);
      if (!rank.ok()) worlds[r]->Abort(rank.status());  // the others would wait for it
      ASSERT_TRUE(rank.ok()) << rank.status();
      if (r != 0) {
        const absl::Status s = (*rank)->RunWorker();
        EXPECT_TRUE(s.ok()) << s;
        return;
      }
      answer.streamed = (*rank)->memory().streamed;
      Engine engine(*std::move(rank), options);
      Ask(engine, answer);
      if (gpu == nullptr) return;
      answer.recorded = gpu->graphs().recorded();
      answer.replayed = gpu->graphs().replayed();
    };
    std::vector<std::thread> threads;
    for (int r = 1; r < world; ++r) threads.emplace_back(rank_main, r);
    rank_main(0);
    for (auto& t : threads) t.join();
    return answer;
  }

  int64_t LeastMemory(const EngineOptions& options) const {
    const ShardPlan plan = *MakeShardPlan(config_, *checkpoint_, options.shard);
    const auto gpu = *MakeGpu();
    const RankMemory m = *Rank::MemoryNeeded(*checkpoint_, config_, options, plan.ranks[0], *gpu);
    const WeightLayout layout = *MakeWeightLayout(*checkpoint_, config_, plan.ranks[0]);
    return m.kv + m.workspace + LeastDeviceBytes(layout, config_, options.rows);
  }

  static double Nmse(const Answer& a, const Answer& b) {
    EXPECT_EQ(a.logits.size(), b.logits.size());
    double diff = 0, norm = 0;
    for (size_t i = 0; i < a.logits.size() && i < b.logits.size(); ++i) {
      for (size_t j = 0; j < a.logits[i].size(); ++j) {
        diff += std::pow(static_cast<double>(a.logits[i][j]) - b.logits[i][j], 2);
        norm += std::pow(static_cast<double>(a.logits[i][j]), 2);
      }
    }
    return diff / norm;
  }

  TempDir temp_;
  std::unique_ptr<Checkpoint> checkpoint_;
  ModelConfig config_;
  SamplingParams sampling_ = Greedy();
  int context_ = 64;
  std::vector<std::pair<int, int>> more_;  // sequences beside the two: prompt, tokens
};

// Sets a variable of the environment for a scope.
class ScopedEnv {
 public:
  ScopedEnv(const char* name, const char* value) : name_(name) { setenv(name, value, 1); }
  ~ScopedEnv() { unsetenv(name_); }
  ScopedEnv(const ScopedEnv&) = delete;
  ScopedEnv& operator=(const ScopedEnv&) = delete;

 private:
  const char* name_;
};

TinyModel Model(DType type) {
  TinyModel m;
  m.layers = 2;
  m.type = type;
  return m;
}

// int8 activations round to a neighbour where sums differ in their last bits; f16 tiles round each
// product of a prompt to 11 bits.
constexpr double kQuantized = 5e-4, kFloat = 1e-6;

TEST_F(SimtParity, EveryKindOfWeight) {
  for (const DType t : {DType::kF32, DType::kF16, DType::kQ8_0, DType::kQ4_0, DType::kQ4_K}) {
    SCOPED_TRACE(Info(t).name);
    Make(Model(t));
    const Answer cpu = Do({"c"}), gpu = Do({"g"});
    EXPECT_EQ(gpu.greedy, cpu.greedy);
    EXPECT_EQ(gpu.greedy.size(), 5u);
    EXPECT_LT(Nmse(cpu, gpu), Info(t).block_elems == 1 ? kFloat : kQuantized);
  }
}

TEST_F(SimtParity, ReplayedStepsGiveTheSameBits) {
  // Sequences come and go, so steps have 1 to 7 rows; they cross blocks of 16 tokens, and one of
  // them a split of 256.
  more_ = {{250, 12}, {9, 3}, {5, 30}, {14, 9}, {30, 2}};
  context_ = 280;
  for (const DType t : {DType::kF32, DType::kQ4_0}) {
    SCOPED_TRACE(Info(t).name);
    TinyModel m = Model(t);
    m.context = context_;
    Make(m);
    const Answer replayed = Do({"g"});
    EXPECT_GT(replayed.recorded, 2);
    EXPECT_GT(replayed.replayed, 15);
    const ScopedEnv off("SHOAL_CUDA_GRAPHS", "0");
    const Answer plain = Do({"g"});
    EXPECT_EQ(plain.replayed, 0);
    EXPECT_EQ(replayed.greedy, plain.greedy);
    EXPECT_EQ(replayed.logits, plain.logits);
  }
}

TEST_F(SimtParity, WhatCannotBeReplayedIsNot) {
  more_ = {{5, 12}};
  TinyModel m = Model(DType::kF32);
  Make(m);
  const Answer cpu = Do({"c"}, KvType::kF32);
  for (const auto& [setup, replays] :
       {std::pair{Arrangement{"gg", 1}, true}, {Arrangement{"gg", 2}, false}}) {
    const Answer split = Do(setup, KvType::kF32);
    EXPECT_EQ(split.greedy, cpu.greedy);
    EXPECT_EQ(split.replayed > 0, replays) << setup.tp;
  }
  m.experts = 4;
  m.architecture = "qwen3moe";
  Make(m);
  EXPECT_EQ(Do({"g"}).replayed, 0);
}

TEST_F(SimtParity, TwoRanksOnOneDeviceAndADeviceBesideACpu) {
  Make(Model(DType::kF32));
  const Answer cpu = Do({"c"}, KvType::kF32);
  for (const Arrangement& setup :
       {Arrangement{"gg", 2}, Arrangement{"gc", 2}, Arrangement{"gg", 1}, Arrangement{"cg", 1}}) {
    SCOPED_TRACE(setup.devices + " tp " + std::to_string(setup.tp));
    const Answer split = Do(setup, KvType::kF32);
    EXPECT_EQ(split.greedy, cpu.greedy);
    EXPECT_LT(Nmse(cpu, split), kFloat);
  }
}

TEST_F(SimtParity, TheLastLayersOnTheDeviceTheOthersOnTheCpu) {  // -ngl
  TinyModel m = Model(DType::kF32);
  m.layers = 3;
  Make(m);
  const Answer cpu = Do({"c"}, KvType::kF32);
  for (const int on_gpu : {1, 2}) {
    SCOPED_TRACE(on_gpu);
    const Answer split = Do({"cg", 1, false, {3 - on_gpu, on_gpu}}, KvType::kF32);
    EXPECT_EQ(split.greedy, cpu.greedy);
    EXPECT_EQ(split.greedy.size(), 5u);
    EXPECT_LT(Nmse(cpu, split), kFloat);
  }
}

TEST_F(SimtParity, MixtureOfExperts) {
  TinyModel m = Model(DType::kF32);
  m.architecture = "qwen3moe";
  m.experts = 4;
  m.ffn = 128;
  // An int8 row differs from its f16 tile by 3e-5 of its square (a step of 1/127 of a block's
  // largest, 2.5 standard deviations); 16 products in a row, and a router may weigh its experts
  // differently.
  for (const auto& [type, bound] : {std::pair{DType::kF32, kFloat}, {DType::kQ8_0, 2e-3}}) {
    SCOPED_TRACE(Info(type).name);
    m.type = type;
    Make(m);
    const Answer cpu = Do({"c"}), gpu = Do({"g"}), split = Do({"gg", 2});
    EXPECT_EQ(gpu.greedy, cpu.greedy);
    EXPECT_LT(Nmse(cpu, gpu), bound);
    EXPECT_LT(Nmse(cpu, split), bound);
  }
}

TEST_F(SimtParity, GptOss) {
  TinyModel m = Model(DType::kF32);
  m.architecture = "gpt-oss";
  m.experts = 4;
  m.ffn = 160;
  m.window = 24;
  for (const auto& [type, bound] : {std::pair{DType::kF32, kFloat}, {DType::kMXFP4, 2e-3}}) {
    SCOPED_TRACE(Info(type).name);
    m.type_of = [type](const std::string& name) {
      return name.find("_exps") != std::string::npos ? type : DType::kF32;
    };
    Make(m);
    const Answer cpu = Do({"c"}), gpu = Do({"g"}), split = Do({"gg", 2});
    EXPECT_EQ(gpu.greedy, cpu.greedy);
    EXPECT_LT(Nmse(cpu, gpu), bound);
    EXPECT_LT(Nmse(cpu, split), bound);
  }
}

TEST_F(SimtParity, SigmoidRouterAndSharedExpert) {
  TinyModel m = Model(DType::kF32);
  m.architecture = "glm4moe";
  m.experts = 4;
  m.ffn = 128;
  Make(m);
  const Answer cpu = Do({"c"}), gpu = Do({"g"}), split = Do({"gg", 2});
  EXPECT_EQ(gpu.greedy, cpu.greedy);
  EXPECT_LT(Nmse(cpu, gpu), kFloat);
  EXPECT_LT(Nmse(cpu, split), kFloat);
}

TEST_F(SimtParity, DrawnTokensAreTheCpus) {
  Make(Model(DType::kF32));
  std::vector<SamplingParams> kinds(5);
  kinds[0].seed = 7;   // from the 40 best
  kinds[1].top_k = 0;  // needs the sum of all
  kinds[1].top_p = 0.9f;
  kinds[2].top_k = 3;  // candidates that may sink
  kinds[2].repeat_penalty = 2;
  kinds[3].logprobs = 2;     // the whole row at once
  kinds[4].temperature = 5;  // and after all
  kinds[4].top_k = 0;
  kinds[4].top_p = 0.999f;
  for (const SamplingParams& drawn : kinds) {
    sampling_ = drawn;
    const Answer cpu = Do({"c"}, KvType::kF32), gpu = Do({"g"}, KvType::kF32),
                 split = Do({"gg", 2}, KvType::kF32);
    EXPECT_EQ(gpu.greedy, cpu.greedy);
    EXPECT_EQ(split.greedy, cpu.greedy);
    EXPECT_EQ(gpu.greedy.size(), 5u);
  }
}

TEST(CudaBackendLogits, AreReducedAsOnTheCpu) {
  constexpr int kRows = 3, kVocab = 5000, kFirst = 7000, kMost = 40;
  const auto gpu = *MakeGpu();
  Backend::Limits limits;
  limits.rows = limits.heads = 1;
  limits.cols = limits.out_rows = limits.head_dim = limits.context = 32;
  limits.logit_rows = kRows;
  limits.vocab = kVocab;
  ASSERT_TRUE(gpu->Reserve(limits).ok());
  std::vector<float> logits(kRows * kVocab);
  for (size_t i = 0; i < logits.size(); ++i) {
    logits[i] = static_cast<float>(i * 2654435761u % 4001) / 100;  // with ties
  }
  logits[17] = NAN;
  const DeviceMemory there = *gpu->Allocate(static_cast<int64_t>(logits.size() * sizeof(float)));
  gpu->Copy(there.data(), logits.data(), there.size());
  const std::vector<LogitRequest> requests = {{0, -1}, {1, -1}, {1.25f, -1}};
  std::vector<LogitSummary> summaries(kRows + 1);
  std::vector<LogitCandidate> best((kRows + 1) * kMost);
  ASSERT_TRUE(gpu->ReduceLogits(there.as<float>(), kVocab, kFirst, requests, kMost,
                                summaries.data(), best.data()));
  for (int row = 0; row < kRows; ++row) {
    const absl::Span<const float> all(&logits[row * kVocab], kVocab);
    const std::vector<Candidate> expected = TopCandidates(all, kFirst, kMost);
    for (int i = 0; i < kMost; ++i) {
      ASSERT_EQ(best[row * kMost + i].token, expected[i].token) << row << " " << i;
      ASSERT_EQ(best[row * kMost + i].logit, expected[i].logit);
    }
    const float scale = requests[row].scale;
    EXPECT_NEAR(summaries[row].log_sum_exp, scale > 0 ? LogSumExp(all, scale) : 0, 1e-4) << row;
  }
  // What does not fit is left to whoever reads the rows.
  const std::vector<LogitRequest> more(kRows + 1);
  EXPECT_FALSE(
      gpu->ReduceLogits(there.as<float>(), kVocab, kFirst, more, 1, summaries.data(), best.data()));
  EXPECT_FALSE(gpu->ReduceLogits(there.as<float>(), kVocab, kFirst, {requests.data(), 1}, 1025,
                                 summaries.data(), best.data()));
  EXPECT_FALSE(gpu->ReduceLogits(there.as<float>(), kVocab + 1, kFirst, {requests.data(), 1}, 1,
                                 summaries.data(), best.data()));
}

TEST_F(SimtParity, StreamedWeightsGiveTheSameBits) {
  for (const int experts : {0, 4}) {
    TinyModel m = Model(DType::kQ8_0);
    m.dim = 256;
    m.ffn = 2048;  // parts above what always stays
    m.experts = experts;
    Make(m);
    const Answer whole = Do({"g"}), streamed = Do({"g", 1, true});
    EXPECT_EQ(whole.streamed, 0);
    EXPECT_GT(streamed.streamed, 1 << 20);
    EXPECT_EQ(streamed.logits, whole.logits);
    EXPECT_EQ(streamed.greedy, whole.greedy);
  }
}

TEST_F(SimtParity, TooLittleMemoryIsRefusedWithTheTable) {
  Make(Model(DType::kF32));
  EngineOptions options;
  options.make_backend = [] { return MakeGpu(); };
  options.device_memory = 1 << 20;
  options.cpu.threads = 1;
  options = *ResolveOptions(config_, options);
  auto world = MakeSelfCommunicator();
  const auto rank = Rank::Create(*world, *checkpoint_, config_, options, nullptr);
  EXPECT_EQ(rank.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_NE(rank.status().message().find("KV cache"), std::string::npos) << rank.status();
}

}  // namespace
}  // namespace shoal
