#include "launcher/supervisor.h"

#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <utility>

#include "absl/strings/str_cat.h"
#include "boost/asio/buffer.hpp"
#include "boost/asio/write.hpp"
#include "launcher/engine_process.h"
#include "launcher/exit_code.h"
#include "launcher/frame.h"
#include "launcher/log.h"

namespace shoal {
namespace {

namespace pb = ::shoal::engine::v1;
namespace asio = boost::asio;
using boost::system::error_code;
using std::chrono::milliseconds;

// Ticks, not a clock, measure silence: a coordinator that was suspended itself does not blame the
// engine for it.
constexpr milliseconds kTick{250};
constexpr int kHangFactor = 20;
constexpr milliseconds kGoodbye{1500};
constexpr milliseconds kLastWords{50};
constexpr size_t kReadBytes = 64 << 10;
constexpr size_t kOutputTailBytes = 4096;

// The first restart is at once, then ever slower.
milliseconds Backoff(int failures) {
  if (failures <= 1) return milliseconds(0);
  return milliseconds(std::min(30'000, 250 << std::min(failures, 8)));
}

bool MendableByRestart(int exit_code) {
  switch (exit_code) {
    case kExitUsage:
    case kExitNoMemory:
    case kExitMalformed:
    case kExitNoInput:
    case kExitNotPermitted:
    case kExitConfig:
      return false;
    default:
      return true;
  }
}

}  // namespace

const char* StateName(Supervisor::State state) {
  switch (state) {
    case Supervisor::State::kStarting:
      return "starting";
    case Supervisor::State::kReady:
      return "ready";
    case Supervisor::State::kRestarting:
      return "restarting";
    case Supervisor::State::kFailed:
      return "failed";
    case Supervisor::State::kStopped:
      return "stopping";
  }
  return "unknown";
}

struct Supervisor::Life {
  explicit Life(asio::io_context& io) : acceptor(io), socket(io), output(io) {}
  asio::local::stream_protocol::acceptor acceptor;
  asio::local::stream_protocol::socket socket;
  asio::posix::stream_descriptor output;
  std::array<char, 4096> output_buffer{};
  std::string line;
  std::string path;
  std::string received;
  std::array<char, kReadBytes> buffer{};
  std::deque<std::string> to_write;
  std::chrono::steady_clock::time_point started = std::chrono::steady_clock::now();
};

Supervisor::Supervisor(asio::io_context& io, SupervisorOptions options, EngineListener& listener)
    : io_(io), options_(std::move(options)), listener_(listener), ticker_(io), relaunch_(io) {}

Supervisor::~Supervisor() {
  Stop();
  if (!directory_.empty()) {
    std::error_code ignored;
    std::filesystem::remove_all(directory_, ignored);
  }
}

absl::Status Supervisor::Start() {
  AdoptOrphans();
  const char* runtime = std::getenv("XDG_RUNTIME_DIR");
  for (const std::string& base :
       {std::string(runtime == nullptr ? "" : runtime), std::string("/tmp")}) {
    if (base.empty() || base.size() > 60) continue;
    std::string name = base + "/shoal-XXXXXX";  // mode 0700
    if (mkdtemp(name.data()) == nullptr) continue;
    directory_ = name;
    break;
  }
  if (directory_.empty()) {
    return absl::UnavailableError(absl::StrCat(
        "cannot make a directory for the engine's socket in $XDG_RUNTIME_DIR or /tmp: ",
        strerror(errno)));
  }
  Launch();
  Tick();
  return absl::OkStatus();
}

void Supervisor::Stop() {
  if (state_ == State::kStopped) return;
  state_ = State::kStopped;
  ticker_.cancel();
  relaunch_.cancel();
  up_ = false;
  life_.reset();  // closes the socket, upon which the engine ends by itself
  const auto until = std::chrono::steady_clock::now() + kGoodbye;
  while (child_.pid > 0 && !ReapChildren(child_.pid).has_value() &&
         std::chrono::steady_clock::now() < until) {
    usleep(5000);
  }
  if (child_.pid > 0) KillDescendants();
  child_ = {};
}

void Supervisor::Launch() {
  if (state_ == State::kStopped) return;
  auto life = std::make_shared<Life>(io_);
  life_ = life;
  silent_ticks_ = 0;
  heartbeat_.Clear();
  output_tail_.clear();
  life->path = absl::StrCat(directory_, "/engine-", launches_++);
  error_code error;
  const asio::local::stream_protocol::endpoint endpoint(life->path);
  life->acceptor.open(endpoint.protocol(), error);
  if (!error) life->acceptor.bind(endpoint, error);
  if (!error) life->acceptor.listen(1, error);
  if (error) return Fail(absl::StrCat("socket ", life->path, ": ", error.message()), std::nullopt);
  std::vector<std::string> command = options_.command;
  // A host that went away must not keep the others from going on.
  if (restarts_ > 0) command.push_back("--allow-fewer-hosts");
  command.push_back("--socket");
  command.push_back(life->path);
  absl::StatusOr<ChildProcess> child = StartProcess(command);
  if (!child.ok()) return Fail(std::string(child.status().message()), std::nullopt);
  child_ = *child;
  life->output.assign(child_.output_fd);
  Accept(life);
  ReadOutput(life);
}

void Supervisor::Accept(const std::shared_ptr<Life>& life) {
  life->acceptor.async_accept(life->socket, [this, life](error_code error) {
    if (life != life_) return;
    if (error) return Fail(absl::StrCat("socket: ", error.message()), std::nullopt);
    ucred peer{};
    socklen_t size = sizeof peer;
    if (getsockopt(life->socket.native_handle(), SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0 ||
        peer.uid != geteuid()) {
      life->socket.close();
      return Accept(life);
    }
    life->acceptor.close();
    Read(life);
  });
}

void Supervisor::Read(const std::shared_ptr<Life>& life) {
  life->socket.async_read_some(asio::buffer(life->buffer),
                               [this, life](error_code error, size_t bytes) {
                                 if (life != life_) return;
                                 if (error) return FailClosed();
                                 life->received.append(life->buffer.data(), bytes);
                                 if (ParseFrames(life) && life == life_) Read(life);
                               });
}

bool Supervisor::ParseFrames(const std::shared_ptr<Life>& life) {
  size_t at = 0;
  while (life->received.size() - at >= kFrameHeaderBytes) {
    uint8_t header[kFrameHeaderBytes];
    std::memcpy(header, life->received.data() + at, sizeof header);
    uint32_t bytes = 0;
    if (absl::Status s = ParseFrameHeader(header, &bytes); !s.ok()) {
      Fail(std::string(s.message()), std::nullopt);
      return false;
    }
    if (life->received.size() - at < kFrameHeaderBytes + bytes) break;
    pb::FromEngine message;
    if (!message.ParseFromArray(life->received.data() + at + kFrameHeaderBytes,
                                static_cast<int>(bytes))) {
      Fail("the engine sent a frame that does not parse", std::nullopt);
      return false;
    }
    at += kFrameHeaderBytes + bytes;
    Handle(message);
    if (life != life_) return false;
  }
  life->received.erase(0, at);
  return true;
}

void Supervisor::Handle(const pb::FromEngine& message) {
  silent_ticks_ = 0;
  if (message.has_hello()) {
    if (message.hello().protocol() != kEngineProtocol) {
      return Fail("the engine speaks another version of the protocol: was the binary replaced?",
                  std::nullopt);
    }
    up_ = was_up_ = true;
    state_ = State::kReady;
    listener_.OnEngineUp(message.hello());
  } else if (message.has_events()) {
    for (const pb::Event& e : message.events().events()) {
      if (e.has_token()) failures_ = 0;
    }
    listener_.OnEngineEvents(message.events());
  } else if (message.has_heartbeat()) {
    heartbeat_ = message.heartbeat();
    listener_.OnEngineHeartbeat(heartbeat_);
  } else if (message.has_stats()) {
    listener_.OnEngineStats(message.stats());
  }
}

void Supervisor::ReadOutput(const std::shared_ptr<Life>& life) {
  life->output.async_read_some(asio::buffer(life->output_buffer),
                               [this, life](error_code error, size_t bytes) {
                                 if (error || life != life_) return;
                                 TakeOutput(*life, bytes);
                                 ReadOutput(life);
                               });
}

// The first `bytes` of the buffer.
void Supervisor::TakeOutput(Life& life, size_t bytes) {
  output_tail_.append(life.output_buffer.data(), bytes);
  if (output_tail_.size() > kOutputTailBytes) {
    output_tail_.erase(0, output_tail_.size() - kOutputTailBytes);
  }
  life.line.append(life.output_buffer.data(), bytes);
  for (size_t end; (end = life.line.find('\n')) != std::string::npos;) {
    LogInfo(absl::StrCat("engine: ", life.line.substr(0, end)));
    life.line.erase(0, end + 1);
  }
  if (life.line.size() > kOutputTailBytes) life.line.clear();
}

// The last words of an engine that just ended.
void Supervisor::DrainOutput() {
  if (life_ == nullptr || !life_->output.is_open()) return;
  error_code ignored;
  life_->output.native_non_blocking(true, ignored);
  size_t taken = 0;  // it may go on for ever
  for (ssize_t n;
       taken < kReadBytes && (n = read(life_->output.native_handle(), life_->output_buffer.data(),
                                       life_->output_buffer.size())) > 0;) {
    TakeOutput(*life_, static_cast<size_t>(n));
    taken += static_cast<size_t>(n);
  }
}

void Supervisor::Send(const pb::ToEngine& message) {
  if (!up_) return;
  life_->to_write.push_back(EncodeFrame(message));
  if (life_->to_write.size() == 1) Write(life_);
}

void Supervisor::Write(const std::shared_ptr<Life>& life) {
  asio::async_write(life->socket, asio::buffer(life->to_write.front()),
                    [this, life](error_code error, size_t) {
                      if (life != life_) return;
                      if (error) return FailClosed();
                      life->to_write.pop_front();
                      if (!life->to_write.empty()) Write(life);
                    });
}

void Supervisor::Tick() {
  ticker_.expires_after(kTick);
  ticker_.async_wait([this](error_code error) {
    if (error || state_ == State::kStopped) return;
    ++silent_ticks_;
    if (life_ != nullptr && child_.pid > 0) {
      if (const std::optional<int> status = ReapChildren(child_.pid); status.has_value()) {
        Fail(absl::StrCat("the engine ended with ", DescribeWaitStatus(*status)), status);
      } else if (up_) {
        CheckHeartbeat();
      } else if (std::chrono::steady_clock::now() - life_->started > options_.load_timeout) {
        Fail("the engine did not load in time", std::nullopt);
      }
    }
    if (state_ != State::kStopped) Tick();
  });
}

void Supervisor::CheckHeartbeat() {
  if (silent_ticks_ * kTick > options_.silence) {
    return Fail(
        absl::StrCat("no heartbeat from the engine for ", (silent_ticks_ * kTick).count(), " ms"),
        std::nullopt);
  }
  const milliseconds limit =
      heartbeat_.steps() == 0
          ? options_.first_step
          : std::max(options_.hang, kHangFactor * milliseconds(heartbeat_.longest_step_ms()));
  if (milliseconds(heartbeat_.step_running_ms()) > limit) {
    Fail(absl::StrCat("a step hangs since ", heartbeat_.step_running_ms(), " ms"), std::nullopt);
  }
}

// Its socket is closed: how it ended says more, and is known in a moment if it is no MPI job.
void Supervisor::FailClosed() {
  const auto until = std::chrono::steady_clock::now() + kLastWords;
  std::optional<int> status;
  while (child_.pid > 0 && !(status = ReapChildren(child_.pid)).has_value() &&
         std::chrono::steady_clock::now() < until) {
    usleep(1000);
  }
  Fail("the engine closed its socket", status);
}

void Supervisor::Fail(const std::string& reason, std::optional<int> wait_status) {
  if (state_ == State::kStopped) return;
  if (!wait_status.has_value() && child_.pid > 0) wait_status = ReapChildren(child_.pid);
  reason_ = reason;
  if (wait_status.has_value() && reason.find("ended with") == std::string::npos) {
    absl::StrAppend(&reason_, " (", DescribeWaitStatus(*wait_status), ")");
  }
  up_ = false;
  DrainOutput();
  life_.reset();
  KillDescendants();
  child_ = {};
  ++failures_;
  if (!was_up_ && wait_status.has_value() && WIFEXITED(*wait_status) &&
      !MendableByRestart(WEXITSTATUS(*wait_status))) {
    state_ = State::kStopped;
    listener_.OnEngineImpossible(WEXITSTATUS(*wait_status), output_tail_);
    return;
  }
  LogWarning(absl::StrCat("engine lost: ", reason_, "; failure ", failures_, " in a row"));
  ++restarts_;
  listener_.OnEngineDown(reason_);
  if (failures_ >= options_.failures_max) {
    state_ = State::kFailed;
    listener_.OnEngineFailed(reason_);
  } else {
    state_ = was_up_ ? State::kRestarting : State::kStarting;
  }
  relaunch_.expires_after(Backoff(failures_));
  relaunch_.async_wait([this](error_code error) {
    if (!error) Launch();
  });
}

}  // namespace shoal
