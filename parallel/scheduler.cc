#include "parallel/scheduler.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/backend.h"
#include "kernels/check.h"

namespace shoal {
namespace {

// A prompt shorter than this takes the decode path: prefill products cost as much for one row as
// for 32. By the prompt's length, not a chunk's, so that how it is cut does not matter.
constexpr int kShortPrompt = 16;
constexpr int kMostLosses = 3;  // of pages that a sequence streams, before it ends with an error

// Prompts may make a step with decode rows this much longer, in steps that only decode. Less costs
// throughput, because weights are read more often for fewer prompt rows, and slots stay empty
// meanwhile; launcher/SERVE.md has what was measured with three, four and no such bound.
constexpr double kPromptShare = 4;
constexpr int kPrefillTile = 32;  // prefill products cost as much for one row as for these
constexpr int kLeastPromptRows = 64;
constexpr int kLeastPieceRows = 128;  // of a prompt cut for a pipeline: less is not worth a pass
constexpr int kPiecesPerStage = 2;    // while the pipeline fills and drains, stages are idle
// What is left of all prompts may instead come in one longer step, which takes less time in all
// than pieces and their decode rows: but so rarely that a stream sees it for one token in so many.
constexpr double kLongStepS = 0.75;
constexpr double kTokensPerStall = 128;
constexpr double kMostStalls = 4;  // of streams, that may be saved up

int BlocksFor(int64_t tokens) {
  return static_cast<int>((tokens + kKvBlockTokens - 1) / kKvBlockTokens);
}

// history: what is drawn follows it.
Batch::LogitRow LogitRowFor(const Sequence& s, absl::Span<const int32_t> history, int row) {
  const SamplingParams& sampling = s.request.sampling;
  Batch::LogitRow logit{row, CandidatesNeeded(sampling, history), 1};
  if (s.request.embed) logit.candidates = Batch::LogitRow::kHiddenState;
  // Greedy and top-k draws need no sum over the vocabulary.
  const bool open = sampling.temperature > 0 && sampling.top_k <= 0 && !s.request.embed;
  logit.inv_temperature = open ? 1 / sampling.temperature : 0;
  return logit;
}

}  // namespace

Scheduler::Scheduler(const SchedulerLimits& limits, std::unique_ptr<Drafter> drafter)
    : limits_(limits),
      blocks_(limits.blocks),
      pages_(limits.pages),
      prefixes_(limits.pages),
      drafter_(std::move(drafter)),
      stalls_(kMostStalls) {
  SHOAL_CHECK(limits.rows > 0 && limits.slots > 0 && limits.context > 0 && limits.blocks > 0,
              "a scheduler needs rows, slots, context and blocks");
  for (int s = limits.slots - 1; s >= 0; --s) free_slots_.push_back(s);
}

absl::StatusOr<SequenceId> Scheduler::Submit(SequenceRequest request) {
  const int64_t length = static_cast<int64_t>(request.tokens.size());
  const int64_t most = MostTokens();
  if (length == 0)
    return absl::InvalidArgumentError("the prompt is empty: nothing to continue from");
  if (length > most) {
    const bool by_context = most == limits_.context;
    return absl::InvalidArgumentError(absl::StrCat(
        "the prompt has ", length, " tokens, but the ", by_context ? "context" : "KV cache",
        " holds ", most, ": shorten it or ",
        by_context ? "raise the context (-c)"
                   : "raise --kv-tokens; with --kv-disk for a whole context and --kv-tokens 768 or "
                     "more it may be larger than memory"));
  }
  if (request.prompt_length < 0 || request.prompt_length > length) {
    return absl::InvalidArgumentError(
        absl::StrCat("prompt_length ", request.prompt_length, " of ", length, " tokens"));
  }
  if (waiting_count_ >= limits_.waiting || waiting_tokens_ + length > limits_.waiting_tokens) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "the queue is full: ", waiting_count_, " requests with ", waiting_tokens_, " tokens wait"));
  }
  auto owned = std::make_unique<Sequence>();
  Sequence& s = *owned;
  s.id = next_id_++;
  s.prompt_length = request.prompt_length == 0 ? static_cast<int>(length) : request.prompt_length;
  s.prefill_end = s.prompt_length < kShortPrompt ? 0 : s.prompt_length;
  s.tokens = std::move(request.tokens);
  s.request = std::move(request);
  s.request.tokens.clear();
  s.drafts_held = drafts_held_;
  sequences_.emplace(s.id, std::move(owned));
  totals_.prompt_tokens += length;
  if (s.generated() >= s.request.max_tokens) {  // nothing to do: reported by the next TakeCancelled
    cancelled_.push_back({s.id, FinishReason::kLength});
    const SequenceId id = s.id;
    sequences_.erase(id);
    return id;
  }
  Enqueue(s, /*front=*/false);
  return s.id;
}

void Scheduler::Cancel(SequenceId id) {
  const auto it = sequences_.find(id);
  if (it == sequences_.end()) return;
  Sequence& s = *it->second;
  if (s.slot < 0) {
    PopWaiting(s);
  } else if (s.steps_in_flight > 0 || s.loading > 0) {
    s.cancelled = true;  // its blocks are still being written
    return;
  }
  cancelled_.push_back({id, FinishReason::kCancelled});
  Remove(s);
}

std::optional<Scheduler::Step> Scheduler::Next() {
  Step step;
  Batch& batch = step.batch;
  WritePages(batch.pages);
  int rows = 0;
  // 1. One row of everything that decodes. Copied: preemption changes running_.
  for (Sequence* s : std::vector<Sequence*>(running_)) {
    if (rows >= limits_.rows || s->slot < 0 || s->blocked()) continue;
    if (s->scheduled < s->prefill_end || s->remaining() != 1) continue;
    if (!GrowOrPreempt(*s, 1, batch)) continue;
    AddRun(*s, 1, /*decode=*/true, step);
    ++rows;
  }
  const int decoding = rows;
  rows += AddDrafts(rows, step);
  const int decode_rows = rows;
  const int share = RowsBesideDecode();
  const int beside = stalls_ >= decoding ? std::max(share, RowsToEndPrompts(rows)) : share;
  const int limit = rows > 0 ? std::min(limits_.rows, rows + beside) : RowsOfPrompts();
  std::vector<std::pair<const Sequence*, Sequence*>> twins;  // who has the rows, and who not
  const auto add_chunk = [&](Sequence& s) {
    const bool replay = s.scheduled >= s.prefill_end;
    const int until = replay ? static_cast<int>(s.tokens.size()) : s.prefill_end;
    const auto room = [&] {
      return static_cast<int>(s.blocks.size() + blocks_.available()) * kKvBlockTokens - s.scheduled;
    };
    const int wanted = std::min(limit - rows, until - s.scheduled);
    while (room() < wanted && Spill(batch)) {
    }
    const int chunk = std::min(wanted, room());
    if (chunk <= 0 || !Grow(s, chunk, batch)) return;
    AddRun(s, chunk, replay, step);
    rows += chunk;
    if (s.remaining() == 0 && s.generated() == 0) AdmitTwins(s, batch, twins);
  };
  // 2. Chunks of what is admitted (the row of a decode above leaves nothing remaining). Copied:
  // twins join running_.
  for (Sequence* s : std::vector<Sequence*>(running_)) {
    if (rows >= limit) break;
    if (!s->blocked() && s->remaining() > 0) add_chunk(*s);
  }
  // 3. New ones.
  while (rows < limit && !free_slots_.empty()) {
    Sequence* s = NextWaiting();
    if (s == nullptr || !Admit(*s, batch)) break;
    if (!s->blocked()) add_chunk(*s);
  }
  // 4. Several half-done prompts hold all blocks: the first goes on, the last gives way.
  if (rows == 0 && !running_.empty() && !AnyInFlight()) {
    Sequence& first = *running_.front();
    if (GrowOrPreempt(first, 1, batch)) add_chunk(first);
  }
  if (rows == 0 && batch.pages.empty()) return std::nullopt;
  const bool stalls = rows - decode_rows > share;
  stalls_ =
      stalls ? stalls_ - decoding : std::min(kMostStalls, stalls_ + decoding / kTokensPerStall);

  // Decode rows come first in the batch.
  std::stable_partition(batch.runs.begin(), batch.runs.end(),
                        [](const Batch::Run& r) { return r.decode != 0; });
  std::unordered_map<int, Sequence*> by_slot;
  for (Sequence* s : running_) by_slot[s->slot] = s;
  int row = 0;
  for (Batch::Run& run : batch.runs) {
    run.row = row;
    row += run.rows;
    if (run.decode != 0) batch.decode_rows += run.rows;
    Sequence& s = *by_slot.at(run.slot);
    step.streams |= !s.records.empty();
    const int known = run.rows - static_cast<int>(s.draft.tokens.size());
    batch.tokens.insert(batch.tokens.end(), s.tokens.begin() + run.pos,
                        s.tokens.begin() + run.pos + known);
    batch.tokens.insert(batch.tokens.end(), s.draft.tokens.begin(), s.draft.tokens.end());
    if (run.pos + known != static_cast<int>(s.tokens.size())) continue;
    AddLogits(s, run.row + known - 1, step);
    s.awaiting_sample = true;
    for (const auto& [of, twin] : twins) {
      if (of != &s) continue;
      batch.logits.push_back(LogitRowFor(*twin, twin->tokens, run.row + run.rows - 1));
      step.sequences.push_back(twin->id);
      step.twins.push_back(twin->id);
    }
  }
  batch.step = next_step_++;
  return step;
}

// For the row of the sequence's last token, and for those of its draft behind it.
void Scheduler::AddLogits(Sequence& s, int row, Step& step) {
  step.batch.logits.push_back(LogitRowFor(s, s.tokens, row));
  step.sequences.push_back(s.id);
  if (s.draft.tokens.empty()) return;
  std::vector<int32_t> history = s.tokens;
  for (const int32_t token : s.draft.tokens) {
    history.push_back(token);
    step.batch.logits.push_back(LogitRowFor(s, history, ++row));
    step.sequences.push_back(s.id);
  }
}

std::vector<Scheduler::Finished> Scheduler::Complete(const Step& step,
                                                     const std::vector<int32_t>& tokens) {
  SHOAL_CHECK(tokens.size() == step.sequences.size(), "one token for each row with logits");
  for (const Batch::Run& run : step.batch.runs) {
    for (Sequence* s : running_) {
      if (s->slot != run.slot) continue;
      --s->steps_in_flight;
      if (s->records.empty() || s->lost) continue;
      const int known = run.rows - static_cast<int>(s->draft.tokens.size());
      s->computed = std::max(s->computed, run.pos + known);
      PublishBlocks(*s);
    }
  }
  for (const SequenceId id : step.twins) --sequences_.at(id)->steps_in_flight;
  std::vector<Finished> finished;
  for (size_t i = 0; i < tokens.size();) {
    Sequence& s = *sequences_.at(step.sequences[i]);
    s.awaiting_sample = false;
    int drawn = 0;
    for (; i < tokens.size() && step.sequences[i] == s.id; ++i) {
      if (s.cancelled || s.lost || tokens[i] == kNoToken) continue;
      s.tokens.push_back(tokens[i]);
      ++drawn;
    }
    if (drawn == 0) {
      s.draft = {};
      continue;
    }
    if (!s.draft.tokens.empty()) TakeDraft(s, drawn - 1);
    if (const FinishReason reason = ReasonToEnd(s); reason != FinishReason::kNone) {
      finished.push_back({s.id, reason});
    }
  }
  for (const Finished& f : finished) Remove(*sequences_.at(f.id));
  EndCancelled(finished);
  Recompute(finished);
  return finished;
}

void Scheduler::StreamFailed(absl::Span<const int> records) {
  for (const int record : records) {
    if (record < 0 || record >= limits_.pages || prefixes_[record].empty()) continue;  // known
    pages_.Forget(record);
    IndexPage(record, {});
    ++totals_.pages_lost;
    for (Sequence* s : running_) {
      s->lost |= std::find(s->records.begin(), s->records.end(), record) != s->records.end();
    }
  }
}

// What lost a page starts over, with the pages that are still there. A disk that keeps nothing (it
// is full) would make that go on for ever.
void Scheduler::Recompute(std::vector<Finished>& finished) {
  for (Sequence* s : std::vector<Sequence*>(running_)) {
    if (!s->lost || s->cancelled || s->steps_in_flight > 0) continue;
    if (++s->losses > kMostLosses) {
      finished.push_back({s->id, FinishReason::kError});
      Remove(*s);
      continue;
    }
    ReleaseBlocks(*s);
    s->scheduled = 0;
    Enqueue(*s, /*front=*/true);
  }
}

// Only the first of running_ can: others were admitted beside it.
bool Scheduler::streaming() const {
  return !running_.empty() && !running_.front()->records.empty();
}

int Scheduler::MostTokens() const {
  const int64_t in_memory = int64_t{limits_.blocks} * kKvBlockTokens;
  return limits_.stream ? limits_.context
                        : static_cast<int>(std::min<int64_t>(limits_.context, in_memory));
}

void Scheduler::EndCancelled(std::vector<Finished>& finished) {
  for (Sequence* s : std::vector<Sequence*>(running_)) {
    if (!s->cancelled || s->steps_in_flight > 0 || s->loading > 0) continue;
    finished.push_back({s->id, FinishReason::kCancelled});
    Remove(*s);
  }
}

bool Scheduler::AnyInFlight() const {
  return std::any_of(running_.begin(), running_.end(),
                     [](const Sequence* s) { return s->steps_in_flight > 0 || s->loading > 0; });
}

std::vector<Scheduler::Finished> Scheduler::TakeCancelled() {
  return std::exchange(cancelled_, {});
}

const Sequence* Scheduler::Find(SequenceId id) const {
  const auto it = sequences_.find(id);
  return it == sequences_.end() ? nullptr : it->second.get();
}

Scheduler::Stats Scheduler::stats() const {
  Stats s = totals_;
  s.waiting = waiting_count_;
  s.running = static_cast<int>(running_.size());
  s.blocks_in_use = blocks_.in_use();
  s.blocks_total = blocks_.total();
  s.pages_in_use = pages_.in_use();
  return s;
}

// Tokens of prompts, admitted or not, that no step has taken yet.
int64_t Scheduler::PromptTokens() const {
  int64_t tokens = waiting_tokens_;
  for (const Sequence* s : running_) {
    if (s->generated() == 0) tokens += s->remaining();
  }
  return tokens;
}

// Prompt rows of a step without decode rows.
int Scheduler::RowsOfPrompts() const {
  if (stages_ == 1) return limits_.rows;
  const int64_t piece = PromptTokens() / (kPiecesPerStage * stages_) / kPrefillTile * kPrefillTile;
  return static_cast<int>(
      std::min<int64_t>(limits_.rows, std::max<int64_t>(kLeastPieceRows, piece)));
}

// Prompt rows of a step that also decodes. Time is shared between the sequences that have their
// first token before them and those that decode, by their number: many prompts beside a few streams
// go fast, few beside many go in pieces that the streams hardly notice. A prompt never gets less
// than kPromptShare, so that a first token does not wait for long.
int Scheduler::RowsBesideDecode() const {
  int rows = kLeastPromptRows;  // until there is a measurement
  if (costs_.decode_s > 0 && costs_.token_s > 0) {
    const auto admitted = std::count_if(running_.begin(), running_.end(), [](const Sequence* s) {
      return s->scheduled < static_cast<int>(s->tokens.size()) && s->generated() == 0;
    });
    const auto decoding =
        static_cast<double>(std::max<int64_t>(1, std::ssize(running_) - admitted));
    const auto prompts =
        static_cast<double>(admitted + std::min<int64_t>(waiting_count_, std::ssize(free_slots_)));
    const double time_s = costs_.decode_s * std::max(kPromptShare, prompts / decoding);
    rows = static_cast<int>(std::min<double>(time_s / costs_.token_s, limits_.rows));
    rows = std::max(rows / kPrefillTile * kPrefillTile, kLeastPromptRows);
  }
  return std::min(rows, limits_.rows_beside_decode);
}

// What one step would have to take beside decode rows for no prompt to be left; 0 when that is more
// than a long step.
int Scheduler::RowsToEndPrompts(int decoding) const {
  if (waiting_count_ > std::ssize(free_slots_)) return 0;
  const int64_t rows = PromptTokens();
  const double token_s = costs_.many_token_s > 0 ? costs_.many_token_s : costs_.token_s;
  const bool fits = rows <= limits_.rows_beside_decode && decoding + rows <= limits_.rows &&
                    token_s > 0 && static_cast<double>(rows) * token_s <= kLongStepS;
  return fits ? static_cast<int>(rows) : 0;
}

Sequence* Scheduler::NextWaiting() {
  if (waiting_.empty()) return nullptr;
  auto it = waiting_.upper_bound(last_client_);
  if (it == waiting_.end()) it = waiting_.begin();
  return it->second.front();
}

void Scheduler::Enqueue(Sequence& s, bool front) {
  std::deque<Sequence*>& queue = waiting_[s.request.client];
  front ? queue.push_front(&s) : queue.push_back(&s);
  ++waiting_count_;
  waiting_tokens_ += static_cast<int64_t>(s.tokens.size());
}

void Scheduler::PopWaiting(const Sequence& s) {
  const auto it = waiting_.find(s.request.client);
  SHOAL_CHECK(it != waiting_.end(), "a sequence without a slot waits");
  std::erase(it->second, &s);
  if (it->second.empty()) waiting_.erase(it);
  --waiting_count_;
  waiting_tokens_ -= static_cast<int64_t>(s.tokens.size());
}

void Scheduler::TakeSlot(Sequence& s) {
  PopWaiting(s);
  last_client_ = s.request.client;
  s.slot = free_slots_.back();
  free_slots_.pop_back();
  s.admitted = ++admissions_;
}

// Takes over cached blocks and a slot. False when the first block it still needs is not there.
bool Scheduler::Admit(Sequence& s, Batch& batch) {
  std::vector<PrefixHash> hashes;  // of every block that could be taken over
  const size_t length = s.tokens.size();
  for (size_t end = kKvBlockTokens; limits_.prefix_cache && end < length; end += kKvBlockTokens) {
    hashes.push_back(
        ExtendPrefix(hashes.empty() ? s.request.salt : hashes.back(),
                     absl::MakeSpan(s.tokens).subspan(end - kKvBlockTokens, kKvBlockTokens)));
  }
  std::vector<int> shared;
  for (const PrefixHash& hash : hashes) {
    const std::optional<int> block = blocks_.Lookup(hash);
    if (!block.has_value()) break;
    shared.push_back(*block);
  }
  const int found = static_cast<int>(shared.size());
  const bool too_long = BlocksFor(static_cast<int64_t>(length)) > limits_.blocks;
  // Enough for the whole prompt, so that two long prompts do not starve each other half-way; beside
  // a sequence that streams, also for it to fill its next page, which it then gives up.
  const int needed =
      BlocksFor(static_cast<int64_t>(length)) - found + (streaming() ? kKvPageBlocks + 1 : 0);
  if (streaming() && blocks_.available() + SpillableBlocks(*running_.front()) >= needed) {
    while (blocks_.available() < needed && Spill(batch)) {
    }
  }
  if (!running_.empty() && (too_long || blocks_.available() < needed)) {
    for (int b : shared) blocks_.Release(b);
    return false;
  }
  TakeSlot(s);
  s.scheduled = found * kKvBlockTokens;
  if (too_long && TakeFromDisk(s, hashes, found, batch)) {
    for (const int b : shared) blocks_.Release(b);
  } else {
    s.blocks = std::move(shared);
    s.hashes.assign(hashes.begin(), hashes.begin() + found);
    for (int i = 0; i < found; ++i) batch.table.push_back({s.slot, i, s.blocks[i]});
    if (!too_long) {
      for (const DiskPart& part : FindOnDisk(hashes, found)) Load(s, part, hashes, batch);
    }
  }
  s.cached_tokens = s.scheduled;
  totals_.cached_tokens += s.scheduled;
  running_.push_back(&s);
  return true;
}

// Blocks for the next `tokens` tokens, nobody else's; all or nothing.
bool Scheduler::Grow(Sequence& s, int tokens, Batch& batch) {
  const int need = BlocksFor(s.scheduled + tokens) - static_cast<int>(s.blocks.size());
  const int tail = s.scheduled / kKvBlockTokens;  // where the first of them goes
  const bool copy = tail < static_cast<int>(s.blocks.size()) && blocks_.shared(s.blocks[tail]);
  if (need + (copy ? 1 : 0) > blocks_.available()) return false;
  if (copy) {
    Batch::PageOp op;
    op.kind = Batch::PageOp::Kind::kCopy;
    op.count = 2;
    op.blocks[0] = s.blocks[tail];
    op.blocks[1] = *blocks_.Allocate();
    batch.pages.push_back(op);
    blocks_.Release(std::exchange(s.blocks[tail], op.blocks[1]));
    batch.table.push_back({s.slot, tail, op.blocks[1]});
  }
  for (int i = 0; i < need; ++i) {
    const int block = *blocks_.Allocate();
    batch.table.push_back({s.slot, static_cast<int32_t>(s.blocks.size()), block});
    s.blocks.push_back(block);
  }
  return true;
}

bool Scheduler::GrowOrPreempt(Sequence& s, int tokens, Batch& batch) {
  while (!Grow(s, tokens, batch)) {
    if (streaming() && Spill(batch)) continue;
    if (!PreemptAnother(s, batch) && !Spill(batch)) return false;
  }
  return true;
}

// The sequence admitted last gives way, unless that is `keep` itself or a step in flight uses its
// blocks.
bool Scheduler::PreemptAnother(const Sequence& keep, Batch& batch) {
  for (auto it = running_.rbegin(); it != running_.rend(); ++it) {
    Sequence& victim = **it;
    if (&victim == &keep) return false;
    if (victim.steps_in_flight > 0 || victim.loading > 0 || victim.cancelled) continue;
    // What it leaves is written before this step; pages that this step fills, with the next.
    std::vector<PendingWrite> later = std::exchange(writes_, {});
    ReleaseBlocks(victim);
    WritePages(batch.pages);
    writes_ = std::move(later);
    victim.scheduled = 0;
    ++totals_.preempted;
    Enqueue(victim, /*front=*/true);
    return true;
  }
  return false;
}

void Scheduler::AddRun(Sequence& s, int rows, bool decode, Step& step) {
  step.batch.runs.push_back({s.slot, 0, rows, s.scheduled, decode ? 1 : 0});
  s.scheduled += rows;
  ++s.steps_in_flight;
  if (s.records.empty()) PublishBlocks(s);
}

// Waiting requests with the same prompt as a sequence whose prompt ends in this batch.
void Scheduler::AdmitTwins(const Sequence& of, Batch& batch,
                           std::vector<std::pair<const Sequence*, Sequence*>>& twins) {
  const auto queue = waiting_.find(of.request.client);
  if (queue == waiting_.end() || !of.records.empty() || !limits_.prefix_cache) return;
  std::vector<Sequence*> found;
  for (Sequence* s : queue->second) {
    if (s->tokens == of.tokens && s->prompt_length == of.prompt_length &&
        s->request.salt == of.request.salt) {
      found.push_back(s);
    }
  }
  for (Sequence* s : found) {
    if (free_slots_.empty()) return;
    TakeSlot(*s);
    s->blocks = of.blocks;
    s->hashes = of.hashes;
    for (size_t i = 0; i < s->blocks.size(); ++i) {
      blocks_.Share(s->blocks[i]);
      batch.table.push_back({s->slot, static_cast<int32_t>(i), s->blocks[i]});
    }
    s->scheduled = of.scheduled;
    s->cached_tokens = of.scheduled;
    totals_.cached_tokens += of.scheduled;
    s->awaiting_sample = true;
    ++s->steps_in_flight;
    running_.push_back(s);
    twins.push_back({&of, s});
  }
}

// Later steps run after the one that fills a block, so it may be shared from now on.
void Scheduler::PublishBlocks(Sequence& s) {
  if (!limits_.prefix_cache && limits_.pages == 0) return;
  const int done = s.records.empty() ? s.scheduled : s.computed;
  while (static_cast<int>(s.hashes.size() + 1) * kKvBlockTokens <= done) {
    const size_t i = s.hashes.size();
    const PrefixHash previous = i == 0 ? s.request.salt : s.hashes.back();
    s.hashes.push_back(ExtendPrefix(
        previous, absl::MakeSpan(s.tokens).subspan(i * kKvBlockTokens, kKvBlockTokens)));
    if (limits_.prefix_cache) blocks_.Publish(s.blocks[i], s.hashes.back());
    const int end = static_cast<int>(i) + 1;
    if (end % kKvPageBlocks == 0) WriteLater(s, end - kKvPageBlocks, end);
  }
}

void Scheduler::ReleaseBlocks(Sequence& s) {
  if (s.loading == 0) {
    const int end = static_cast<int>(s.hashes.size());
    WriteLater(s, end / kKvPageBlocks * kKvPageBlocks, end);
  }
  // Last block first: the least recently used is taken first, and a prefix is useless without its
  // beginning.
  for (auto it = s.blocks.rbegin(); it != s.blocks.rend(); ++it) {
    if (*it >= 0) blocks_.Release(*it);
  }
  for (auto it = s.records.rbegin(); it != s.records.rend(); ++it) pages_.Release(*it);
  s.records.clear();
  s.computed = 0;
  s.lost = false;
  s.blocks.clear();
  s.hashes.clear();
  free_slots_.push_back(s.slot);
  s.slot = -1;
  std::erase(running_, &s);
}

void Scheduler::Remove(Sequence& s) {
  if (s.slot >= 0) ReleaseBlocks(s);
  const SequenceId id = s.id;
  if (drafter_ != nullptr) drafter_->Forget(id);
  sequences_.erase(id);
}

FinishReason Scheduler::ReasonToEnd(const Sequence& s) const {
  if (s.request.embed) return FinishReason::kStop;
  const auto& stops = s.request.stop_tokens;
  if (std::find(stops.begin(), stops.end(), s.tokens.back()) != stops.end())
    return FinishReason::kStop;
  const int64_t most = MostTokens();
  if (s.generated() >= s.request.max_tokens || static_cast<int64_t>(s.tokens.size()) >= most) {
    return FinishReason::kLength;
  }
  return FinishReason::kNone;
}

}  // namespace shoal
