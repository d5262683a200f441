// The heart of the service: admits generations, gives them to the engine, streams what comes, and
// carries them over when the engine has to be started again.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "launcher/engine_link.h"
#include "launcher/journal.h"
#include "launcher/metrics.h"
#include "launcher/tokenizer.h"

namespace shoal {

struct CoordinatorLimits {
  int requests = 1024;                       // unfinished at once
  int64_t prompt_tokens = int64_t{1} << 22;  // of all of them
  int deaths = 3;                            // engines that one request may take along
};

// All calls on one thread; sinks are called on it, also from within Submit's caller's later turns,
// never from within Submit. The link must be set before the first Submit.
class Coordinator : public EngineListener {
 public:
  Coordinator(const Tokenizer& tokenizer, CoordinatorLimits limits, Metrics& metrics);

  void SetLink(EngineLink* link) { link_ = link; }
  // Called when no restart can help (see EngineListener).
  void SetOnImpossible(std::function<void(int, const std::string&)> f) {
    on_impossible_ = std::move(f);
  }

  // kResourceExhausted: full. kUnavailable: no engine, or shutting down. kInvalidArgument: does not
  // fit the context, with the counts. After OK the sink hears until done().
  absl::StatusOr<uint64_t> Submit(GenerateRequest request, GenerateSink sink);
  // The cheap part of Submit's answer, before a prompt is even read.
  absl::Status CheckAdmission() const;
  // The sink hears nothing more.
  void Cancel(uint64_t id);
  // Ends what is past its deadline; call it about ten times a second.
  void Tick();
  // No more admissions.
  void Drain() { draining_ = true; }
  // Ends everything with this error.
  void FailAll(const absl::Status& status);

  size_t unfinished() const { return journal_.size(); }
  bool ready() const { return ready_ && !draining_; }
  bool ever_ready() const { return ever_ready_; }
  const engine::v1::Hello& hello() const { return hello_; }
  const engine::v1::Heartbeat& heartbeat() const { return heartbeat_; }
  double tokens_per_second() const;  // generated, over the last few seconds
  int context() const { return hello_.context(); }

  void OnEngineUp(const engine::v1::Hello& hello) override;
  void OnEngineEvents(const engine::v1::Events& events) override;
  void OnEngineHeartbeat(const engine::v1::Heartbeat& heartbeat) override;
  void OnEngineStats(const engine::v1::Stats& stats) override;
  void OnEngineDown(const std::string& reason) override;
  void OnEngineFailed(const std::string& reason) override;
  void OnEngineImpossible(int exit_code, const std::string& reason) override;

 private:
  void HandleEvent(const engine::v1::Event& event);
  void End(JournalEntry& entry, GenerateUpdate update);

  const Tokenizer& tokenizer_;
  const CoordinatorLimits limits_;
  Metrics& metrics_;
  EngineLink* link_ = nullptr;
  std::function<void(int, const std::string&)> on_impossible_;
  Journal journal_;
  bool ready_ = false;       // new requests are taken; false from OnEngineFailed on
  bool ever_ready_ = false;  // hello_ is valid
  bool engine_up_ = false;
  bool draining_ = false;
  std::string failure_;
  engine::v1::Hello hello_;
  engine::v1::Heartbeat heartbeat_;
  std::deque<std::pair<std::chrono::steady_clock::time_point, int64_t>> token_counts_;
  int64_t generated_ = 0;
};

}  // namespace shoal
