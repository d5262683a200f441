// What the scheduler promises: every sequence ends with its tokens, no row is computed out of
// order, blocks and slots come back, clients take turns, bad requests are refused with a reason.
#include "parallel/scheduler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <set>

#include "kernels/backend.h"

namespace shoal {
namespace {

using ::testing::ElementsAre;

SchedulerLimits Limits() {
  SchedulerLimits l;
  l.rows = 64;
  l.rows_beside_decode = 32;
  l.slots = 4;
  l.context = 256;
  l.blocks = 40;
  return l;
}

SequenceRequest Request(int length, int max_tokens, const std::string& client = "", int first = 0) {
  SequenceRequest r;
  r.tokens.resize(length);
  std::iota(r.tokens.begin(), r.tokens.end(), first);
  r.max_tokens = max_tokens;
  r.client = client;
  return r;
}

// Stands in for the model: checks every batch and draws token 1000 + position.
class Simulation {
 public:
  explicit Simulation(const SchedulerLimits& limits) : scheduler(limits), limits_(limits) {}

  bool Step() {
    std::optional<Scheduler::Step> step = scheduler.Next();
    for (const auto& f : scheduler.TakeCancelled()) finished[f.id] = f.reason;
    if (!step.has_value()) return false;
    CheckBatch(step->batch);
    std::vector<int32_t> tokens;
    for (const SequenceId id : step->sequences) {
      const Sequence* s = scheduler.Find(id);
      EXPECT_NE(s, nullptr);
      tokens.push_back(1000 + static_cast<int32_t>(s->tokens.size()));
      lengths[id] = static_cast<int>(s->tokens.size()) + 1;
      order.push_back(id);
    }
    for (const auto& f : scheduler.Complete(*step, tokens)) finished[f.id] = f.reason;
    return true;
  }
  void RunAll(int limit = 100000) {
    while (!scheduler.idle() && --limit > 0) Step();
    EXPECT_GT(limit, 0) << "the scheduler makes no progress";
    for (const auto& f : scheduler.TakeCancelled()) finished[f.id] = f.reason;
  }

  Scheduler scheduler;
  std::map<SequenceId, FinishReason> finished;
  std::map<SequenceId, int> lengths;
  std::vector<SequenceId> order;

 private:
  void CheckBatch(const Batch& b) {
    EXPECT_LE(b.rows(), limits_.rows);
    for (const Batch::TableEntry& e : b.table) tables_[e.slot][e.index] = e.block;
    int row = 0;
    for (const Batch::Run& run : b.runs) {
      EXPECT_EQ(run.row, row);
      EXPECT_EQ(run.decode != 0, row < b.decode_rows) << "decode rows come first";
      row += run.rows;
      for (int i = 0; i < run.rows; ++i) {
        EXPECT_TRUE(tables_[run.slot].contains((run.pos + i) / kKvBlockTokens))
            << "a row without a block";
      }
    }
    EXPECT_EQ(row, b.rows());
  }

  SchedulerLimits limits_;
  std::map<int, std::map<int, int>> tables_;
};

TEST(Scheduler, OneSequenceToItsEnd) {
  Simulation sim(Limits());
  const SequenceId id = *sim.scheduler.Submit(Request(100, 20));
  sim.RunAll();
  EXPECT_EQ(sim.finished[id], FinishReason::kLength);
  EXPECT_EQ(sim.lengths[id], 120);
  EXPECT_EQ(sim.scheduler.stats().blocks_in_use, 0);
}

TEST(Scheduler, StopsAtAStopTokenAndAtTheContext) {
  Simulation sim(Limits());
  SequenceRequest r = Request(10, 1000);
  r.stop_tokens = {1012};
  const SequenceId stop = *sim.scheduler.Submit(r);
  const SequenceId full = *sim.scheduler.Submit(Request(250, 1000));
  sim.RunAll();
  EXPECT_EQ(sim.finished[stop], FinishReason::kStop);
  EXPECT_EQ(sim.lengths[stop], 13);
  EXPECT_EQ(sim.finished[full], FinishReason::kLength);
  EXPECT_EQ(sim.lengths[full], 256);
}

TEST(Scheduler, MoreSequencesThanBlocksAllEnd) {
  for (const bool prefix_cache : {false, true}) {
    SchedulerLimits l = Limits();
    l.blocks = 17;  // one full context and one block
    l.prefix_cache = prefix_cache;
    Simulation sim(l);
    std::vector<SequenceId> ids;
    for (int i = 0; i < 8; ++i)
      ids.push_back(*sim.scheduler.Submit(Request(60 + i, 120, "", i * 1000)));
    sim.RunAll();
    for (size_t i = 0; i < ids.size(); ++i)
      EXPECT_EQ(sim.lengths[ids[i]], 180 + static_cast<int>(i));
    EXPECT_GT(sim.scheduler.stats().preempted, 0);
    EXPECT_EQ(sim.scheduler.stats().blocks_in_use, 0);
  }
}

TEST(Scheduler, SharedPrefixIsComputedOnce) {
  Simulation sim(Limits());
  ASSERT_TRUE(sim.scheduler.Submit(Request(100, 1)).ok());
  sim.RunAll();
  ASSERT_TRUE(sim.scheduler.Submit(Request(100, 1)).ok());
  sim.RunAll();
  EXPECT_EQ(sim.scheduler.stats().cached_tokens, 96);
  SequenceRequest salted = Request(100, 1);
  salted.salt = {9, 9};
  ASSERT_TRUE(sim.scheduler.Submit(salted).ok());
  sim.RunAll();
  EXPECT_EQ(sim.scheduler.stats().cached_tokens, 96) << "another salt shares nothing";
}

TEST(Scheduler, ClientsTakeTurns) {
  SchedulerLimits l = Limits();
  l.slots = 1;
  Simulation sim(l);
  for (int i = 0; i < 5; ++i)
    ASSERT_TRUE(sim.scheduler.Submit(Request(10, 1, "greedy", i * 100)).ok());
  const SequenceId modest = *sim.scheduler.Submit(Request(10, 1, "modest", 7000));
  sim.RunAll();
  const auto place = std::find(sim.order.begin(), sim.order.end(), modest) - sim.order.begin();
  EXPECT_LE(place, 1) << "one request waits for one turn, not for five";
}

TEST(Scheduler, CancelWhereverItStands) {
  Simulation sim(Limits());
  std::vector<SequenceId> ids;
  for (int i = 0; i < 6; ++i) ids.push_back(*sim.scheduler.Submit(Request(40, 50, "", i * 100)));
  sim.scheduler.Cancel(ids[5]);  // waiting
  for (int i = 0; i < 3; ++i) sim.Step();
  sim.scheduler.Cancel(ids[0]);  // running
  sim.scheduler.Cancel(ids[0]);  // twice
  sim.scheduler.Cancel(12345);   // never was
  sim.RunAll();
  EXPECT_EQ(sim.finished[ids[5]], FinishReason::kCancelled);
  EXPECT_EQ(sim.finished[ids[0]], FinishReason::kCancelled);
  for (int i = 1; i < 5; ++i) EXPECT_EQ(sim.lengths[ids[i]], 90);
  EXPECT_EQ(sim.scheduler.stats().blocks_in_use, 0);
}

TEST(Scheduler, CancelOfAStepInFlightKeepsItsBlocksUntilItIsDone) {
  Scheduler s(Limits());
  const SequenceId id = *s.Submit(Request(10, 50));
  const auto step = s.Next();
  ASSERT_TRUE(step.has_value());
  s.Cancel(id);
  EXPECT_GT(s.stats().blocks_in_use, 0);
  const auto finished = s.Complete(*step, {1});
  ASSERT_EQ(finished.size(), 1u);
  EXPECT_EQ(finished[0].reason, FinishReason::kCancelled);
  EXPECT_EQ(s.stats().blocks_in_use, 0);
}

TEST(Scheduler, PipelineHasSeveralStepsInFlight) {
  Scheduler s(Limits());
  ASSERT_TRUE(s.Submit(Request(150, 5)).ok());
  const auto a = s.Next(), b = s.Next(), c = s.Next();
  ASSERT_TRUE(a && b && c);  // chunks of one prompt follow each other
  EXPECT_TRUE(a->sequences.empty());
  EXPECT_EQ(c->sequences.size(), 1u);
  EXPECT_FALSE(s.Next().has_value()) << "the next token is not drawn yet";
  EXPECT_TRUE(s.Complete(*a, {}).empty());
  EXPECT_TRUE(s.Complete(*b, {}).empty());
  EXPECT_TRUE(s.Complete(*c, {7}).empty());
  EXPECT_TRUE(s.Next().has_value());
}

// What n > 1 asks for: the prompt is computed once, all its answers are drawn from its last row and
// share its blocks, the last one partly filled; who writes to that one takes a copy.
TEST(Scheduler, PromptsAreCutSoThatEveryStageHasAPiece) {
  SchedulerLimits l = Limits();
  l.rows = 512;
  l.context = 4096;
  l.blocks = 512;
  const auto first_steps = [&](int stages, int prompt) {
    Scheduler scheduler(l);
    scheduler.CutPromptsFor(stages);
    EXPECT_TRUE(scheduler.Submit(Request(prompt, 1)).ok());
    std::vector<int> rows;
    for (int i = 0; i < stages; ++i) {
      const std::optional<Scheduler::Step> step = scheduler.Next();
      if (step.has_value()) rows.push_back(step->batch.rows());
    }
    return rows;
  };
  EXPECT_THAT(first_steps(1, 512), ElementsAre(512));
  EXPECT_THAT(first_steps(2, 512), ElementsAre(128, 128));
  EXPECT_THAT(first_steps(2, 1024), ElementsAre(256, 192));
  EXPECT_THAT(first_steps(2, 4000), ElementsAre(512, 512)) << "what a step may have";
  EXPECT_THAT(first_steps(2, 100), ElementsAre(100)) << "too short to cut";
}

TEST(Scheduler, AnswersToOnePromptShareItsBlocks) {
  SchedulerLimits limits = Limits();
  Scheduler s(limits);
  std::vector<SequenceId> ids;
  for (int i = 0; i < 3; ++i) ids.push_back(*s.Submit(Request(20, 3, "a")));
  ASSERT_TRUE(s.Submit(Request(20, 3, "b")).ok());  // of another client: on its own
  const auto prompt = s.Next();
  ASSERT_TRUE(prompt.has_value());
  EXPECT_EQ(prompt->batch.rows(), 20 + 4) << "what is behind b's first block";
  EXPECT_EQ(prompt->sequences.size(), 4u);
  EXPECT_EQ(prompt->twins, (std::vector<SequenceId>{ids[1], ids[2]}));
  for (size_t i = 0; i < prompt->sequences.size(); ++i) {
    const int row = prompt->batch.logits[i].row;
    EXPECT_EQ(row, s.Find(prompt->sequences[i])->request.client == "a" ? 19 : 23);
  }
  EXPECT_EQ(s.stats().blocks_in_use, 3);
  s.Complete(*prompt, {1, 2, 3, 4});
  const auto decode = s.Next();
  ASSERT_TRUE(decode.has_value());
  EXPECT_EQ(decode->batch.rows(), 4);
  int copies = 0;
  for (const Batch::PageOp& op : decode->batch.pages) {
    copies += op.kind == Batch::PageOp::Kind::kCopy;
  }
  EXPECT_EQ(copies, 2) << "the last to write has it for itself";
  std::set<int> tails;
  for (const SequenceId id : ids) {
    EXPECT_EQ(s.Find(id)->blocks[0], s.Find(ids[0])->blocks[0]);
    tails.insert(s.Find(id)->blocks[1]);
  }
  EXPECT_EQ(tails.size(), 3u);
  s.Complete(*decode, {5, 6, 7, 8});
  EXPECT_TRUE(s.Next()->batch.pages.empty()) << "copied once";
}

TEST(Scheduler, AnAnswerThatSharesBlocksMayBeCancelledAtOnce) {
  Scheduler s(Limits());
  std::vector<SequenceId> ids;
  for (int i = 0; i < 2; ++i) ids.push_back(*s.Submit(Request(20, 3)));
  const auto prompt = s.Next();
  ASSERT_EQ(prompt->twins.size(), 1u);
  s.Cancel(ids[0]);
  EXPECT_EQ(s.stats().running, 2) << "its step is in flight";
  s.Complete(*prompt, {1, 2});
  EXPECT_EQ(s.stats().running, 1);
  const auto decode = s.Next();
  EXPECT_TRUE(decode->batch.pages.empty()) << "nobody else has the block any more";
  s.Cancel(ids[1]);
  s.Complete(*decode, {3});
  EXPECT_EQ(s.stats().blocks_in_use, 0);
}

// Rows of prompts in the next step.
int PromptRows(Simulation& s) {
  const std::optional<Scheduler::Step> step = s.scheduler.Next();
  if (!step.has_value()) return -1;
  s.scheduler.Complete(*step, std::vector<int32_t>(step->sequences.size(), 5));
  return step->batch.rows() - step->batch.decode_rows;
}

TEST(Scheduler, PromptsBesideDecodeAreBoundedByTime) {
  SchedulerLimits limits = Limits();
  limits.rows = limits.rows_beside_decode = 512;
  limits.slots = 16;
  limits.context = 2048;
  limits.blocks = 16 * 2048 / kKvBlockTokens;
  // Half of them decode, or all but one; prompts of 1,000 tokens come beside.
  const auto rows_with = [&](int decoding, int prompts, const StepCosts& costs) {
    Simulation s(limits);
    for (int i = 0; i < decoding; ++i) EXPECT_TRUE(s.scheduler.Submit(Request(1, 500)).ok());
    EXPECT_EQ(PromptRows(s), 0);
    for (int i = 0; i < prompts; ++i) {
      EXPECT_TRUE(s.scheduler.Submit(Request(1000, 5, "", 10000 * (i + 1))).ok());
    }
    s.scheduler.SetCosts(costs);
    return PromptRows(s);
  };
  EXPECT_EQ(rows_with(15, 1, {}), 64) << "nothing is known";
  const StepCosts costs{.token_s = 0.001, .decode_s = 0.05};
  EXPECT_EQ(rows_with(15, 1, costs), 192) << "four times decoding, in whole tiles";
  EXPECT_EQ(rows_with(8, 8, costs), 192);
  EXPECT_EQ(rows_with(2, 12, costs), 288) << "by their number: six times";
  EXPECT_EQ(rows_with(2, 100, costs), 320) << "of those that wait, as many as there are slots";
  EXPECT_EQ(rows_with(1, 15, costs), 511) << "what a batch holds";
  EXPECT_EQ(rows_with(15, 1, {.token_s = 1, .decode_s = 0.05}), 64) << "never less";
}

// What is left of the prompts may come at once, but for one token in 128 of a stream only.
TEST(Scheduler, RareLongSteps) {
  SchedulerLimits limits = Limits();
  limits.rows = limits.rows_beside_decode = 512;
  limits.slots = 16;
  limits.context = 2048;
  limits.blocks = 16 * 2048 / kKvBlockTokens;
  Simulation s(limits);
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(s.scheduler.Submit(Request(1, 2000)).ok());
  EXPECT_EQ(PromptRows(s), 0);
  s.scheduler.SetCosts({.token_s = 0.001, .decode_s = 0.03});
  int first = 0;
  const auto comes = [&](int prompts, int length) {
    for (int i = 0; i < prompts; ++i) {
      ASSERT_TRUE(s.scheduler.Submit(Request(length, 1, "", first += 10000)).ok());
    }
  };
  comes(2, 200);
  EXPECT_EQ(PromptRows(s), 400) << "three streams wait for it once";
  comes(2, 200);
  EXPECT_EQ(PromptRows(s), 96) << "four times decoding";
  while (PromptRows(s) > 0) {
  }
  for (int i = 0; i < 128; ++i) EXPECT_EQ(PromptRows(s), 0);
  comes(1, 510);
  EXPECT_EQ(PromptRows(s), 96) << "more than a batch holds";
  EXPECT_EQ(PromptRows(s), 414) << "but the rest is not";
}

TEST(Scheduler, ReplayedTokensTakeTheDecodePath) {
  Scheduler s(Limits());
  SequenceRequest r = Request(30, 50);
  r.prompt_length = 20;
  ASSERT_TRUE(s.Submit(r).ok());
  const auto prompt = s.Next();
  ASSERT_TRUE(prompt.has_value());
  EXPECT_EQ(prompt->batch.decode_rows, 0);
  EXPECT_EQ(prompt->batch.rows(), 20);
  EXPECT_TRUE(prompt->sequences.empty());
  const auto replay = s.Next();
  ASSERT_TRUE(replay.has_value());
  EXPECT_EQ(replay->batch.decode_rows, 10);
  EXPECT_EQ(replay->sequences.size(), 1u);
}

TEST(Scheduler, RefusesWithCounts) {
  SchedulerLimits l = Limits();
  l.waiting = 2;
  Scheduler s(l);
  EXPECT_EQ(s.Submit(Request(0, 1)).status().code(), absl::StatusCode::kInvalidArgument);
  const absl::Status longer = s.Submit(Request(300, 1)).status();
  EXPECT_EQ(longer.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(std::string(longer.message()).find("300"), std::string::npos);
  EXPECT_NE(std::string(longer.message()).find("256"), std::string::npos);
  ASSERT_TRUE(s.Submit(Request(5, 1)).ok());
  ASSERT_TRUE(s.Submit(Request(5, 1)).ok());
  EXPECT_EQ(s.Submit(Request(5, 1)).status().code(), absl::StatusCode::kResourceExhausted);
}

TEST(Scheduler, NothingToGenerateEndsAtOnce) {
  Simulation sim(Limits());
  const SequenceId id = *sim.scheduler.Submit(Request(5, 0));
  sim.RunAll();
  EXPECT_EQ(sim.finished[id], FinishReason::kLength);
}

// Guesses seven times what is drawn.
class Ones final : public Drafter {
 public:
  Draft Propose(SequenceId id, absl::Span<const int32_t> tokens, int most) override {
    return {std::vector<int32_t>(most, 1), 16};
  }
  void Forget(SequenceId id) override {}
};

TEST(Scheduler, DraftsFollowWhatTheyCost) {
  const auto most_drafted = [](const StepCosts& costs, int sequences) {
    SchedulerLimits l = Limits();
    l.draft_max = 7;
    Scheduler scheduler(l, std::make_unique<Ones>());
    scheduler.SetCosts(costs);
    for (int i = 0; i < sequences; ++i) {
      EXPECT_TRUE(scheduler.Submit(Request(20, 100, "", i * 1000)).ok());
    }
    int most = 0;
    while (!scheduler.idle()) {
      const std::optional<Scheduler::Step> step = scheduler.Next();
      most = std::max(most, step->drafted);
      scheduler.Complete(*step, std::vector<int32_t>(step->sequences.size(), 1));
    }
    return most;
  };
  EXPECT_EQ(most_drafted({}, 1), 7);
  EXPECT_EQ(most_drafted({}, 4), 7) << "few until it is known what they cost";
  StepCosts costs;
  costs.step_s = 1;
  costs.draft_age = 0;
  costs.draft_row_s = 0.001;
  EXPECT_EQ(most_drafted(costs, 4), 28);
  costs.draft_row_s = 0.3;
  EXPECT_EQ(most_drafted(costs, 4), 0) << "four rows take longer than the step that they save";
  EXPECT_GT(most_drafted(costs, 1), 0);
  costs.draft_age = 400;
  EXPECT_EQ(most_drafted(costs, 4), 7) << "it may have changed";
}

}  // namespace
}  // namespace shoal
