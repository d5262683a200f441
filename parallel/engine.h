// The engine: rank 0's loop that turns submitted sequences into tokens, step by step.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "parallel/rank.h"
#include "parallel/scheduler.h"
#include "parallel/sequence.h"

namespace shoal {

struct TokenEvent {
  SequenceId id = 0;
  bool has_token = false;
  int32_t token = 0;
  int cached_tokens = 0;         // with a token: of the prompt, not computed for this sequence
  Sample sample;                 // log-probabilities, when asked for
  std::vector<float> embedding;  // of a request that asked for it, when it ends
  FinishReason finish = FinishReason::kNone;
};

// One thread: the one that calls Step. Rank 0 only; the other ranks run Rank::RunWorker.
class Engine {
 public:
  // Masks tokens for constrained output: called before each draw, returns one bit per token or
  // empty for all.
  using TokenMask =
      std::function<std::vector<uint64_t>(SequenceId, absl::Span<const int32_t> tokens)>;

  // drafter: who guesses, when options.draft_max says so; null: prompt lookup.
  Engine(std::unique_ptr<Rank> rank, const EngineOptions& options,
         std::unique_ptr<Drafter> drafter = nullptr);
  ~Engine();  // stops
  // Ends the other ranks' loops, unless an error broke the communicator; nothing can be computed
  // afterwards.
  void Stop();
  bool broken() const { return broken_; }

  absl::StatusOr<SequenceId> Submit(SequenceRequest request) {
    return scheduler_.Submit(std::move(request));
  }
  void Cancel(SequenceId id) { scheduler_.Cancel(id); }
  void SetTokenMask(TokenMask mask) { mask_ = std::move(mask); }

  // Hands out steps until the pipeline is full, then finishes the oldest one. Empty when idle. A
  // sequence may have several tokens, in order; the last one says when it ends.
  absl::StatusOr<std::vector<TokenEvent>> Step();
  bool idle() const { return scheduler_.idle() && in_flight_.empty(); }

  // Scores tokens[first_scored..]: the log-probability of each given those before it. Uses slot 0
  // and the KV pool from its start: an engine that scores does not generate.
  struct Score {
    float logprob = 0;          // of the target
    std::vector<float> logits;  // the whole row, when asked for
  };
  absl::StatusOr<std::vector<Score>> ScoreText(absl::Span<const int32_t> tokens, int first_scored,
                                               bool want_logits);

  // Asks every rank for its statistics, which TakeRankStats returns: at once when called right
  // behind, without waiting when the ranks had time to answer. Each Ask is followed by one Take.
  absl::Status AskRankStats();
  absl::StatusOr<std::vector<RankStats>> TakeRankStats();

  Scheduler::Stats stats() const { return scheduler_.stats(); }
  const Rank& rank() const { return *rank_; }

 private:
  struct InFlight {
    Scheduler::Step step;
    absl::Time began;
    double launch_s = 0;                           // rank 0's part of it took
    std::optional<std::vector<ShardRow>> results;  // when they had to be collected early
  };
  absl::Status Launch(Batch& batch);
  absl::Status LearnOfRanks();
  absl::Status AwaitLoads();
  void LearnCosts(const Batch& batch, double seconds);
  void LearnDraftCosts(const Scheduler::Step& step, double seconds);
  absl::Status AwaitStream();
  absl::StatusOr<std::vector<TokenEvent>> Finish(InFlight oldest);
  // One for each row; nullopt from the first that follows a wrong guess.
  absl::StatusOr<std::vector<std::optional<Sample>>> SampleAll(const Scheduler::Step& step,
                                                               std::vector<ShardRow> rows);
  class Drawing;

  std::unique_ptr<Rank> rank_;
  EngineOptions options_;
  Scheduler scheduler_;
  TokenMask mask_;
  std::deque<InFlight> in_flight_;
  int64_t score_step_ = 0;
  bool broken_ = false;
  bool stopped_ = false;
  bool ranks_known_ = false;
  StepCosts costs_;
};

}  // namespace shoal
