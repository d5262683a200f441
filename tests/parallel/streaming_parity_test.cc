// Memory does not change the answer: with weights streamed from a GGUF or from shard files, under
// any split, the logits have the same bits as with everything in memory.
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "parallel/engine.h"
#include "shard/placement.h"
#include "shard/shard_file.h"
#include "tests/shard/gguf_writer.h"
#include "tests/shard/temp_dir.h"

namespace shoal {
namespace {

struct Answer {
  std::vector<float> logits;  // of every position of a text, one after the other
  std::vector<int32_t> greedy;
  int64_t streamed = 0;  // bytes per token, over all ranks
};

TinyModel Streamable(int experts, bool tied) {
  TinyModel m;
  m.layers = 4;
  m.dim = 256;
  m.ffn = 3072;  // units above what always stays
  m.vocab = 4096;
  m.experts = experts;
  m.tied = tied;
  m.type = DType::kQ8_0;
  return m;
}

class StreamingParity : public testing::Test {
 protected:
  void Make(const TinyModel& m) {
    vocab_ = m.vocab;
    TinyModelGguf(m).WriteTo(temp_.File("m.gguf"));
    gguf_ = *OpenCheckpoint(temp_.File("m.gguf"));
    config_ = *ReadModelConfig(*gguf_);
  }
  std::unique_ptr<Checkpoint> Shards(int tp, int pp) {
    ShardWriteOptions o;
    o.shard = {tp, pp, {}};
    const std::string dir = temp_.File(std::to_string(tp) + "x" + std::to_string(pp));
    EXPECT_TRUE(WriteShards(*gguf_, config_, dir, o).ok());
    return *OpenCheckpoint(dir);
  }

  // `share` of the weights that could be streamed stays in memory; 0: as few as can be; 1: all.
  Answer Do(const Checkpoint& checkpoint, int tp, int pp, double share) {
    Answer run;
    EngineOptions o;
    o.shard = {tp, pp, {}};
    o.context = 128;
    o.sequences = 2;
    o.rows = 32;
    o.kv_type = KvType::kF16;
    o.cpu.threads = 1;
    o.cpu.pin = false;
    o = *ResolveOptions(config_, o);
    const ShardPlan plan = *MakeShardPlan(config_, checkpoint, o.shard);
    auto worlds = MakeInProcessCommunicators(tp * pp);
    std::vector<std::thread> threads;
    for (int r = 0; r < tp * pp; ++r) {
      threads.emplace_back([&, r] {
        EngineOptions mine = o;
        if (share < 1) {
          const auto backend = MakeCpuBackend(mine.cpu);
          const RankMemory all =
              *Rank::MemoryNeeded(checkpoint, config_, mine, plan.ranks[r], **backend);
          const WeightLayout layout = *MakeWeightLayout(checkpoint, config_, plan.ranks[r]);
          const int64_t least = LeastWeightBytes(layout, config_, mine.rows);
          mine.memory = all.kv + all.workspace + least +
                        static_cast<int64_t>(share * static_cast<double>(layout.bytes - least));
        }
        auto rank = Rank::Create(*worlds[r], checkpoint, config_, mine, nullptr);
        ASSERT_TRUE(rank.ok()) << rank.status();
        if (r > 0) {
          EXPECT_TRUE((*rank)->RunWorker().ok());
          return;
        }
        run.streamed = (*rank)->memory().streamed;
        Engine engine(*std::move(rank), mine);
        SequenceRequest request;
        for (int i = 0; i < 50; ++i) request.tokens.push_back((i * 37 + 11) % vocab_);
        request.max_tokens = 12;
        request.sampling.temperature = 0;
        ASSERT_TRUE(engine.Submit(request).ok());
        while (!engine.idle()) {
          auto events = engine.Step();
          ASSERT_TRUE(events.ok()) << events.status();
          for (const TokenEvent& e : *events) {
            if (!e.has_token) continue;
            run.greedy.push_back(e.token);
          }
        }
        auto scores = engine.ScoreText(request.tokens, 1, /*want_logits=*/true);
        ASSERT_TRUE(scores.ok()) << scores.status();
        for (const auto& s : *scores)
          run.logits.insert(run.logits.end(), s.logits.begin(), s.logits.end());
      });
    }
    for (std::thread& t : threads) t.join();
    return run;
  }
  void ExpectSame(const Answer& a, const Answer& b) {
    EXPECT_EQ(a.greedy, b.greedy);
    ASSERT_EQ(a.logits.size(), b.logits.size());
    EXPECT_EQ(memcmp(a.logits.data(), b.logits.data(), a.logits.size() * sizeof(float)), 0);
  }
  // Alone, and as two ranks either way.
  void ExpectSameStreamed(const TinyModel& m) {
    Make(m);
    for (const auto& [tp, pp] : {std::pair{1, 1}, {2, 1}, {1, 2}}) {
      SCOPED_TRACE(testing::Message() << "tp " << tp << " pp " << pp);
      const auto shards = Shards(tp, pp);
      const Answer streamed = Do(*shards, tp, pp, 0);
      EXPECT_GT(streamed.streamed, 1 << 20);
      ExpectSame(Do(*gguf_, tp, pp, 1), streamed);
    }
  }

  TempDir temp_;
  std::unique_ptr<Checkpoint> gguf_;
  ModelConfig config_;
  int vocab_ = 0;
};

TEST_F(StreamingParity, SameBitsAtEveryShare) {
  Make(Streamable(0, false));
  const auto shards = Shards(1, 1);
  const Answer whole = Do(*gguf_, 1, 1, 1);
  EXPECT_EQ(whole.streamed, 0);
  for (const double share : {0.0, 0.6}) {
    const Answer streamed = Do(*shards, 1, 1, share);
    EXPECT_GT(streamed.streamed, 1 << 20);
    ExpectSame(whole, streamed);
  }
  ExpectSame(whole, Do(*gguf_, 1, 1, 0));
  ExpectSame(whole, Do(*shards, 1, 1, 1));
}

TEST_F(StreamingParity, SameBitsWithTiedEmbeddings) {
  Make(Streamable(0, true));
  const auto shards = Shards(1, 1);
  ExpectSame(Do(*gguf_, 1, 1, 1), Do(*shards, 1, 1, 0));
}

TEST_F(StreamingParity, SameBitsWithExpertsOnDemand) {
  Make(Streamable(4, false));
  const auto shards = Shards(1, 1);
  const Answer streamed = Do(*shards, 1, 1, 0);
  EXPECT_GT(streamed.streamed, 1 << 20);
  ExpectSame(Do(*gguf_, 1, 1, 1), streamed);
}

TEST_F(StreamingParity, SameBitsWithExpertsThatHaveBiases) {
  TinyModel m = Streamable(4, false);
  m.architecture = "gpt-oss";
  m.window = 24;
  m.ffn = 2880;
  m.type_of = [](const std::string& name) {
    return name.find("_exps") != std::string::npos ? DType::kMXFP4 : DType::kQ8_0;
  };
  ExpectSameStreamed(m);
}

TEST_F(StreamingParity, SameBitsWithDenseLayersAndASharedExpert) {
  TinyModel m = Streamable(4, false);
  m.architecture = "glm4moe";
  m.dense_ffn = 4096;
  ExpectSameStreamed(m);
}

TEST_F(StreamingParity, SameBitsWithNormsOfWholeRows) {
  TinyModel m = Streamable(4, false);
  m.architecture = "minimax-m2";
  ExpectSameStreamed(m);
}

TEST_F(StreamingParity, SameBitsWithAnExpertOfOtherSizeForAll) {
  TinyModel m = Streamable(4, false);
  m.architecture = "hunyuan-moe";
  m.dense_ffn = 4096;
  ExpectSameStreamed(m);
}

TEST_F(StreamingParity, SameBitsWithQkvInOneTensor) {
  TinyModel m = Streamable(4, false);
  m.architecture = "bailingmoe2";
  m.expert_groups = 2;
  m.dense_ffn = 4096;
  ExpectSameStreamed(m);
}

TEST_F(StreamingParity, SameBitsWithNormsBehindSums) {
  TinyModel m = Streamable(0, true);
  m.architecture = "gemma3";
  m.window = 24;
  ExpectSameStreamed(m);
}

TEST_F(StreamingParity, SameBitsWithGateAndUpInOneTensor) {
  TinyModel m = Streamable(0, false);
  m.architecture = "glm4";
  ExpectSameStreamed(m);
}

TEST_F(StreamingParity, SameBitsWithExpertsInEveryOtherLayer) {
  TinyModel m = Streamable(4, false);
  m.architecture = "llama4";
  m.experts_used = 1;
  m.window = 24;
  m.dense_ffn = 4096;
  ExpectSameStreamed(m);
}

TEST_F(StreamingParity, SameBitsWithAnFfnBesideAttention) {
  TinyModel m = Streamable(0, true);
  m.architecture = "command-r";
  m.head_norms = true;
  ExpectSameStreamed(m);
}

TEST_F(StreamingParity, EachRankStreamsItsOwnPart) { ExpectSameStreamed(Streamable(0, false)); }

}  // namespace
}  // namespace shoal
