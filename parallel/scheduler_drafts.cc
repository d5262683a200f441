// The scheduler's side of speculative decoding: who gets rows for a draft, and what became of it.
#include <algorithm>
#include <cmath>
#include <utility>

#include "kernels/backend.h"
#include "parallel/scheduler.h"

namespace shoal {
namespace {

// Draft rows of a step until it is known what they cost; and always allowed.
constexpr int kFewDrafts = 7;
// A row is never quite free: its logits travel and are looked at.
constexpr double kLeastPrice = 0.05;
// What a draft's rows cost counts for less the longer ago it was measured, for it may have been a
// disturbance.
constexpr double kForgetting = 0.99;

}  // namespace

// Of what the step that computes a row earns with each of its `decoding` tokens.
double Scheduler::DraftPrice(int decoding) const {
  if (!costs_.drafts_known() || costs_.step_s <= 0) return kLeastPrice;
  const double row_s = costs_.draft_row_s * std::pow(kForgetting, costs_.draft_age);
  return std::max(kLeastPrice, row_s * decoding / costs_.step_s);
}

// A step takes at most twice as long for its drafts.
int Scheduler::MostDrafts() const {
  if (!costs_.drafts_known() || costs_.step_s <= 0) return kFewDrafts;
  if (costs_.draft_row_s * limits_.rows <= costs_.step_s) return limits_.rows;
  return std::max(kFewDrafts, static_cast<int>(costs_.step_s / costs_.draft_row_s));
}

// Tokens that may follow the one that the sequence draws next, and blocks for them. They never end
// the sequence: only what is drawn last in a step does, which no draft row follows.
int Scheduler::RoomForDrafts(const Sequence& s) const {
  const auto length = static_cast<int64_t>(s.tokens.size());
  const int64_t end =
      std::min<int64_t>(MostTokens(), int64_t{s.prompt_length} + s.request.max_tokens);
  int64_t room = std::min<int64_t>(limits_.draft_max, end - length - 1);
  // A draft may be wrong: it takes no block that a sequence may need for its own next token.
  if (blocks_.available() <= std::ssize(running_) + limits_.draft_max / kKvBlockTokens) {
    room = std::min<int64_t>(room, std::ssize(s.blocks) * kKvBlockTokens - s.scheduled);
  }
  return static_cast<int>(std::max<int64_t>(0, room));
}

// Adds rows to the runs of sequences that decode, `rows` so far; returns how many.
int Scheduler::AddDrafts(int rows, Step& step) {
  if (drafter_ == nullptr || limits_.draft_max <= 0 || rows == 0) return 0;
  const double price = DraftPrice(rows);
  const int most =
      std::min(limits_.rows - rows, limits_.draft_adaptive ? MostDrafts() : limits_.rows);
  int drafted = 0;
  auto next = step.batch.runs.begin();  // the runs are in the order of running_
  for (Sequence* running : running_) {
    if (next == step.batch.runs.end()) break;
    if (next->slot != running->slot) continue;
    Sequence& s = *running;
    Batch::Run& run = *next++;
    const int room = std::min(RoomForDrafts(s), most - drafted);
    if (s.request.embed || room <= 0) continue;
    Draft draft = drafter_->Propose(s.id, s.tokens, room);
    const auto& stops = s.request.stop_tokens;
    const auto stop =
        std::find_first_of(draft.tokens.begin(), draft.tokens.end(), stops.begin(), stops.end());
    draft.tokens.erase(stop, draft.tokens.end());
    if (draft.tokens.empty()) continue;
    const int worth = limits_.draft_adaptive ? s.drafts_held.Worth(draft, price)
                                             : static_cast<int>(draft.tokens.size());
    if (worth == 0) s.drafts_held.Pass(draft);
    if (worth == 0 || !Grow(s, worth, step.batch)) continue;
    draft.tokens.resize(worth);
    s.draft = std::move(draft);
    run.rows += worth;
    drafted += worth;
  }
  step.drafted = drafted;
  return drafted;
}

// The step that checked the draft is done, and the sequence has the tokens it drew: those before
// the last one are the draft's, and so are computed. What follows them in its blocks is of no use,
// and the rows to come write over it.
void Scheduler::TakeDraft(Sequence& s, int accepted) {
  const Draft draft = std::exchange(s.draft, {});
  totals_.drafted_tokens += std::ssize(draft.tokens);
  totals_.accepted_tokens += accepted;
  s.drafts_held.Learn(draft, accepted);
  drafts_held_.Learn(draft, accepted);
  if (accepted == 0) return;
  s.scheduled += accepted;
  if (!s.records.empty()) s.computed = s.scheduled;
  PublishBlocks(s);
}

}  // namespace shoal
