// Whole models by an engine whose ranks have the devices that a test names: what the parity tests
// of tests/simt share.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <functional>
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
#include "tests/simt/scoped_env.h"

namespace shoal {

struct Answer {
  std::vector<std::vector<float>> logits;
  std::vector<int32_t> greedy;
  int64_t streamed = 0;
  int64_t recorded = 0, replayed = 0;  // steps of rank 0's device
};

// The engine's device is left in *made, which may be null.
inline absl::StatusOr<std::unique_ptr<Backend>> MakeGpu(const cuda::CudaBackend** made = nullptr,
                                                        int device = 0) {
  absl::StatusOr<std::unique_ptr<cuda::CudaBackend>> gpu = cuda::CudaBackend::Create(device);
  if (!gpu.ok()) return gpu.status();
  if (made != nullptr) *made = gpu->get();
  return *std::move(gpu);
}

struct Arrangement {
  std::string devices = "g";  // of each rank: g(pu), h (another GPU) or c(pu)
  int tp = 1;
  bool stream = false;  // as little device memory as can be
  std::vector<int> stage_layers = {};
};

inline SamplingParams Greedy() {
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
    int came = 0;
    bool late = false;
    while (!engine.idle()) {
      if (late_.first > 0 && !late && came >= late_.first) {
        r.max_tokens = late_.second;
        ASSERT_TRUE(engine.Submit(r).ok());
        late = true;
      }
      auto events = engine.Step();
      ASSERT_TRUE(events.ok()) << events.status();
      for (const TokenEvent& e : *events) {
        came += e.has_token ? 1 : 0;
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
    options.sequences = 3 + static_cast<int>(more_.size());
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
      if (setup.devices[r] != 'c') {
        const int device = setup.devices[r] - 'g';
        mine.make_backend = [&gpu, device] { return MakeGpu(&gpu, device); };
      }
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

  struct Struck {
    absl::Status engine, worker;
    bool graphs_on = true;  // of the engine's rank, behind its error
  };
  // Two ranks with a device each generate; `strike` gets their communicators behind rank 0's fourth
  // replayed step. Tells what both ranks say then, and expects it within ten seconds.
  void Strike(const std::function<void(std::vector<std::unique_ptr<Communicator>>&)>& strike,
              Struck* struck) {
    EngineOptions options;
    options.shard = {2, 1};
    options.sequences = 1;
    options.context = 64;
    options.rows = 24;
    options.cpu.threads = 1;
    options.cpu.pin = false;
    options = *ResolveOptions(config_, options);
    auto worlds = MakeInProcessCommunicators(2);
    std::thread other([&] {
      EngineOptions mine = options;
      mine.make_backend = [] { return MakeGpu(nullptr, 1); };
      auto rank = Rank::Create(*worlds[1], *checkpoint_, config_, mine, nullptr);
      ASSERT_TRUE(rank.ok()) << rank.status();
      struck->worker = (*rank)->RunWorker();
    });
    const cuda::CudaBackend* gpu = nullptr;
    EngineOptions mine = options;
    mine.make_backend = [&gpu] { return MakeGpu(&gpu, 0); };
    auto rank = Rank::Create(*worlds[0], *checkpoint_, config_, mine, nullptr);
    ASSERT_TRUE(rank.ok()) << rank.status();
    {
      Engine engine(*std::move(rank), options);
      SequenceRequest r;
      r.tokens = Text(5);
      r.max_tokens = 50;
      r.sampling = Greedy();
      ASSERT_TRUE(engine.Submit(r).ok());
      const auto begin = absl::Now();
      while (struck->engine.ok() && !engine.idle()) {
        struck->engine = engine.Step().status();
        if (gpu->graphs().replayed() == 4) strike(worlds);
      }
      EXPECT_LT(absl::Now() - begin, absl::Seconds(10));
      struck->graphs_on = gpu->graphs().on();
      worlds[0]->Abort(struck->engine);
    }
    other.join();
  }

  // The same bits without graphs, which 0 in `variable` switches off; more than so many recordings
  // and replays with them.
  void ExpectSameReplayed(const Arrangement& setup, const char* variable, int recorded,
                          int replayed) {
    const Answer with = Do(setup);
    EXPECT_GT(with.recorded, recorded);
    EXPECT_GT(with.replayed, replayed);
    const ScopedEnv off(variable, "0");
    const Answer without = Do(setup);
    EXPECT_EQ(without.replayed, 0);
    EXPECT_EQ(with.greedy, without.greedy);
    EXPECT_EQ(with.logits, without.logits);
  }

  int64_t LeastMemory(const EngineOptions& options) const {
    const ShardPlan plan = *MakeShardPlan(config_, *checkpoint_, options.shard);
    const auto gpu = *MakeGpu();
    const RankMemory m = *Rank::MemoryNeeded(*checkpoint_, config_, options, plan.ranks[0], *gpu);
    const WeightLayout layout = *MakeWeightLayout(*checkpoint_, config_, plan.ranks[0]);
    return m.kv + m.workspace + LeastDeviceBytes(layout, config_, options.rows);
  }

  // One device, and two that share the model, answer as the CPU does.
  void ExpectDevicesAgree(double bound) {
    const Answer cpu = Do({"c"}), gpu = Do({"g"}), split = Do({"gg", 2});
    EXPECT_EQ(gpu.greedy, cpu.greedy);
    EXPECT_LT(Nmse(cpu, gpu), bound);
    EXPECT_LT(Nmse(cpu, split), bound);
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
  std::pair<int, int> late_ = {0, 0};      // another one, when so many tokens came: its tokens
};

// As small as a split over two ranks and the type's blocks allow: every product is done lane by
// lane here.
inline TinyModel Model(DType type) {
  TinyModel m;
  m.layers = 2;
  m.type = type;
  if (Info(type).block_elems <= 32) {
    m.dim = 128;
    m.heads = 4;
    m.kv_heads = 2;
    m.ffn = 256;
  }
  return m;
}

}  // namespace shoal
