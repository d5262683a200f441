#include "launcher/engine_process.h"

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/mutex.h"
#include "kernels/status_macros.h"
#include "launcher/engine_messages.h"
#include "launcher/frame.h"
#include "launcher/json_constraint.h"
#include "launcher/proto/engine.pb.h"

namespace shoal {
namespace {

namespace pb = ::shoal::engine::v1;
using Clock = std::chrono::steady_clock;

constexpr absl::Duration kHeartbeat = absl::Milliseconds(250);
// How long the engine thread may take to notice that the coordinator is gone before the process
// ends anyway: it may hang in a collective with a dead peer.
constexpr absl::Duration kGrace = absl::Seconds(5);
// Commands that an idle engine waits for each other, and for how long.
constexpr absl::Duration kQuiet = absl::Milliseconds(1);
constexpr size_t kTogether = 8;
// The coordinator bounds what it submits; this bounds what a faulty one could.
constexpr size_t kMaxCommands = 1 << 16;

int64_t NowMs() {
  return std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now().time_since_epoch())
      .count();
}

// What the reader thread hands to the engine thread.
class CommandQueue {
 public:
  // False when the queue is full.
  bool Push(pb::ToEngine command) {
    MutexLock lock(&mu_);
    if (commands_.size() >= kMaxCommands) return false;
    commands_.push_back(std::move(command));
    cv_.Signal();
    return true;
  }
  void Close() {
    MutexLock lock(&mu_);
    closed_ = true;
    cv_.SignalAll();
  }
  // Everything that waits; when `wait`, sleeps until there is something or the queue is closed, and
  // then for what comes at the same time: requests that are computed together are sooner done.
  std::deque<pb::ToEngine> Take(bool wait, bool* closed) {
    MutexLock lock(&mu_);
    while (wait && commands_.empty() && !closed_) cv_.Wait(&mu_);
    for (size_t seen = 0; wait && !closed_ && seen < std::min(commands_.size(), kTogether);) {
      seen = commands_.size();
      cv_.WaitWithTimeout(&mu_, kQuiet);
    }
    *closed = closed_;
    return std::exchange(commands_, {});
  }

 private:
  Mutex mu_;
  CondVar cv_;
  std::deque<pb::ToEngine> commands_ ABSL_GUARDED_BY(mu_);
  bool closed_ ABSL_GUARDED_BY(mu_) = false;
};

// Set once: the engine thread is done.
class Finished {
 public:
  void Set() {
    MutexLock lock(&mu_);
    set_ = true;
    cv_.SignalAll();
  }
  // True when it was set within the time.
  bool WaitFor(absl::Duration timeout) {
    const absl::Time deadline = absl::Now() + timeout;
    MutexLock lock(&mu_);
    while (!set_) {
      if (cv_.WaitWithDeadline(&mu_, deadline) && !set_) return false;
    }
    return true;
  }

 private:
  Mutex mu_;
  CondVar cv_;
  bool set_ ABSL_GUARDED_BY(mu_) = false;
};

// Numbers that the engine thread sets and the heartbeat thread sends.
class Pulse {
 public:
  explicit Pulse(const Scheduler::Stats& stats) : stats_(stats) {}
  void StepBegins() { step_since_ms_.store(NowMs()); }
  void StepEnds(const Scheduler::Stats& stats, int tokens) {
    const int64_t ms = NowMs() - step_since_ms_.exchange(0);
    MutexLock lock(&mu_);
    stats_ = stats;
    ++steps_;
    generated_ += tokens;
    total_ms_ += ms;
    longest_ms_ = std::max(longest_ms_, ms);
  }
  pb::FromEngine Message() {
    pb::FromEngine m;
    pb::Heartbeat& h = *m.mutable_heartbeat();
    const int64_t since = step_since_ms_.load();
    h.set_step_running_ms(since == 0 ? 0 : std::max<int64_t>(1, NowMs() - since));
    MutexLock lock(&mu_);
    h.set_running(stats_.running);
    h.set_waiting(stats_.waiting);
    h.set_blocks_in_use(stats_.blocks_in_use);
    h.set_blocks_total(stats_.blocks_total);
    h.set_preempted(stats_.preempted);
    h.set_prompt_tokens(stats_.prompt_tokens);
    h.set_cached_tokens(stats_.cached_tokens);
    h.set_generated_tokens(generated_);
    h.set_steps(steps_);
    h.set_longest_step_ms(longest_ms_);
    h.set_step_seconds(static_cast<double>(total_ms_) / 1e3);
    h.set_disk_tokens(stats_.disk_tokens);
    h.set_pages_written(stats_.pages_written);
    h.set_pages_lost(stats_.pages_lost);
    h.set_drafted_tokens(stats_.drafted_tokens);
    h.set_accepted_tokens(stats_.accepted_tokens);
    return m;
  }

 private:
  std::atomic<int64_t> step_since_ms_{0};  // 0: no step runs
  Mutex mu_;
  Scheduler::Stats stats_ ABSL_GUARDED_BY(mu_);
  int64_t steps_ ABSL_GUARDED_BY(mu_) = 0;
  int64_t generated_ ABSL_GUARDED_BY(mu_) = 0;
  int64_t total_ms_ ABSL_GUARDED_BY(mu_) = 0;
  int64_t longest_ms_ ABSL_GUARDED_BY(mu_) = 0;
};

class Socket {
 public:
  static absl::StatusOr<std::unique_ptr<Socket>> Connect(const std::string& path) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    if (path.size() >= sizeof address.sun_path) {
      return absl::InvalidArgumentError(absl::StrCat("socket path ", path, " is too long"));
    }
    std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
    const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) return absl::UnavailableError(absl::StrCat("socket: ", strerror(errno)));
    auto s = std::make_unique<Socket>(fd);
    if (connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0) {
      return absl::UnavailableError(
          absl::StrCat("cannot reach the coordinator at ", path, ": ", strerror(errno),
                       ". This command is started by shoal serve; rank 0 must run on its host"));
    }
    return s;
  }
  explicit Socket(int fd) : fd_(fd) {}
  ~Socket() { close(fd_); }
  absl::Status Write(const pb::FromEngine& m) {
    MutexLock lock(&mu_);
    return WriteFrame(fd_, m);
  }
  absl::Status Read(pb::ToEngine* m) { return ReadFrame(fd_, m); }
  // Wakes up a reader.
  void Shutdown() { shutdown(fd_, SHUT_RDWR); }

 private:
  const int fd_;
  Mutex mu_;
};

pb::FromEngine MakeHello(const Session& session, const std::vector<RankStats>& stats) {
  pb::FromEngine m;
  pb::Hello& h = *m.mutable_hello();
  const Rank& rank = session.engine.rank();
  const ShardPlan& plan = rank.plan();
  h.set_protocol(kEngineProtocol);
  h.set_vocab_size(session.config.vocab);
  h.set_context(session.options.context);
  h.set_slots(session.options.sequences);
  // Where a context may be larger than what is in memory, it is what a request may take.
  h.set_kv_tokens(StreamsKv(session.options, rank.page_records())
                      ? std::max(session.options.kv_tokens, session.options.context)
                      : session.options.kv_tokens);
  h.set_tp(plan.tp);
  h.set_pp(plan.pp);
  h.set_pid(getpid());
  h.set_load_seconds(session.load_seconds);
  h.set_backend(rank.DescribeBackend());
  for (const RankPlan& p : plan.ranks) {
    pb::RankInfo& r = *h.add_ranks();
    r.set_rank(p.rank);
    r.set_host(rank.mesh().world().host(p.rank));
    r.set_stage(p.stage);
    r.set_layer_begin(static_cast<int>(p.layers.begin));
    r.set_layer_end(static_cast<int>(p.layers.end));
    r.set_heads(static_cast<int>(p.q_heads.size()));
    r.set_kv_heads(static_cast<int>(p.kv_heads.size()));
    const RankMemory& memory = stats[p.rank].memory;
    r.set_weight_bytes(memory.weights);
    r.set_kv_bytes(memory.kv);
    r.set_workspace_bytes(memory.workspace);
    r.set_streamed_bytes(memory.streamed);
  }
  return m;
}

// Brings the ranks' statistics to the coordinator about once a second while steps are computed, and
// once more when they end. A question is answered by the next call, so that no step waits for it.
class StatsReporter {
 public:
  StatsReporter(Engine& engine, Socket& socket) : engine_(engine), socket_(socket) {}

  absl::Status AfterStep() {
    current_ = false;
    if (Clock::now() < next_) return absl::OkStatus();
    next_ = Clock::now() + kStatsInterval;
    if (asked_) SHOAL_RETURN_IF_ERROR(Report());
    return Ask();
  }
  absl::Status WhenIdle() {
    if (current_) return absl::OkStatus();
    if (asked_) SHOAL_RETURN_IF_ERROR(Report());
    SHOAL_RETURN_IF_ERROR(Ask());
    current_ = true;
    return Report();
  }

 private:
  absl::Status Ask() {
    asked_ = true;
    return engine_.AskRankStats();
  }
  absl::Status Report() {
    asked_ = false;
    SHOAL_ASSIGN_OR_RETURN(const std::vector<RankStats> all, engine_.TakeRankStats());
    pb::FromEngine message;
    for (const RankStats& s : all) {
      pb::RankStats& r = *message.mutable_stats()->add_ranks();
      r.set_steps(s.steps);
      r.set_step_seconds(s.step_seconds);
      r.set_all_reduce_seconds(s.all_reduce_seconds);
      r.set_stream_wait_seconds(s.stream_wait_seconds);
      r.set_streamed_bytes(s.bytes_streamed);
    }
    return socket_.Write(message);
  }

  static constexpr std::chrono::seconds kStatsInterval{1};
  Engine& engine_;
  Socket& socket_;
  Clock::time_point next_;
  bool asked_ = false;
  bool current_ = true;  // no step since the last report
};

// The engine thread's side: ids, constraints, events.
class Server {
 public:
  Server(Session& session, Socket& socket, CommandQueue& commands, Pulse& pulse)
      : session_(session),
        engine_(session.engine),
        socket_(socket),
        commands_(commands),
        pulse_(pulse),
        stats_(session.engine, socket) {
    engine_.SetTokenMask([this](SequenceId id, absl::Span<const int32_t> tokens) {
      const auto it = constraints_.find(id);
      return it == constraints_.end() ? std::vector<uint64_t>() : it->second.Mask(tokens);
    });
  }

  absl::Status Run() {
    for (;;) {
      if (engine_.idle()) SHOAL_RETURN_IF_ERROR(stats_.WhenIdle());
      bool closed = false;
      const std::deque<pb::ToEngine> commands = commands_.Take(engine_.idle(), &closed);
      if (closed) return absl::OkStatus();
      pb::FromEngine out;
      for (const pb::ToEngine& c : commands) Apply(c, *out.mutable_events());
      pulse_.StepBegins();
      absl::StatusOr<std::vector<TokenEvent>> events = engine_.Step();
      SHOAL_RETURN_IF_ERROR(events.status());
      int tokens = 0;
      for (TokenEvent& e : *events) {
        tokens += e.has_token ? 1 : 0;
        Report(e, *out.mutable_events());
      }
      pulse_.StepEnds(engine_.stats(), tokens);
      if (out.events().events_size() > 0) SHOAL_RETURN_IF_ERROR(socket_.Write(out));
      SHOAL_RETURN_IF_ERROR(stats_.AfterStep());
    }
  }

 private:
  struct Known {
    uint64_t id = 0;
    bool reported_cache = false;
  };

  void Apply(const pb::ToEngine& command, pb::Events& out) {
    if (command.has_cancel()) {
      const auto it = sequence_of_.find(command.cancel().id());
      if (it != sequence_of_.end()) engine_.Cancel(it->second);
    } else if (command.has_submit()) {
      if (absl::Status s = Submit(command.submit()); !s.ok()) {
        pb::Event& e = *out.add_events();
        e.set_id(command.submit().id());
        e.set_finish(pb::FINISH_ERROR);
        e.set_error(std::string(s.message()));
      }
    }
  }

  absl::Status Submit(const pb::Submit& submit) {
    for (int32_t t : submit.tokens()) {
      if (t < 0 || t >= session_.config.vocab) {
        return absl::InvalidArgumentError(
            absl::StrCat("token ", t, " of a vocabulary of ", session_.config.vocab));
      }
    }
    std::optional<JsonConstraint> constraint;
    if (!submit.json_schema().empty()) {
      if (vocabulary_ == nullptr) {
        vocabulary_ = std::make_unique<ConstraintVocabulary>(*session_.tokenizer);
      }
      SHOAL_ASSIGN_OR_RETURN(std::shared_ptr<const JsonGrammar> grammar,
                             JsonGrammar::FromSchema(submit.json_schema()));
      constraint.emplace(std::move(grammar), *vocabulary_, submit.prompt_length());
    }
    SHOAL_ASSIGN_OR_RETURN(const SequenceId id, engine_.Submit(FromMessage(submit)));
    known_[id] = {submit.id(), false};
    sequence_of_[submit.id()] = id;
    if (constraint.has_value()) constraints_.emplace(id, *std::move(constraint));
    return absl::OkStatus();
  }

  void Report(TokenEvent& event, pb::Events& out) {
    const auto it = known_.find(event.id);
    if (it == known_.end()) return;
    pb::Event& e = *out.add_events();
    e.set_id(it->second.id);
    e.set_has_token(event.has_token);
    e.set_finish(ToMessage(event.finish));
    if (event.has_token) {
      e.set_token(event.token);
      e.set_logprob(event.sample.logprob);
      for (const Candidate& c : event.sample.top) {
        pb::Candidate& top = *e.add_top();
        top.set_token(c.token);
        top.set_logprob(c.logit);
      }
      if (!it->second.reported_cache) {
        it->second.reported_cache = true;
        e.set_cached_tokens(event.cached_tokens);
      }
    }
    e.mutable_embedding()->Add(event.embedding.begin(), event.embedding.end());
    if (event.finish == FinishReason::kNone) return;
    constraints_.erase(event.id);
    sequence_of_.erase(it->second.id);
    known_.erase(it);
  }

  Session& session_;
  Engine& engine_;
  Socket& socket_;
  CommandQueue& commands_;
  Pulse& pulse_;
  StatsReporter stats_;
  std::unique_ptr<ConstraintVocabulary> vocabulary_;  // made when first needed
  std::unordered_map<SequenceId, Known> known_;
  std::unordered_map<uint64_t, SequenceId> sequence_of_;
  std::unordered_map<SequenceId, JsonConstraint> constraints_;
};

void ReadCommands(Socket& socket, CommandQueue& commands, Finished& finished) {
  for (;;) {
    pb::ToEngine command;
    if (!socket.Read(&command).ok() || !commands.Push(std::move(command))) break;
  }
  commands.Close();
  if (!finished.WaitFor(kGrace)) _exit(0);  // hangs with nobody left to tell
}

}  // namespace

absl::Status ServeEngine(Session& session, const std::string& socket_path) {
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<Socket> socket, Socket::Connect(socket_path));
  SHOAL_RETURN_IF_ERROR(session.engine.AskRankStats());
  SHOAL_ASSIGN_OR_RETURN(const std::vector<RankStats> stats, session.engine.TakeRankStats());
  SHOAL_RETURN_IF_ERROR(socket->Write(MakeHello(session, stats)));
  CommandQueue commands;
  Finished finished;
  Pulse pulse(session.engine.stats());
  std::thread reader([&] { ReadCommands(*socket, commands, finished); });
  std::thread heart([&] {
    while (!finished.WaitFor(kHeartbeat)) {
      if (!socket->Write(pulse.Message()).ok()) return;
    }
  });
  const absl::Status status = Server(session, *socket, commands, pulse).Run();
  finished.Set();
  socket->Shutdown();
  reader.join();
  heart.join();
  session.engine.SetTokenMask(nullptr);
  return status;
}

}  // namespace shoal
