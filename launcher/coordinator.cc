#include "launcher/coordinator.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "launcher/engine_messages.h"

namespace shoal {
namespace {

namespace pb = ::shoal::engine::v1;
using Clock = std::chrono::steady_clock;

double Seconds(Clock::duration d) { return std::chrono::duration<double>(d).count(); }

pb::ToEngine MakeCancel(uint64_t id) {
  pb::ToEngine message;
  message.mutable_cancel()->set_id(id);
  return message;
}

}  // namespace

Coordinator::Coordinator(const Tokenizer& tokenizer, CoordinatorLimits limits, Metrics& metrics)
    : tokenizer_(tokenizer), limits_(limits), metrics_(metrics) {}

absl::Status Coordinator::CheckAdmission() const {
  if (draining_) return absl::UnavailableError("the server is shutting down");
  if (!ready_) {
    return absl::UnavailableError(ever_ready_ ? absl::StrCat("the engine keeps failing: ", failure_)
                                              : "the model is being loaded");
  }
  if (journal_.size() >= static_cast<size_t>(limits_.requests)) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the server is full: ", journal_.size(), " requests are under way"));
  }
  if (journal_.tokens() >= limits_.prompt_tokens) {
    return absl::ResourceExhaustedError(absl::StrCat("the server is full: prompts of ",
                                                     journal_.tokens(), " tokens are under way"));
  }
  return absl::OkStatus();
}

absl::StatusOr<uint64_t> Coordinator::Submit(GenerateRequest request, GenerateSink sink) {
  if (absl::Status s = CheckAdmission(); !s.ok()) return s;
  const auto length = static_cast<int>(request.prompt.size());
  const int context = std::min(hello_.context(), hello_.kv_tokens());
  if (length == 0) return absl::InvalidArgumentError("the prompt is empty");
  if (length >= context) {
    return absl::InvalidArgumentError(absl::StrCat("the prompt has ", length,
                                                   " tokens, but the context holds ", context,
                                                   " and the answer needs at least one"));
  }
  if (journal_.tokens() + length > limits_.prompt_tokens) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the server is full: prompts of ", journal_.tokens(),
                     " tokens are under way, and this one has ", length));
  }
  if (request.max_tokens <= 0) request.max_tokens = context - length;
  JournalEntry& entry = journal_.Add(std::move(request), std::move(sink), tokenizer_);
  if (engine_up_) link_->Send(Journal::MakeSubmit(entry, tokenizer_.end_of_generation_ids()));
  return entry.id;
}

void Coordinator::Cancel(uint64_t id) {
  if (journal_.Find(id) == nullptr) return;
  metrics_.RequestEnded("abort", -1);
  journal_.Remove(id);
  if (engine_up_) link_->Send(MakeCancel(id));
}

void Coordinator::Tick() {
  const Clock::time_point now = Clock::now();
  for (uint64_t id : journal_.Ids()) {
    JournalEntry* entry = journal_.Find(id);
    if (entry == nullptr || !entry->request.deadline.has_value()) continue;
    if (now < *entry->request.deadline) continue;
    if (engine_up_) link_->Send(MakeCancel(id));
    GenerateUpdate update;
    update.error = absl::DeadlineExceededError("the deadline of the request has passed");
    End(*entry, std::move(update));
  }
}

void Coordinator::FailAll(const absl::Status& status) {
  for (uint64_t id : journal_.Ids()) {
    JournalEntry* entry = journal_.Find(id);
    if (entry == nullptr) continue;
    if (engine_up_) link_->Send(MakeCancel(id));
    GenerateUpdate update;
    update.error = status;
    End(*entry, std::move(update));
  }
}

double Coordinator::tokens_per_second() const {
  if (token_counts_.size() < 2) return 0;
  const auto& [from, count] = token_counts_.front();
  const double seconds = Seconds(Clock::now() - from);
  return seconds <= 0 ? 0 : static_cast<double>(generated_ - count) / seconds;
}

// The sink may submit or cancel others; it is called when the entry is gone.
void Coordinator::End(JournalEntry& entry, GenerateUpdate update) {
  update.prompt_tokens = static_cast<int>(entry.request.prompt.size());
  update.completion_tokens = static_cast<int>(entry.generated.size());
  update.cached_tokens = entry.cached_tokens;
  const char* reason = !update.error.ok()                       ? "error"
                       : update.finish == FinishReason::kLength ? "length"
                                                                : "stop";
  metrics_.RequestEnded(reason, Seconds(Clock::now() - entry.submitted));
  const GenerateSink sink = std::move(entry.sink);
  journal_.Remove(entry.id);
  sink(update);
}

void Coordinator::HandleEvent(const pb::Event& event) {
  JournalEntry* entry = journal_.Find(event.id());
  if (entry == nullptr) return;  // cancelled, or cut at a stop string
  GenerateUpdate update;
  if (event.has_token()) {
    const Clock::time_point now = Clock::now();
    if (entry->generated.empty()) {
      entry->cached_tokens = event.cached_tokens();
      metrics_.FirstToken(Seconds(now - entry->submitted),
                          static_cast<int>(entry->request.prompt.size()), entry->cached_tokens);
    } else {
      metrics_.NextToken(Seconds(now - entry->last_token));
    }
    entry->last_token = now;
    entry->deaths = 0;
    entry->generated.push_back(event.token());
    ++generated_;
    update.text = entry->text.Push(event.token());
    GeneratedToken& token = update.tokens.emplace_back();
    token.token = event.token();
    token.logprob = event.logprob();
    for (const pb::Candidate& c : event.top()) token.top.push_back({c.token(), c.logprob()});
  }
  if (entry->text.stopped()) {
    if (event.finish() == pb::FINISH_NONE) link_->Send(MakeCancel(entry->id));
    update.finish = FinishReason::kStop;
    return End(*entry, std::move(update));
  }
  if (event.finish() == pb::FINISH_ERROR) {
    update.error = absl::InternalError(event.error());
    return End(*entry, std::move(update));
  }
  update.finish = FromMessage(event.finish());
  update.embedding.assign(event.embedding().begin(), event.embedding().end());
  if (update.finish != FinishReason::kNone) {
    update.text += entry->text.Finish();
    return End(*entry, std::move(update));
  }
  update.prompt_tokens = static_cast<int>(entry->request.prompt.size());
  update.completion_tokens = static_cast<int>(entry->generated.size());
  update.cached_tokens = entry->cached_tokens;
  // The sink may cancel this very entry; it must not go away under its feet.
  const GenerateSink sink = entry->sink;
  sink(update);
}

void Coordinator::OnEngineUp(const pb::Hello& hello) {
  hello_ = hello;
  engine_up_ = ready_ = ever_ready_ = true;
  failure_.clear();
  for (uint64_t id : journal_.Ids()) {
    link_->Send(Journal::MakeSubmit(*journal_.Find(id), tokenizer_.end_of_generation_ids()));
  }
}

void Coordinator::OnEngineEvents(const pb::Events& events) {
  for (const pb::Event& event : events.events()) HandleEvent(event);
}

void Coordinator::OnEngineHeartbeat(const pb::Heartbeat& heartbeat) {
  heartbeat_ = heartbeat;
  token_counts_.emplace_back(Clock::now(), generated_);
  if (token_counts_.size() > 12) token_counts_.pop_front();  // three seconds
  metrics_.Heartbeat(heartbeat);
}

void Coordinator::OnEngineStats(const pb::Stats& stats) { metrics_.Ranks(stats); }

void Coordinator::OnEngineDown(const std::string& reason) {
  engine_up_ = false;
  failure_ = reason;
  metrics_.EngineRestarted();
  for (uint64_t id : journal_.Ids()) {
    JournalEntry* entry = journal_.Find(id);
    if (entry == nullptr || ++entry->deaths < limits_.deaths) continue;
    GenerateUpdate update;
    update.error = absl::InternalError(absl::StrCat("the engine failed ", entry->deaths,
                                                    " times while it worked on this request"));
    End(*entry, std::move(update));
  }
}

void Coordinator::OnEngineFailed(const std::string& reason) {
  ready_ = false;
  failure_ = reason;
  FailAll(absl::UnavailableError(absl::StrCat("the engine keeps failing: ", reason)));
}

void Coordinator::OnEngineImpossible(int exit_code, const std::string& reason) {
  ready_ = false;
  failure_ = reason;
  FailAll(absl::UnavailableError("the engine cannot start"));
  if (on_impossible_) on_impossible_(exit_code, reason);
}

}  // namespace shoal
