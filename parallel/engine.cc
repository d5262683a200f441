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

Engine::Engine(std::unique_ptr<Rank> rank, const EngineOptions& options)
    : rank_(std::move(rank)), options_(options), scheduler_(LimitsOf(options, *rank_)) {}

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

// Learns which pages of an earlier run all ranks have.
absl::Status Engine::ListPages() {
  pages_listed_ = true;
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
  if (!pages_listed_) SHOAL_RETURN_IF_ERROR(ListPages());
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
  if (step.streams) {
    SHOAL_RETURN_IF_ERROR(AwaitStream());
  } else {
    // The results of a device come later than its launch.
    LearnCosts(step.batch, rank_->mesh().stages() > 1
                               ? oldest.launch_s
                               : absl::ToDoubleSeconds(absl::Now() - oldest.began));
  }
  std::vector<ShardRow> rows = *std::move(oldest.results);
  std::vector<std::vector<float>> embeddings(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) embeddings[i] = std::move(rows[i].hidden);
  SHOAL_ASSIGN_OR_RETURN(std::vector<Sample> samples, SampleAll(step, std::move(rows)));
  std::vector<TokenEvent> events;
  std::vector<int32_t> tokens;
  for (size_t i = 0; i < samples.size(); ++i) {
    tokens.push_back(samples[i].token);
    TokenEvent e;
    e.id = step.sequences[i];
    const Sequence& s = *scheduler_.Find(e.id);
    e.token = samples[i].token;
    e.sample = std::move(samples[i]);
    e.embedding = std::move(embeddings[i]);
    e.cached_tokens = std::min(s.cached_tokens, s.prompt_length);
    e.has_token = !s.cancelled && !s.lost && !s.request.embed;
    events.push_back(std::move(e));
  }
  for (const Scheduler::Finished& f : scheduler_.Complete(step, tokens)) {
    const auto it = std::find_if(events.begin(), events.end(),
                                 [&](const TokenEvent& e) { return e.id == f.id; });
    TokenEvent& e = it != events.end() ? *it : events.emplace_back();
    e.id = f.id;
    e.finish = f.reason;
  }
  std::erase_if(
      events, [](const TokenEvent& e) { return !e.has_token && e.finish == FinishReason::kNone; });
  return events;
}

absl::StatusOr<std::vector<Sample>> Engine::SampleAll(const Scheduler::Step& step,
                                                      std::vector<ShardRow> rows) {
  std::vector<Sample> samples(rows.size());
  std::vector<int32_t> open;  // rows whose candidates could not decide
  std::vector<std::vector<uint64_t>> masks(rows.size());
  const auto draw = [&](size_t i, ShardRow&& row) {
    const Sequence& s = *scheduler_.Find(step.sequences[i]);
    if (s.request.embed) return true;
    std::optional<Sample> sample =
        SampleToken(s.request.sampling, s.tokens, ToRowLogits(std::move(row)), masks[i]);
    if (!sample.has_value()) return false;
    samples[i] = *std::move(sample);
    return true;
  };
  for (size_t i = 0; i < rows.size(); ++i) {
    if (mask_) masks[i] = mask_(step.sequences[i], scheduler_.Find(step.sequences[i])->tokens);
    if (!draw(i, std::move(rows[i]))) open.push_back(static_cast<int32_t>(i));
  }
  if (open.empty()) return samples;
  // Results come in the order of the batches: those of the steps in flight are ahead of the fetch.
  for (InFlight& f : in_flight_) {
    if (f.results.has_value()) continue;
    SHOAL_ASSIGN_OR_RETURN(f.results, rank_->Collect(f.step.batch));
  }
  Batch fetch;
  fetch.kind = Batch::Kind::kFetchLogits;
  fetch.step = step.batch.step;
  fetch.fetch = open;
  SHOAL_RETURN_IF_ERROR(Launch(fetch));
  SHOAL_ASSIGN_OR_RETURN(rows, rank_->Collect(fetch));
  for (size_t i = 0; i < open.size(); ++i) {
    SHOAL_CHECK(draw(open[i], std::move(rows[i])), "a whole row always decides");
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
