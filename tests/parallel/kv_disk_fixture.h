// Runs of prompts with KV pages on disk, with drafts, with weights that are streamed, for tests
// that say that nothing in the answer tells of them.
#pragma once

#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "parallel/engine.h"
#include "shard/placement.h"
#include "tests/shard/gguf_writer.h"
#include "tests/shard/temp_dir.h"

namespace shoal {

struct KvDiskAnswer {
  std::map<SequenceId, std::vector<int32_t>> tokens;
  std::map<SequenceId, std::vector<float>> logprobs;
  Scheduler::Stats stats;
  std::vector<SequenceId> ended;  // in order
  int beside = 0;                 // tokens of others that came between two of the first
  int64_t failed = 0;             // pages, over all ranks
  int64_t streamed = 0;           // bytes of weights per token, on rank 0
  friend bool SameText(const KvDiskAnswer& a, const KvDiskAnswer& b) {
    return a.tokens == b.tokens && a.logprobs == b.logprobs;
  }
};

class KvDiskFixture : public testing::Test {
 protected:
  KvDiskFixture() {
    TinyModel m;
    m.layers = 4;
    m.type = DType::kQ8_0;
    m.context = 2048;
    Use(m);
    options_.context = 1024;
    options_.sequences = 3;
    options_.rows = 64;
    options_.cpu.threads = 1;
    options_.cpu.pin = false;
  }
  void Use(const TinyModel& m) {
    vocab_ = m.vocab;
    checkpoint_ = nullptr;
    TinyModelGguf(m).WriteTo(temp_.File("m.gguf"));
    checkpoint_ = *OpenCheckpoint(temp_.File("m.gguf"));
    config_ = *ReadModelConfig(*checkpoint_);
  }
  std::string dir() { return temp_.File("kv"); }
  // With which a rank streams all weights that it can.
  int64_t LeastMemory(const EngineOptions& o, const RankPlan& plan) {
    const auto backend = MakeCpuBackend(o.cpu);
    const RankMemory all = *Rank::MemoryNeeded(*checkpoint_, config_, o, plan, **backend);
    const WeightLayout layout = *MakeWeightLayout(*checkpoint_, config_, plan);
    return all.kv + all.workspace + LeastWeightBytes(layout, config_, o.rows);
  }

  // Runs prompts of these lengths, all at once; those of one text start alike.
  KvDiskAnswer Do(int tp, int pp, const std::vector<std::pair<int, int>>& text_and_length,
                  int generate) {
    KvDiskAnswer answer;
    EngineOptions o = options_;
    o.shard = {tp, pp, {}};
    o = *ResolveOptions(config_, o);
    auto worlds = MakeInProcessCommunicators(tp * pp);
    std::vector<int64_t> failed(tp * pp);
    std::vector<std::thread> threads;
    for (int r = 0; r < tp * pp; ++r) {
      threads.emplace_back([&, r] {
        EngineOptions mine = o;
        if (stream_weights_) {
          const ShardPlan plan = *MakeShardPlan(config_, *checkpoint_, o.shard);
          mine.memory = LeastMemory(o, plan.ranks[r]);
        }
        auto rank = Rank::Create(*worlds[r], *checkpoint_, config_, mine, nullptr);
        ASSERT_TRUE(rank.ok()) << rank.status();
        if (r > 0) {
          EXPECT_TRUE((*rank)->RunWorker().ok());
          if ((*rank)->pager() != nullptr) failed[r] = (*rank)->pager()->stats().failed;
          return;
        }
        answer.streamed = (*rank)->memory().streamed;
        Engine engine(*std::move(rank), mine, drafter_ ? drafter_() : nullptr);
        engine.SetTokenMask(mask_);
        uint64_t seed = 0;
        const auto submit = [&](int text, int length) {
          SequenceRequest request;
          for (int i = 0; i < length; ++i)
            request.tokens.push_back((i * 37 + text * 101 + i / 50 + 11) % vocab_);
          request.max_tokens = generate;
          request.sampling.temperature = temperature_;
          request.sampling.seed = ++seed;
          request.sampling.logprobs = 1;
          if (adjust_) adjust_(request);
          ASSERT_TRUE(engine.Submit(request).ok());
        };
        size_t submitted = 0;
        const auto submit_until = [&](size_t end) {
          for (; submitted < end; ++submitted)
            submit(text_and_length[submitted].first, text_and_length[submitted].second);
        };
        submit_until(at_once_ > 0 ? at_once_ : text_and_length.size());
        while (!engine.idle()) {
          auto events = engine.Step();
          ASSERT_TRUE(events.ok()) << events.status();
          for (const TokenEvent& e : *events) {
            if (e.finish != FinishReason::kNone) answer.ended.push_back(e.id);
            if (!e.has_token) continue;
            submit_until(text_and_length.size());
            answer.beside += e.id != 1 && answer.ended.empty() ? 1 : 0;
            answer.tokens[e.id].push_back(e.token);
            answer.logprobs[e.id].push_back(e.sample.logprob);
          }
        }
        engine.Stop();
        answer.stats = engine.stats();
        if (engine.rank().pager() != nullptr) failed[0] = engine.rank().pager()->stats().failed;
      });
    }
    for (std::thread& t : threads) t.join();
    for (const int64_t f : failed) answer.failed += f;
    return answer;
  }

  TempDir temp_;
  std::unique_ptr<Checkpoint> checkpoint_;
  ModelConfig config_;
  EngineOptions options_;
  float temperature_ = 0;
  int vocab_ = 0;
  std::function<void(SequenceRequest&)> adjust_;       // of what Do submits
  std::function<std::unique_ptr<Drafter>()> drafter_;  // null: the engine's own
  Engine::TokenMask mask_;
  bool stream_weights_ = false;
  size_t at_once_ = 0;  // that Do submits at first, the others when a token has come; 0: all
};

}  // namespace shoal
