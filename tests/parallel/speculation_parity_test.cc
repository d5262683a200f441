// Drafts do not change the answer, right or wrong, whatever draws it and wherever it is computed:
// the same tokens and log-probabilities to the bit.
#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "tests/parallel/kv_disk_fixture.h"

namespace shoal {
namespace {

using Answer = KvDiskAnswer;

// Knows the text, and errs in a share of its tokens.
class KnowingDrafter final : public Drafter {
 public:
  KnowingDrafter(const Answer& truth, const std::map<SequenceId, int>& prompts, int vocab,
                 double mistakes)
      : truth_(truth), prompts_(prompts), vocab_(vocab), mistakes_(mistakes) {}

  Draft Propose(SequenceId id, absl::Span<const int32_t> tokens, int most) override {
    const std::vector<int32_t>& answer = truth_.tokens.at(id);
    const size_t drawn = tokens.size() - prompts_.at(id);
    EXPECT_LT(drawn + most, answer.size()) << "beyond the end";
    EXPECT_EQ(tokens.last(drawn), absl::MakeConstSpan(answer).first(drawn));
    Draft draft{{}, 2};
    const int count = std::uniform_int_distribution<int>(0, most)(random_);
    for (int i = 0; i < count; ++i) {
      const bool wrong = std::uniform_real_distribution<double>(0, 1)(random_) < mistakes_;
      draft.tokens.push_back((answer[drawn + i] + (wrong ? 1 : 0)) % vocab_);
    }
    return draft;
  }
  void Forget(SequenceId id) override {}

 private:
  const Answer& truth_;
  const std::map<SequenceId, int>& prompts_;
  const int vocab_;
  const double mistakes_;
  std::mt19937 random_{7};
};

// Some tokens of the vocabulary, others for each text: a constraint that a grammar could be.
std::vector<uint64_t> SomeTokens(SequenceId id, absl::Span<const int32_t> tokens) {
  std::vector<uint64_t> allowed(5, 0);
  std::mt19937 random(static_cast<uint32_t>(tokens.back() * 1000 + tokens.size() + id));
  for (int i = 0; i < 6; ++i) {
    const uint32_t t = random() % 320;
    allowed[t / 64] |= uint64_t{1} << (t % 64);
  }
  return allowed;
}

constexpr std::pair<int, int> kSplits[] = {{1, 1}, {2, 1}, {1, 2}, {2, 2}};

class SpeculationParity : public KvDiskFixture {
 protected:
  SpeculationParity() { options_.sequences = 4; }

  // The answers without drafts, and with drafts of several kinds: all the same. Returns the one
  // with drafts that are mostly right.
  Answer ExpectSame(int tp, int pp, const std::vector<std::pair<int, int>>& work, int generate) {
    options_.draft_adaptive = false;
    options_.draft_max = 0;
    drafter_ = nullptr;
    const Answer plain = Do(tp, pp, work, generate);
    EXPECT_EQ(plain.stats.drafted_tokens, 0);
    std::map<SequenceId, int> prompts;
    for (size_t i = 0; i < work.size(); ++i) {
      prompts[static_cast<SequenceId>(i) + 1] = work[i].second;
    }
    Answer last;
    for (const double mistakes : {1.0, 0.5, 0.1}) {
      options_.draft_max = mistakes == 0.5 ? 20 : 7;
      drafter_ = [&] { return std::make_unique<KnowingDrafter>(plain, prompts, vocab_, mistakes); };
      last = Do(tp, pp, work, generate);
      EXPECT_TRUE(SameText(plain, last)) << "tp " << tp << " pp " << pp << ", " << mistakes;
      EXPECT_GT(last.stats.drafted_tokens, 20);
      EXPECT_EQ(last.stats.accepted_tokens > 0, mistakes < 1);
    }
    EXPECT_GT(last.stats.accepted_tokens, 20);
    drafter_ = nullptr;
    options_.draft_adaptive = true;
    EXPECT_TRUE(SameText(plain, Do(tp, pp, work, generate))) << "prompt lookup";
    return last;
  }
};

// Two of them are answers to one prompt; one prompt is short, and so computed on the decode path.
const std::vector<std::pair<int, int>> kWork = {{1, 100}, {1, 100}, {2, 8}, {3, 40}};

TEST_F(SpeculationParity, HoweverItIsDrawn) {
  const std::vector<std::pair<const char*, std::function<void(SequenceRequest&)>>> ways = {
      {"greedy", [](SequenceRequest& r) { r.sampling.temperature = 0; }},
      {"tempered", [](SequenceRequest& r) { r.sampling.temperature = 1; }},
      {"candidates only",
       [](SequenceRequest& r) {
         r.sampling.temperature = 0.7F;
         r.sampling.logprobs = -1;
       }},
      // Candidates seldom decide: whole rows are fetched, for several rows of a draft in turn.
      {"open",
       [](SequenceRequest& r) {
         r.sampling.temperature = 5;
         r.sampling.top_k = 0;
         r.sampling.min_p = 0;
         r.sampling.logprobs = -1;
       }},
      {"penalties",
       [](SequenceRequest& r) {
         r.sampling.temperature = 0.8F;
         r.sampling.repeat_penalty = 1.3F;
         r.sampling.frequency_penalty = 0.2F;
         r.sampling.presence_penalty = 0.4F;
         r.sampling.penalty_last_n = 20;
         r.sampling.logprobs = -1;
       }},
      {"bias",
       [](SequenceRequest& r) {
         r.sampling.logit_bias = {{7, 3}, {11, -2}};
       }},
      {"ends", [](SequenceRequest& r) { r.stop_tokens = {3, 50, 77, 100, 120, 200, 250, 300}; }},
  };
  for (const auto& [name, adjust] : ways) {
    SCOPED_TRACE(name);
    adjust_ = [&, adjust = adjust](SequenceRequest& r) {
      r.sampling.temperature = 1;
      adjust(r);
    };
    for (const auto& [tp, pp] : {std::pair{1, 1}, std::pair{2, 1}}) {
      if (std::string(name) != "ends") {
        ExpectSame(tp, pp, kWork, 60);
        continue;
      }
      options_.draft_max = 0;
      const Answer plain = Do(tp, pp, kWork, 60);
      options_.draft_max = 7;
      options_.draft_adaptive = false;
      EXPECT_TRUE(SameText(plain, Do(tp, pp, kWork, 60)));
    }
  }
}

TEST_F(SpeculationParity, WithinAConstraint) {
  mask_ = SomeTokens;
  for (const float temperature : {0.0F, 1.0F}) {
    temperature_ = temperature;
    for (const int logprobs : {-1, 2}) {
      adjust_ = [&](SequenceRequest& r) { r.sampling.logprobs = logprobs; };
      for (const auto& [tp, pp] : kSplits) ExpectSame(tp, pp, kWork, 40);
    }
  }
}

TEST_F(SpeculationParity, WhateverTheSplitAndTheModel) {
  temperature_ = 1;
  TinyModel m;
  m.layers = 4;
  m.context = 2048;
  for (const DType type : {DType::kQ8_0, DType::kQ4_K, DType::kBF16}) {
    m.type = type;
    Use(m);
    for (const auto& [tp, pp] : kSplits) ExpectSame(tp, pp, kWork, 60);
  }
  m.type = DType::kQ4_0;
  m.experts = 4;
  m.ffn = 128;
  Use(m);
  ExpectSame(1, 1, kWork, 60);
  ExpectSame(2, 1, kWork, 60);
  m.experts = 0;
  m.window = 24;
  m.ffn = 512;
  Use(m);
  options_.kv_type = KvType::kQ8_0;
  for (const auto& [tp, pp] : kSplits) ExpectSame(tp, pp, kWork, 60);
}

TEST_F(SpeculationParity, WithWeightsFromDisk) {
  TinyModel m;
  m.layers = 4;
  m.ffn = 3072;
  m.vocab = 4096;
  m.type = DType::kQ8_0;
  m.context = 2048;
  Use(m);
  options_.rows = 32;
  options_.context = 256;
  stream_weights_ = true;
  temperature_ = 1;
  for (const auto& [tp, pp] : {std::pair{1, 1}, std::pair{2, 1}, std::pair{1, 2}}) {
    EXPECT_GT(ExpectSame(tp, pp, kWork, 24).streamed, 1 << 20);
  }
  // Without being asked: prompt lookup. Whether it pays is measured, which a busy machine disturbs.
  options_.draft_max = EngineOptions::kAutoDraft;
  options_.draft_adaptive = false;
  temperature_ = 0;
  adjust_ = [](SequenceRequest& r) { r.sampling.logit_bias = {{r.tokens[0], 100}}; };
  EXPECT_GT(Do(1, 1, kWork, 24).stats.accepted_tokens, 24) << "a text of one token";
  stream_weights_ = false;
  EXPECT_EQ(Do(1, 1, kWork, 24).stats.drafted_tokens, 0);
}

TEST_F(SpeculationParity, WithTooFewBlocks) {
  temperature_ = 1;
  const std::vector<std::pair<int, int>> work = {{1, 200}, {1, 200}, {2, 150}, {3, 100}};
  for (const bool prefix_cache : {true, false}) {
    options_.prefix_cache = prefix_cache;
    for (const auto& [tp, pp] : {std::pair{1, 1}, std::pair{2, 2}}) {
      options_.kv_disk = {};
      options_.kv_tokens = 0;
      const Answer roomy = ExpectSame(tp, pp, work, 120);
      options_.kv_tokens = 600;
      const Answer tight = ExpectSame(tp, pp, work, 120);
      EXPECT_GT(tight.stats.preempted, 0);
      EXPECT_TRUE(SameText(roomy, tight)) << "tp " << tp << " pp " << pp;
      options_.kv_disk = {dir(), false, 256 << 20, nullptr};
      const Answer paged = ExpectSame(tp, pp, work, 120);
      EXPECT_GT(paged.stats.pages_written, 0);
      EXPECT_TRUE(SameText(roomy, paged)) << "tp " << tp << " pp " << pp;
    }
  }
}

TEST_F(SpeculationParity, WithAContextLargerThanMemory) {
  options_.context = 2000;
  const std::vector<std::pair<int, int>> work = {{1, 1800}, {2, 200}};
  temperature_ = 1;
  for (const auto& [tp, pp] : {std::pair{1, 1}, std::pair{2, 1}, std::pair{1, 2}}) {
    options_.kv_tokens = 0;
    options_.kv_disk = {};
    options_.draft_max = 0;
    const Answer roomy = Do(tp, pp, work, 60);
    options_.kv_tokens = 1000;
    options_.kv_disk.dir = dir();
    options_.kv_disk.bytes = 256 << 20;
    const Answer tight = ExpectSame(tp, pp, work, 60);
    EXPECT_GT(tight.stats.pages_streamed, 0);
    EXPECT_TRUE(SameText(roomy, tight)) << "tp " << tp << " pp " << pp;
  }
}

// The text to the end of the context, where no draft has room.
TEST_F(SpeculationParity, ToTheEndOfTheContext) {
  options_.context = 128;
  temperature_ = 1;
  ExpectSame(1, 1, {{1, 60}, {2, 64}, {3, 80}}, 1000);
}

// What answers with wrong drafts leave in the prefix cache, in memory and on disk, is what answers
// without any leave.
TEST_F(SpeculationParity, WrongDraftsLeaveNothingBehind) {
  temperature_ = 1;
  for (const auto& [tp, pp] : kSplits) {
    options_.kv_disk = {};
    options_.draft_max = 0;
    drafter_ = nullptr;
    adjust_ = nullptr;
    const Answer first = Do(tp, pp, kWork, 90);
    // The same texts with what came, as after a restart, and on.
    SequenceId next = 0;
    const auto go_on = [&](SequenceRequest& r) {
      const std::vector<int32_t>& came = first.tokens.at(++next);
      r.prompt_length = static_cast<int>(r.tokens.size());
      r.tokens.insert(r.tokens.end(), came.begin(), came.end());
      r.max_tokens = 150;
    };
    adjust_ = go_on;
    const Answer plain = Do(tp, pp, kWork, 0);
    options_.kv_disk = {dir(), true, 256 << 20, nullptr};
    options_.draft_max = 20;
    options_.draft_adaptive = false;
    std::map<SequenceId, int> prompts;
    for (size_t i = 0; i < kWork.size(); ++i) prompts[i + 1] = kWork[i].second;
    drafter_ = [&] { return std::make_unique<KnowingDrafter>(first, prompts, vocab_, 0.5); };
    adjust_ = nullptr;
    EXPECT_TRUE(SameText(first, Do(tp, pp, kWork, 90)));
    options_.draft_max = 0;
    drafter_ = nullptr;
    adjust_ = go_on;
    next = 0;
    const Answer later = Do(tp, pp, kWork, 0);
    EXPECT_GT(later.stats.disk_tokens, 3 * 100) << "blocks of the answers, too";
    EXPECT_TRUE(SameText(plain, later)) << "tp " << tp << " pp " << pp;
  }
}

}  // namespace
}  // namespace shoal
