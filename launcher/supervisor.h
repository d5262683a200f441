// Starts the engine job, watches it and starts it again.
#pragma once

#include <chrono>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "boost/asio/io_context.hpp"
#include "boost/asio/local/stream_protocol.hpp"
#include "boost/asio/posix/stream_descriptor.hpp"
#include "boost/asio/steady_timer.hpp"
#include "launcher/engine_link.h"
#include "launcher/process_tree.h"

namespace shoal {

struct SupervisorOptions {
  // The engine's command line without --socket.
  std::vector<std::string> command;
  std::chrono::milliseconds load_timeout{30 * 60 * 1000};
  // Silence of the heartbeat (250 ms) that counts as death.
  std::chrono::milliseconds silence{4000};
  // A step that takes this long, and 20 times as long as the longest one before it, hangs.
  std::chrono::milliseconds hang{5000};
  // The first step of an engine has none before it.
  std::chrono::milliseconds first_step{60 * 1000};
  // Failures in a row, without a token between them, after which nobody should wait any more.
  int failures_max = 5;
};

// All calls on the io_context's one thread.
class Supervisor : public EngineLink {
 public:
  enum class State { kStarting, kReady, kRestarting, kFailed, kStopped };

  // The listener must outlive the supervisor.
  Supervisor(boost::asio::io_context& io, SupervisorOptions options, EngineListener& listener);
  ~Supervisor() override;  // ends the engine

  absl::Status Start();
  void Stop();
  void Send(const engine::v1::ToEngine& message) override;

  State state() const { return state_; }
  const std::string& reason() const { return reason_; }  // of the latest failure; may be empty
  int restarts() const { return restarts_; }
  pid_t pid() const { return child_.pid; }

 private:
  // What belongs to one life of the engine; callbacks of an earlier one find it gone.
  struct Life;
  void Launch();
  void Accept(const std::shared_ptr<Life>& life);
  void Read(const std::shared_ptr<Life>& life);
  void ReadOutput(const std::shared_ptr<Life>& life);
  void Write(const std::shared_ptr<Life>& life);
  bool ParseFrames(const std::shared_ptr<Life>& life);
  void Handle(const engine::v1::FromEngine& message);
  void TakeOutput(Life& life, size_t bytes);
  void DrainOutput();
  void FailClosed();
  void Tick();
  void CheckHeartbeat();
  void Fail(const std::string& reason, std::optional<int> wait_status);

  boost::asio::io_context& io_;
  const SupervisorOptions options_;
  EngineListener& listener_;
  boost::asio::steady_timer ticker_;
  boost::asio::steady_timer relaunch_;
  std::string directory_;
  State state_ = State::kStarting;
  std::string reason_;
  std::string output_tail_;  // the end of what the engine wrote to stderr
  ChildProcess child_;
  std::shared_ptr<Life> life_;
  bool up_ = false;
  bool was_up_ = false;
  int launches_ = 0;
  int restarts_ = 0;
  int failures_ = 0;  // in a row
  int silent_ticks_ = 0;
  engine::v1::Heartbeat heartbeat_;
};

const char* StateName(Supervisor::State state);

}  // namespace shoal
