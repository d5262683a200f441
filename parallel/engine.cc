#include "parallel/engine.h"

#include <algorithm>
#include <utility>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "kernels/check.h"
#include "kernels/status_macros.h"

namespace shoal {
namespace {

constexpr int kTimedRows = 32;       // of a prompt: enough to say what a token takes
constexpr int kManyRows = 192;       // to unpack the weights for so many costs little
constexpr double kCostWeight = 0.2;  // of the newest measurement, in its running mean

void Average(double value, double& mean) {
  mean = mean == 0 ? value : mean + kCostWeight * (value - mean);
}

SchedulerLimits LimitsOf(const EngineOptions& o, const Rank& rank) {
  SchedulerLimits l;
  l.rows = o.rows;
  l.rows_beside_decode = o.rows;
  l.slots = o.sequences;
  l.context = o.context;
  l.blocks = (o.kv_tokens + kKvBlockTokens - 1) / kKvBlockTokens;
  l.prefix_cache = o.prefix_cache;
  l.pages = rank.pager() == nullptr ? 0 : rank.page_records();
  l.stream = StreamsKv(o, l.pages);
  const bool streams = rank.memory().streamed > 0;
  l.draft_max = o.draft_max != EngineOptions::kAutoDraft ? o.draft_max
                : streams                                ? EngineOptions::kUsualDraft
                                                         : 0;
  l.draft_adaptive = o.draft_adaptive;
  return l;
}

RowLogits ToRowLogits(ShardRow&& row) {
  RowLogits r;
  r.all = std::move(row.all);
  r.candidates = std::move(row.candidates);
  r.log_sum_exp = row.log_sum_exp;
  return r;
}

}  // namespace

Engine::Engine(std::unique_ptr<Rank> rank, const EngineOptions& options,
               std::unique_ptr<Drafter> drafter)
    : rank_(std::move(rank)),
      options_(options),
      scheduler_(LimitsOf(options, *rank_),
                 drafter != nullptr ? std::move(drafter) : std::make_unique<NgramDrafter>()) {}

Engine::~Engine() { Stop(); }

void Engine::Stop() {
  if (broken_ || stopped_) return;
  stopped_ = true;
  Batch stop;
  stop.kind = Batch::Kind::kStop;
  stop.pages = scheduler_.TakeWrites();
  // A peer that is gone already needs no stop.
  Launch(stop).IgnoreError();
}

absl::Status Engine::Launch(Batch& batch) {
  absl::Status s = BroadcastBatch(rank_->mesh().world(), batch);
  if (s.ok()) s = rank_->Run(batch);
  if (!s.ok()) {
    broken_ = true;
    rank_->mesh().world().Abort(s);
  }
  return s;
}

// Learns what the ranks have: weights that are streamed, pages of an earlier run.
absl::Status Engine::LearnOfRanks() {
  ranks_known_ = true;
  if (const int stages = rank_->mesh().stages(); stages > 1) {
    SHOAL_RETURN_IF_ERROR(AskRankStats());
    SHOAL_ASSIGN_OR_RETURN(const std::vector<RankStats> ranks, TakeRankStats());
    const bool streams = std::any_of(ranks.begin(), ranks.end(), [](const RankStats& r) {
      return r.memory.streamed > 0;  // each piece of a prompt would read them again
    });
    if (!streams) scheduler_.CutPromptsFor(stages);
  }
  if (rank_->pager() == nullptr || !options_.kv_disk.keep) return absl::OkStatus();
  Batch list;
  list.kind = Batch::Kind::kListPages;
  SHOAL_RETURN_IF_ERROR(Launch(list));
  const auto pages = rank_->CollectPages();
  broken_ = !pages.ok();
  if (broken_) return pages.status();
  scheduler_.RestorePages(*pages);
  return absl::OkStatus();
}

// Waits until every rank has read its part of the pages under way.
absl::Status Engine::AwaitLoads() {
  Batch await;
  await.kind = Batch::Kind::kAwaitLoads;
  SHOAL_RETURN_IF_ERROR(Launch(await));
  const auto worked = rank_->CollectLoads(scheduler_.loads_pending());
  broken_ = !worked.ok();
  if (broken_) return worked.status();
  scheduler_.FinishLoads(*worked);
  const KvPagerStats stats = rank_->pager()->stats();
  if (stats.pages_in > 0) costs_.page_s = stats.read_s / static_cast<double>(stats.pages_in);
  scheduler_.SetCosts(costs_);
  return absl::OkStatus();
}

// From what a step took; in a pipeline, from what this rank's stage took, which sets the pace.
void Engine::LearnCosts(const Batch& batch, double seconds) {
  const int prompt_rows = batch.rows() - batch.decode_rows;
  const bool decodes = batch.decode_rows > 0;
  if (prompt_rows == 0) {
    // One row of each sequence, not tokens that are replayed.
    if (decodes && batch.rows() == std::ssize(batch.runs)) Average(seconds, costs_.decode_s);
  } else if (decodes && costs_.decode_s == 0) {
    // There may never be a step that only decodes.
    if (costs_.token_s > 0) costs_.decode_s = std::max(0.0, seconds - prompt_rows * costs_.token_s);
  } else if (prompt_rows >= kTimedRows) {
    const double token_s = std::max(0.0, seconds - (decodes ? costs_.decode_s : 0)) / prompt_rows;
    Average(token_s, costs_.token_s);
    if (prompt_rows >= kManyRows) Average(token_s, costs_.many_token_s);
  }
  scheduler_.SetCosts(costs_);
}

// From what a step took until its results were there, in a pipeline too: a draft saves whole steps.
void Engine::LearnDraftCosts(const Scheduler::Step& step, double seconds) {
  if (step.batch.decode_rows != step.batch.rows()) return;                      // prompts, too
  if (step.batch.rows() - step.drafted != std::ssize(step.batch.runs)) return;  // replayed tokens
  if (step.drafted == 0) {
    Average(seconds, costs_.step_s);
    if (costs_.drafts_known()) ++costs_.draft_age;
  } else if (costs_.step_s > 0) {
    const double row_s = (seconds - costs_.step_s) / step.drafted;
    costs_.draft_row_s = costs_.drafts_known()
                             ? costs_.draft_row_s + kCostWeight * (row_s - costs_.draft_row_s)
                             : row_s;
    costs_.draft_age = 0;
  }
  scheduler_.SetCosts(costs_);
}

// Learns which pages that the steps so far had to read from disk some rank could not read.
absl::Status Engine::AwaitStream() {
  Batch await;
  await.kind = Batch::Kind::kAwaitStream;
  SHOAL_RETURN_IF_ERROR(Launch(await));
  const auto records = rank_->CollectStreamFailures();
  broken_ = !records.ok();
  if (broken_) return records.status();
  scheduler_.StreamFailed(*records);
  return absl::OkStatus();
}

absl::StatusOr<std::vector<TokenEvent>> Engine::Step() {
  std::vector<TokenEvent> events;
  if (!ranks_known_) SHOAL_RETURN_IF_ERROR(LearnOfRanks());
  while (static_cast<int>(in_flight_.size()) < rank_->mesh().stages()) {
    if (scheduler_.loads_pending() > 0 && rank_->pager()->loads_done()) {
      SHOAL_RETURN_IF_ERROR(AwaitLoads());
    }
    std::optional<Scheduler::Step> step = scheduler_.Next();
    if (!step.has_value() && scheduler_.loads_pending() > 0 && in_flight_.empty()) {
      SHOAL_RETURN_IF_ERROR(AwaitLoads());  // nothing else to do meanwhile
      step = scheduler_.Next();
    }
    if (!step.has_value()) break;
    in_flight_.push_back({*std::move(step), absl::Now(), 0, std::nullopt});
    InFlight& flight = in_flight_.back();
    SHOAL_RETURN_IF_ERROR(Launch(flight.step.batch));
    flight.launch_s = absl::ToDoubleSeconds(absl::Now() - flight.began);
  }
  if (!in_flight_.empty()) {
    InFlight oldest = std::move(in_flight_.front());
    in_flight_.pop_front();
    absl::StatusOr<std::vector<TokenEvent>> finished = Finish(std::move(oldest));
    if (!finished.ok()) {
      broken_ = true;
      return finished.status();
    }
    events = *std::move(finished);
  }
  for (const Scheduler::Finished& f : scheduler_.TakeCancelled()) {
    TokenEvent e;
    e.id = f.id;
    e.finish = f.reason;
    events.push_back(std::move(e));
  }
  return events;
}

absl::Status Engine::AskRankStats() {
  Batch ask;
  ask.kind = Batch::Kind::kStats;
  return Launch(ask);
}

absl::StatusOr<std::vector<RankStats>> Engine::TakeRankStats() {
  absl::StatusOr<std::vector<RankStats>> stats = rank_->CollectStats();
  if (!stats.ok()) broken_ = true;
  return stats;
}

absl::StatusOr<std::vector<TokenEvent>> Engine::Finish(InFlight oldest) {
  if (!oldest.results.has_value()) {
    SHOAL_ASSIGN_OR_RETURN(oldest.results, rank_->Collect(oldest.step.batch));
  }
  const Scheduler::Step& step = oldest.step;
  const double elapsed_s = absl::ToDoubleSeconds(absl::Now() - oldest.began);
  LearnDraftCosts(step, elapsed_s);
  if (step.streams) {
    SHOAL_RETURN_IF_ERROR(AwaitStream());
  } else {
    // The results of a device come later than its launch.
    LearnCosts(step.batch, rank_->mesh().stages() > 1 ? oldest.launch_s : elapsed_s);
  }
  std::vector<ShardRow> rows = *std::move(oldest.results);
  std::vector<std::vector<float>> embeddings(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) embeddings[i] = std::move(rows[i].hidden);
  SHOAL_ASSIGN_OR_RETURN(std::vector<std::optional<Sample>> samples,
                         SampleAll(step, std::move(rows)));
  std::vector<TokenEvent> events;
  std::vector<int32_t> tokens;
  for (size_t i = 0; i < samples.size(); ++i) {
    tokens.push_back(samples[i].has_value() ? samples[i]->token : Scheduler::kNoToken);
    if (!samples[i].has_value()) continue;
    TokenEvent e;
    e.id = step.sequences[i];
    const Sequence& s = *scheduler_.Find(e.id);
    e.token = samples[i]->token;
    e.sample = *std::move(samples[i]);
    e.embedding = std::move(embeddings[i]);
    e.cached_tokens = std::min(s.cached_tokens, s.prompt_length);
    e.has_token = !s.cancelled && !s.lost && !s.request.embed;
    events.push_back(std::move(e));
  }
  for (const Scheduler::Finished& f : scheduler_.Complete(step, tokens)) {
    const auto last = std::find_if(events.rbegin(), events.rend(),
                                   [&](const TokenEvent& e) { return e.id == f.id; });
    TokenEvent& e = last != events.rend() ? *last : events.emplace_back();
    e.id = f.id;
    e.finish = f.reason;
  }
  std::erase_if(
      events, [](const TokenEvent& e) { return !e.has_token && e.finish == FinishReason::kNone; });
  return events;
}

// What one sequence of a step draws: its row, then those of its draft for as long as they are
// right.
class Engine::Drawing {
 public:
  // Rows [row, end) of the step are the sequence's.
  Drawing(const Scheduler::Step& step, const Sequence& s, size_t row, size_t end)
      : step_(step), s_(s), row_(row), end_(end) {
    // What is drawn will be thrown away, and a mask must not see what is not part of the text.
    if (s.cancelled || s.lost) end_ = row + 1;
    if (end_ > row + 1) history_ = s.tokens;
  }

  // Draws on from rows[row()]. True when that row's candidates could not decide: to be called again
  // with the whole row in its place.
  bool Draw(const TokenMask& mask, std::vector<ShardRow>& rows,
            std::vector<std::optional<Sample>>& samples) {
    for (; row_ < end_; ++row_) {
      if (s_.request.embed) {
        samples[row_].emplace();
        continue;
      }
      const absl::Span<const int32_t> history = history_.empty() ? s_.tokens : history_;
      const std::vector<uint64_t> allowed = mask ? mask(s_.id, history) : std::vector<uint64_t>();
      std::optional<Sample>& sample = samples[row_];
      sample =
          SampleToken(s_.request.sampling, history, ToRowLogits(std::move(rows[row_])), allowed);
      if (!sample.has_value()) return true;
      if (row_ + 1 < end_ && step_.batch.tokens[step_.batch.logits[row_ + 1].row] != sample->token)
        end_ = row_ + 1;
      if (!history_.empty()) history_.push_back(sample->token);
    }
    return false;
  }
  size_t row() const { return row_; }

 private:
  const Scheduler::Step& step_;
  const Sequence& s_;
  size_t row_;
  size_t end_;
  std::vector<int32_t> history_;  // with what was drawn; empty: the sequence's
};

absl::StatusOr<std::vector<std::optional<Sample>>> Engine::SampleAll(const Scheduler::Step& step,
                                                                     std::vector<ShardRow> rows) {
  std::vector<std::optional<Sample>> samples(rows.size());
  std::vector<Drawing> open;  // whose candidates could not decide
  for (size_t begin = 0, end = 0; begin < rows.size(); begin = end) {
    const SequenceId id = step.sequences[begin];
    while (end < rows.size() && step.sequences[end] == id) ++end;
    Drawing drawing(step, *scheduler_.Find(id), begin, end);
    if (drawing.Draw(mask_, rows, samples)) open.push_back(std::move(drawing));
  }
  while (!open.empty()) {  // once more for each token of the longest draft that is right
    // Results come in the order of the batches: those of the steps in flight are ahead of the
    // fetch.
    for (InFlight& f : in_flight_) {
      if (f.results.has_value()) continue;
      SHOAL_ASSIGN_OR_RETURN(f.results, rank_->Collect(f.step.batch));
    }
    Batch fetch;
    fetch.kind = Batch::Kind::kFetchLogits;
    fetch.step = step.batch.step;
    for (const Drawing& d : open) fetch.fetch.push_back(static_cast<int32_t>(d.row()));
    SHOAL_RETURN_IF_ERROR(Launch(fetch));
    SHOAL_ASSIGN_OR_RETURN(std::vector<ShardRow> whole, rank_->Collect(fetch));
    std::vector<Drawing> still_open;
    for (size_t i = 0; i < open.size(); ++i) {
      const size_t row = open[i].row();
      rows[row] = std::move(whole[i]);
      if (!open[i].Draw(mask_, rows, samples)) continue;
      SHOAL_CHECK(open[i].row() > row, "a whole row always decides");
      still_open.push_back(std::move(open[i]));
    }
    open = std::move(still_open);
  }
  return samples;
}

absl::StatusOr<std::vector<Engine::Score>> Engine::ScoreText(absl::Span<const int32_t> tokens,
                                                             int first_scored, bool want_logits) {
  SHOAL_CHECK(idle() && first_scored >= 1, "scoring has the engine for itself");
  std::vector<Score> scores;
  const int n = static_cast<int>(tokens.size());
  for (int pos = 0; pos < n - 1; pos += options_.rows) {
    Batch batch;
    batch.step = --score_step_ + (int64_t{1} << 62);
    batch.prefill_head = 1;
    const int rows = std::min(options_.rows, n - 1 - pos);
    batch.tokens.assign(tokens.begin() + pos, tokens.begin() + pos + rows);
    batch.runs.push_back({0, 0, rows, pos, 0});
    for (int b = pos / kKvBlockTokens; b * kKvBlockTokens < pos + rows; ++b)
      batch.table.push_back({0, b, b});
    for (int r = 0; r < rows; ++r) {
      if (pos + r + 1 >= first_scored)
        batch.logits.push_back({r, 0, 1, want_logits ? -1 : tokens[pos + r + 1]});
    }
    SHOAL_RETURN_IF_ERROR(Launch(batch));
    SHOAL_ASSIGN_OR_RETURN(std::vector<ShardRow> results, rank_->Collect(batch));
    for (size_t i = 0; i < results.size(); ++i) {
      const int32_t target = tokens[pos + batch.logits[i].row + 1];
      const float logit = want_logits ? results[i].all[target] : results[i].target_logit;
      scores.push_back(
          {static_cast<float>(logit - results[i].log_sum_exp), std::move(results[i].all)});
    }
  }
  return scores;
}

}  // namespace shoal
