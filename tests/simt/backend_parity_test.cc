// Whole models on the CUDA backend, whose kernels run on the CPU here, against the CPU backend:
// logits within rounding and the same greedy tokens, on one device, two ranks on one, a device
// beside a CPU, two stages, and with weights that are streamed into too little memory.
#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/workspace.h"
#include "tests/simt/parity_fixture.h"

namespace shoal {
namespace {

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
    ExpectSameReplayed({"g"}, "SHOAL_CUDA_GRAPHS", /*recorded=*/2, /*replayed=*/15);
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
}

TEST_F(SimtParity, ReplayedStepsOfExpertsGiveTheSameBits) {
  more_ = {{9, 8}};  // steps of 1 to 3 rows: one of 4 is idle
  for (const auto& [architecture, type] : {std::pair{"qwen3moe", DType::kQ4_0},
                                           {"gpt-oss", DType::kMXFP4},
                                           {"glm4moe", DType::kF32}}) {
    SCOPED_TRACE(architecture);
    TinyModel m = Model(DType::kF32);
    m.type_of = [t = type](const std::string& name) {
      return name.find("_exps") != std::string::npos ? t : DType::kF32;
    };
    m.architecture = architecture;
    m.experts = 4;
    m.ffn = 128;
    m.window = 24;
    Make(m);
    ExpectSameReplayed({"g"}, "SHOAL_CUDA_GRAPHS", /*recorded=*/1, /*replayed=*/3);
  }
}

TEST_F(SimtParity, StepsWithStreamedExpertsAreNotReplayed) {
  TinyModel m = Model(DType::kQ8_0);
  m.architecture = "qwen3moe";
  m.dim = 256;
  m.ffn = 2048;
  m.experts = 4;
  Make(m);
  EXPECT_EQ(Do({"g", 1, true}).replayed, 0);
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
    ExpectDevicesAgree(bound);
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
    ExpectDevicesAgree(bound);
  }
}

TEST_F(SimtParity, SigmoidRouterAndSharedExpert) {
  TinyModel m = Model(DType::kF32);
  m.architecture = "glm4moe";
  m.experts = 4;
  m.ffn = 128;
  Make(m);
  ExpectDevicesAgree(kFloat);
}

TEST_F(SimtParity, NormsOfWholeRows) {
  TinyModel m = Model(DType::kF32);
  m.architecture = "minimax-m2";
  m.experts = 4;
  m.ffn = 128;
  Make(m);
  const Answer cpu = Do({"c"}), gpu = Do({"g"}), split = Do({"gg", 2}), mixed = Do({"gc", 2});
  EXPECT_EQ(gpu.greedy, cpu.greedy);
  EXPECT_LT(Nmse(cpu, gpu), kFloat);
  EXPECT_LT(Nmse(cpu, split), kFloat);
  EXPECT_LT(Nmse(cpu, mixed), kFloat);
}

TEST_F(SimtParity, NormsBehindTheRotationAndTemperatures) {
  TinyModel m = Model(DType::kF32);
  m.architecture = "hunyuan-moe";
  m.experts = 4;
  m.ffn = 128;
  Make(m);
  Answer cpu = Do({"c"}), gpu = Do({"g"});
  EXPECT_EQ(gpu.greedy, cpu.greedy);
  EXPECT_LT(Nmse(cpu, gpu), kFloat);
  m.experts = 0;
  m.architecture = "mistral3";
  m.rope_scaling = "yarn";
  Make(m);
  cpu = Do({"c"}), gpu = Do({"g"});
  EXPECT_EQ(gpu.greedy, cpu.greedy);
  EXPECT_LT(Nmse(cpu, gpu), kFloat);
}

TEST_F(SimtParity, ExpertsInGroups) {
  TinyModel m = Model(DType::kF32);
  m.architecture = "bailingmoe2";
  m.experts = 8;
  m.expert_groups = 4;
  m.expert_groups_used = 2;
  m.ffn = 128;
  Make(m);
  ExpectDevicesAgree(kFloat);
}

TEST_F(SimtParity, NormsBehindSums) {
  TinyModel m = Model(DType::kF32);
  for (const char* architecture : {"gemma3", "glm4"}) {
    m.architecture = architecture;
    m.layers = m.architecture == "gemma3" ? 6 : 2;
    m.window = m.architecture == "gemma3" ? 24 : 0;
    Make(m);
    ExpectDevicesAgree(kFloat);
  }
}

TEST_F(SimtParity, ChunksOfAttentionAndWeightedInputs) {
  TinyModel m = Model(DType::kF32);
  m.architecture = "llama4";
  m.layers = 4;
  m.experts = 4;
  m.experts_used = 1;
  m.ffn = 128;
  m.window = 24;
  for (const auto& [type, bound] : {std::pair{DType::kF32, kFloat}, {DType::kQ8_0, 2e-3}}) {
    SCOPED_TRACE(Info(type).name);
    m.type = type;
    Make(m);
    const Answer cpu = Do({"c"}), gpu = Do({"g"}), split = Do({"gg", 2});
    EXPECT_EQ(gpu.greedy, cpu.greedy);
    EXPECT_GT(gpu.replayed, 0);
    EXPECT_LT(Nmse(cpu, gpu), bound);
    EXPECT_LT(Nmse(cpu, split), bound);
  }
}

TEST_F(SimtParity, AnFfnBesideAttention) {
  TinyModel m = Model(DType::kF32);
  m.head_norms = true;
  for (const char* architecture : {"command-r", "cohere2"}) {
    SCOPED_TRACE(architecture);
    m.architecture = architecture;
    m.layers = m.architecture == "cohere2" ? 4 : 2;
    m.window = m.architecture == "cohere2" ? 24 : 0;
    Make(m);
    const Answer cpu = Do({"c"}), gpu = Do({"g"}), split = Do({"gg", 2});
    EXPECT_EQ(gpu.greedy, cpu.greedy);
    EXPECT_GT(gpu.replayed, 0);
    EXPECT_LT(Nmse(cpu, gpu), kFloat);
    EXPECT_LT(Nmse(cpu, split), kFloat);
  }
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

// A tenth of it is rotation tables here, a sixth where layers with a window have their own.
TEST_F(SimtParity, ADeviceHoldsWhatThePlanSays) {
  TinyModel m = Model(DType::kQ8_0);
  m.context = 16384;
  for (const char* architecture : {"llama", "gemma3"}) {
    m.architecture = architecture;
    m.window = m.architecture == "gemma3" ? 24 : 0;
    Make(m);
    EngineOptions options;
    options.make_backend = [] { return MakeGpu(); };
    options.sequences = 1;
    options.context = m.context;
    options.rows = 24;
    options.cpu.threads = 1;
    options = *ResolveOptions(config_, options);
    auto world = MakeSelfCommunicator();
    const auto held = [] {
      size_t free = 0, total = 0;
      EXPECT_EQ(cudaMemGetInfo(&free, &total), cudaSuccess);
      return static_cast<double>(total - free);
    };
    const double before = held();
    const auto rank = Rank::Create(*world, *checkpoint_, config_, options, nullptr);
    ASSERT_TRUE(rank.ok()) << rank.status();
    const RankMemory& plan = (*rank)->memory();
    const double planned = static_cast<double>(plan.weights + plan.kv + plan.workspace);
    EXPECT_LE(held() - before, planned);
    EXPECT_GE(held() - before, 0.9 * planned);
    // What `shoal plan` says where there is no such device.
    const ShardPlan shards = *MakeShardPlan(config_, *checkpoint_, options.shard);
    const RankMemory elsewhere = *Rank::MemoryNeeded(
        *checkpoint_, config_, options, shards.ranks[0],
        [](const Backend::Limits& l) { return cuda::WorkspaceBytes(l, /*gemm=*/false); },
        /*in_host_memory=*/false);
    EXPECT_EQ(elsewhere.workspace, plan.workspace);
    EXPECT_EQ(elsewhere.kv, plan.kv);
    EXPECT_EQ(elsewhere.weights, plan.weights);
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
