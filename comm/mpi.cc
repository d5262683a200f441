// The MPI backend: messages over MPI, liveness beside it.
#define OMPI_SKIP_MPICXX 1  // only the C interface: the C++ one needs another library
#include <mpi.h>
#include <sched.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "comm/communicator.h"
#include "comm/group.h"
#include "comm/host_name.h"
#include "comm/liveness.h"
#include "comm/net_interface.h"
#include "comm/transport.h"
#include "kernels/check.h"
#include "kernels/mutex.h"
#include "kernels/status_macros.h"

namespace shoal {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kExitUnavailable = 69;  // EX_UNAVAILABLE of sysexits.h

// Copied messages that SendCopy keeps under way at most, together.
constexpr int64_t kCopiesBytesMax = int64_t{256} << 20;
constexpr size_t kCopiesMax = 256;

// After a rank said that it leaves, what it sent before may still arrive for this long.
constexpr absl::Duration kFarewell = absl::Seconds(2);

// Open MPI's request is a pointer, and so fits Pending::Op::handle.
void* ToHandle(MPI_Request request) { return request; }

MPI_Request ToRequest(void* handle) { return static_cast<MPI_Request>(handle); }

// How to wait without starving who we wait for. Spinning saves a wake-up of tens of microseconds,
// but only where the peer has a core of its own.
class Backoff {
 public:
  explicit Backoff(bool may_spin) : may_spin_(may_spin), start_(Clock::now()) {}

  Clock::duration waited() const { return waited_; }

  void Pause() {
    ++turns_;
    if (may_spin_ && turns_ % 64 != 0 && waited_ < kSpin) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
      return;
    }
    waited_ = Clock::now() - start_;
    if (waited_ < kYield) {
      if (!may_spin_ || waited_ >= kSpin) sched_yield();
    } else {
      std::this_thread::sleep_for(waited_ < kNap ? std::chrono::microseconds(50)
                                                 : std::chrono::microseconds(500));
    }
  }

 private:
  static constexpr Clock::duration kSpin = std::chrono::microseconds(30);
  static constexpr Clock::duration kYield = std::chrono::milliseconds(5);
  static constexpr Clock::duration kNap = std::chrono::seconds(1);
  const bool may_spin_;
  const Clock::time_point start_;
  Clock::duration waited_{0};
  int turns_ = 0;
};

// Ends the process unless it is dismissed in time: for calls that cannot be given a deadline.
class Watchdog {
 public:
  Watchdog(absl::Duration patience, std::string message)
      : thread_([this, patience, message = std::move(message)] {
          MutexLock lock(&mu_);
          const Clock::time_point end = Clock::now() + absl::ToChronoNanoseconds(patience);
          while (!dismissed_ && Clock::now() < end) {
            changed_.WaitWithTimeout(&mu_, absl::FromChrono(end - Clock::now()));
          }
          if (dismissed_) return;
          std::fprintf(stderr, "shoal: %s\n", message.c_str());
          _exit(kExitUnavailable);
        }) {}
  ~Watchdog() {
    {
      MutexLock lock(&mu_);
      dismissed_ = true;
    }
    changed_.SignalAll();
    thread_.join();
  }

 private:
  Mutex mu_;
  CondVar changed_;
  bool dismissed_ ABSL_GUARDED_BY(mu_) = false;
  std::thread thread_;
};

class MpiTransport final : public Transport {
 public:
  MpiTransport(MpiOptions options, int rank, int size)
      : options_(std::move(options)), rank_(rank), size_(size), hosts_(size) {}
  ~MpiTransport() override;

  // Collective. Learns the hosts and starts the heartbeats.
  static absl::Status Start(const std::shared_ptr<MpiTransport>& self);

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  std::string host(int rank) const override { return hosts_[rank]; }

  void StartSend(const void* data, int64_t bytes, int peer, int tag, Pending* pending) override;
  void StartRecv(void* data, int64_t bytes, int peer, int tag, Pending* pending) override;
  absl::Status Wait(Pending* pending, Patience patience) override;
  absl::Status SendCopy(const void* data, int64_t bytes, int peer, int tag) override;
  void Break(const absl::Status& reason) override;
  absl::Status broken() const override;

 private:
  struct Copy {
    std::vector<uint8_t> data;
    Pending pending;
  };
  // What one rank tells the others at the start. Plain bytes.
  struct Introduction {
    char host[256];
    char boot[64];     // equal for ranks on one machine
    char network[64];  // and this, for ranks that share its loopback
  };

  static Introduction Introduce();
  absl::StatusOr<Liveness::Listener> OpenListener(bool one_network) const;
  absl::Status StartWatch(GroupCommunicator& world, bool one_network);
  void OnFailure(const JobFailure& failure);
  bool SetBroken(const absl::Status& reason);
  absl::StatusOr<bool> Test(Pending* pending) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mpi_);
  bool WaitUntilAllLeave();
  absl::Status Explain(absl::Status error);
  absl::Status CheckWait(const Pending& pending, Patience patience, Clock::duration waited);
  void ReapCopies() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mpi_);
  void ProgressCopies();

  const MpiOptions options_;
  const int rank_;
  const int size_;
  std::vector<std::string> hosts_;
  bool may_spin_ = false;
  bool watching_ = false;  // every rank has joined
  std::unique_ptr<Liveness> liveness_;
  std::thread exit_;  // ends the process some time after a failure; set by the liveness thread
  Clock::time_point leaver_seen_{};  // when Wait first found that a peer has left

  mutable Mutex state_;
  absl::Status broken_ ABSL_GUARDED_BY(state_);
  std::atomic<bool> is_broken_{false};
  bool closing_ ABSL_GUARDED_BY(state_) = false;
  CondVar closing_changed_;

  // MPI is initialized for one thread at a time. The second one moves copied messages along while
  // this rank computes: a long message needs its sender's help until its last byte.
  Mutex mpi_;
  std::deque<std::unique_ptr<Copy>> copies_ ABSL_GUARDED_BY(mpi_);
  int64_t copies_bytes_ ABSL_GUARDED_BY(mpi_) = 0;
  bool stop_ ABSL_GUARDED_BY(mpi_) = false;
  CondVar copies_changed_;
  std::thread progress_;
};

MpiTransport::~MpiTransport() {
  bool healthy = !is_broken_.load(std::memory_order_acquire);
  if (healthy) {
    // What was sent last must still go out.
    Backoff backoff(may_spin_);
    while (!is_broken_.load(std::memory_order_acquire)) {
      {
        MutexLock lock(&mpi_);
        ReapCopies();
        if (copies_.empty()) break;
      }
      backoff.Pause();
    }
  }
  {
    MutexLock lock(&mpi_);
    stop_ = true;
  }
  copies_changed_.SignalAll();
  if (progress_.joinable()) progress_.join();
  if (WaitUntilAllLeave()) {
    MPI_Finalize();
  } else {
    healthy = false;
  }
  {
    MutexLock lock(&state_);
    closing_ = true;
  }
  closing_changed_.SignalAll();
  liveness_.reset();
  if (exit_.joinable()) exit_.join();
  if (!healthy) {  // MPI may still move bytes from and to these, if anybody calls it
    MutexLock lock(&mpi_);
    for (auto& copy : copies_) static_cast<void>(copy.release());
  }
}

// MPI_Finalize waits for every rank, for ever (and mpirun crashes over one that dies during it). So
// the ranks enter it only when all of them are about to.
bool MpiTransport::WaitUntilAllLeave() {
  if (liveness_ == nullptr || is_broken_.load(std::memory_order_acquire)) return false;
  liveness_->Leave();
  Backoff backoff(may_spin_);
  for (int r = 0; r < size_; ++r) {
    while (!liveness_->has_left(r)) {
      if (is_broken_.load(std::memory_order_acquire)) return false;
      backoff.Pause();
    }
  }
  return true;
}

void MpiTransport::StartSend(const void* data, int64_t bytes, int peer, int tag, Pending* pending) {
  const uint8_t* begin = static_cast<const uint8_t*>(data);
  MutexLock lock(&mpi_);
  while (bytes > 0 && !is_broken_.load(std::memory_order_acquire)) {
    const int n = static_cast<int>(std::min<int64_t>(bytes, 1 << 30));
    MPI_Request request;
    const int error = MPI_Isend(begin, n, MPI_BYTE, peer, tag, MPI_COMM_WORLD, &request);
    if (error != MPI_SUCCESS) request = MPI_REQUEST_NULL;
    // A null request is complete at once, with no bytes: Test sees that.
    pending->ops.push_back({ToHandle(request), n, peer, false});
    begin += n;
    bytes -= n;
    if (error != MPI_SUCCESS) SetBroken(absl::UnavailableError("MPI could not send"));
  }
}

void MpiTransport::StartRecv(void* data, int64_t bytes, int peer, int tag, Pending* pending) {
  uint8_t* begin = static_cast<uint8_t*>(data);
  MutexLock lock(&mpi_);
  while (bytes > 0 && !is_broken_.load(std::memory_order_acquire)) {
    const int n = static_cast<int>(std::min<int64_t>(bytes, 1 << 30));
    MPI_Request request;
    const int error = MPI_Irecv(begin, n, MPI_BYTE, peer, tag, MPI_COMM_WORLD, &request);
    if (error != MPI_SUCCESS) request = MPI_REQUEST_NULL;
    pending->ops.push_back({ToHandle(request), n, peer, true});
    begin += n;
    bytes -= n;
    if (error != MPI_SUCCESS) SetBroken(absl::UnavailableError("MPI could not receive"));
  }
}

absl::StatusOr<bool> MpiTransport::Test(Pending* pending) {
  auto& ops = pending->ops;
  absl::InlinedVector<MPI_Request, 16> requests;
  for (const Pending::Op& op : ops) requests.push_back(ToRequest(op.handle));
  absl::InlinedVector<MPI_Status, 16> statuses(ops.size());
  int done = 0;
  const int count = static_cast<int>(ops.size());
  const int error = MPI_Testall(count, requests.data(), &done, statuses.data());
  if (error != MPI_SUCCESS) {
    int length = 0;
    char text[MPI_MAX_ERROR_STRING] = "";
    int peer = ops.front().peer, code = error;
    for (int i = 0; error == MPI_ERR_IN_STATUS && i < count; ++i) {
      if (statuses[i].MPI_ERROR == MPI_SUCCESS || statuses[i].MPI_ERROR == MPI_ERR_PENDING)
        continue;
      peer = ops[i].peer;
      code = statuses[i].MPI_ERROR;
      break;
    }
    MPI_Error_string(code, text, &length);
    return absl::UnavailableError(
        absl::StrCat("messages with rank ", peer, " on host ", hosts_[peer], " failed: ", text));
  }
  if (!done) {
    for (int i = 0; i < count; ++i) ops[i].handle = ToHandle(requests[i]);
    return false;
  }
  for (int i = 0; i < count; ++i) {
    if (!ops[i].is_recv) continue;
    int bytes = 0;
    MPI_Get_count(&statuses[i], MPI_BYTE, &bytes);
    if (bytes == ops[i].bytes) continue;
    return absl::InternalError(absl::StrCat("rank ", ops[i].peer, " sent ", bytes,
                                            " bytes where rank ", rank_, " expects ",
                                            ops[i].bytes));
  }
  ops.clear();
  return true;
}

absl::Status MpiTransport::Wait(Pending* pending, Patience patience) {
  Backoff backoff(may_spin_);
  leaver_seen_ = {};
  absl::Status status;
  while (true) {
    if (is_broken_.load(std::memory_order_acquire)) {
      pending->ops.clear();  // MPI is not called any more, so nothing moves
      return broken();
    }
    absl::StatusOr<bool> done = false;
    {
      MutexLock lock(&mpi_);
      done = Test(pending);
    }
    if (done.ok() && *done) return absl::OkStatus();
    status = done.status();
    if (status.ok()) status = CheckWait(*pending, patience, backoff.waited());
    if (!status.ok()) {
      status = Explain(status);
      Break(status);
      continue;
    }
    backoff.Pause();
  }
}

absl::Status MpiTransport::CheckWait(const Pending& pending, Patience patience,
                                     Clock::duration waited) {
  if (waited < std::chrono::milliseconds(5)) return absl::OkStatus();
  const int peer = pending.ops.front().peer;
  if (!watching_) {
    if (absl::FromChrono(waited) < options_.start) return absl::OkStatus();
    return absl::UnavailableError(absl::StrCat("rank ", peer, " could not be reached within ",
                                               absl::FormatDuration(options_.start),
                                               "; check that a firewall lets the ranks' hosts "
                                               "talk, or choose another network with --net"));
  }
  if (patience == Patience::kWork && absl::FromChrono(waited) > options_.stall) {
    return absl::UnavailableError(absl::StrCat("rank ", peer, " on host ", hosts_[peer],
                                               " lives but did not come for ",
                                               absl::FormatDuration(options_.stall)));
  }
  for (const Pending::Op& op : pending.ops) {
    if (!liveness_->has_left(op.peer)) continue;
    const Clock::time_point now = Clock::now();
    if (leaver_seen_ == Clock::time_point{}) leaver_seen_ = now;
    if (absl::FromChrono(now - leaver_seen_) < kFarewell) return absl::OkStatus();
    return absl::UnavailableError(
        absl::StrCat("rank ", op.peer, " on host ", hosts_[op.peer], " left the job"));
  }
  return absl::OkStatus();
}

// MPI notices a broken connection a little before the heartbeats do, and knows less. Gives them a
// moment.
absl::Status MpiTransport::Explain(absl::Status error) {
  if (!absl::IsUnavailable(error) || liveness_ == nullptr) return error;
  for (int i = 0; i < 100 && !is_broken_.load(std::memory_order_acquire); ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  absl::Status known = broken();
  return known.ok() ? error : known;
}

absl::Status MpiTransport::SendCopy(const void* data, int64_t bytes, int peer, int tag) {
  auto copy = std::make_unique<Copy>();
  const uint8_t* const begin = static_cast<const uint8_t*>(data);
  copy->data.assign(begin, begin + bytes);
  Backoff backoff(may_spin_);
  while (true) {
    SHOAL_RETURN_IF_ERROR(broken());
    {
      MutexLock lock(&mpi_);
      ReapCopies();
      if (copies_.empty() ||
          (copies_.size() < kCopiesMax && copies_bytes_ + bytes <= kCopiesBytesMax)) {
        break;
      }
    }
    absl::Status status;
    if (absl::FromChrono(backoff.waited()) > options_.stall) {
      status = absl::UnavailableError(
          absl::StrCat("rank ", peer, " on host ", hosts_[peer], " takes no messages"));
      Break(status);
      return status;
    }
    backoff.Pause();
  }
  StartSend(copy->data.data(), bytes, peer, tag, &copy->pending);
  {
    MutexLock lock(&mpi_);
    copies_bytes_ += bytes;
    copies_.push_back(std::move(copy));
    ReapCopies();
  }
  copies_changed_.Signal();
  return broken();
}

void MpiTransport::ReapCopies() {
  for (size_t i = 0; i < copies_.size() && !is_broken_.load(std::memory_order_acquire);) {
    absl::StatusOr<bool> done = Test(&copies_[i]->pending);
    if (!done.ok()) SetBroken(done.status());
    if (!done.ok() || !*done) {
      ++i;
      continue;
    }
    copies_bytes_ -= copies_[i]->data.size();
    copies_.erase(copies_.begin() + i);
  }
}

void MpiTransport::ProgressCopies() {
  MutexLock lock(&mpi_);
  while (!stop_) {
    ReapCopies();
    if (copies_.empty() || is_broken_.load(std::memory_order_acquire)) {
      copies_changed_.Wait(&mpi_);
    } else {
      copies_changed_.WaitWithTimeout(&mpi_, absl::Microseconds(200));
    }
  }
}

// True for the first reason.
bool MpiTransport::SetBroken(const absl::Status& reason) {
  MutexLock lock(&state_);
  if (!broken_.ok()) return false;
  broken_ = reason;
  is_broken_.store(true, std::memory_order_release);
  return true;
}

void MpiTransport::Break(const absl::Status& reason) {
  if (SetBroken(reason) && liveness_ != nullptr) liveness_->Abort(reason);
}

absl::Status MpiTransport::broken() const {
  if (!is_broken_.load(std::memory_order_acquire)) return absl::OkStatus();
  MutexLock lock(&state_);
  return broken_;
}

// On the liveness thread.
void MpiTransport::OnFailure(const JobFailure& failure) {
  if (failure.is_loss && options_.on_peer_lost) {
    options_.on_peer_lost(failure.status, failure.is_reporter);
  }
  SetBroken(failure.status);
  if (failure.is_local) return;  // the rank that aborted knows what it does next
  exit_ = std::thread([this] {
    MutexLock lock(&state_);
    const Clock::time_point end = Clock::now() + absl::ToChronoNanoseconds(options_.exit_after);
    while (!closing_ && Clock::now() < end) {
      closing_changed_.WaitWithTimeout(&state_, absl::FromChrono(end - Clock::now()));
    }
    if (!closing_) _exit(kExitUnavailable);
  });
}

std::string ReadLine(const char* path) {
  char text[64] = "";
  if (std::FILE* file = std::fopen(path, "re")) {
    if (std::fgets(text, sizeof text, file) == nullptr) text[0] = '\0';
    std::fclose(file);
  }
  return text;
}

template <size_t n>
void CopyText(std::string_view text, char (&out)[n]) {
  std::memset(out, 0, n);
  text.copy(out, n - 1);
}

MpiTransport::Introduction MpiTransport::Introduce() {
  Introduction own;
  CopyText(HostName(), own.host);
  CopyText(ReadLine("/proc/sys/kernel/random/boot_id"), own.boot);
  char network[64] = "";
  if (readlink("/proc/self/ns/net", network, sizeof network - 1) < 0) network[0] = '\0';
  CopyText(network, own.network);
  return own;
}

absl::Status MpiTransport::Start(const std::shared_ptr<MpiTransport>& self) {
  auto world = GroupCommunicator::World(self);
  const Introduction own = Introduce();
  std::vector<Introduction> all(self->size_);
  SHOAL_RETURN_IF_ERROR(world->AllGather(&own, sizeof own, all.data()));
  int on_this_machine = 0;
  bool one_network = true;
  for (int r = 0; r < self->size_; ++r) {
    self->hosts_[r] = all[r].host;
    on_this_machine += std::string_view(all[r].boot) == own.boot;
    one_network &= std::string_view(all[r].boot) == own.boot &&
                   std::string_view(all[r].network) == own.network;
  }
  cpu_set_t cpus;
  self->may_spin_ =
      sched_getaffinity(0, sizeof cpus, &cpus) == 0 && on_this_machine <= CPU_COUNT(&cpus);
  SHOAL_RETURN_IF_ERROR(self->StartWatch(*world, one_network));
  self->progress_ = std::thread([raw = self.get()] { raw->ProgressCopies(); });
  return absl::OkStatus();
}

absl::StatusOr<Liveness::Listener> MpiTransport::OpenListener(bool one_network) const {
  if (one_network) return Liveness::Listen("127.0.0.1");
  SHOAL_ASSIGN_OR_RETURN(std::vector<NetInterface> interfaces, ListInterfaces());
  SHOAL_ASSIGN_OR_RETURN(NetInterface chosen, ChooseInterface(interfaces, options_.net));
  return Liveness::Listen(chosen.address);
}

absl::Status MpiTransport::StartWatch(GroupCommunicator& world, bool one_network) {
  LivenessOptions options{rank_, hosts_};
  options.silence = options_.deadline;
  options.interval = options_.deadline / 8;
  options.connect = options_.start;
  const auto on_failure = [this](const JobFailure& failure) { OnFailure(failure); };

  struct Plan {
    Invitation invitation;
    char error[512];  // why there is none
  } plan{};
  if (rank_ == 0) {
    absl::StatusOr<Liveness::Listener> listener = OpenListener(one_network);
    if (listener.ok()) {
      plan.invitation = listener->invitation;
      liveness_ = Liveness::Host(options, *listener, on_failure);
    } else {
      CopyText(std::string(listener.status().message()), plan.error);
    }
  }
  SHOAL_RETURN_IF_ERROR(world.Broadcast(&plan, sizeof plan, 0));
  if (plan.error[0] != '\0') {
    return absl::UnavailableError(absl::StrCat("rank 0 on host ", hosts_[0], ": ", plan.error));
  }

  struct Outcome {
    char error[512];
  } own{};
  if (rank_ != 0) {
    auto joined = Liveness::Join(options, plan.invitation, on_failure);
    if (joined.ok()) {
      liveness_ = *std::move(joined);
    } else {
      CopyText(std::string(joined.status().message()), own.error);
    }
  }
  std::vector<Outcome> outcomes(size_);
  SHOAL_RETURN_IF_ERROR(world.AllGather(&own, sizeof own, outcomes.data()));
  for (int r = 0; r < size_; ++r) {
    if (outcomes[r].error[0] == '\0') continue;
    absl::Status status = absl::UnavailableError(
        absl::StrCat("rank ", r, " on host ", hosts_[r], ": ", outcomes[r].error));
    SetBroken(status);
    return status;
  }
  watching_ = true;
  return absl::OkStatus();
}

// A rank whose mpirun or daemon dies must not live on.
void DieWithLauncher() {
  if (std::getenv("OMPI_COMM_WORLD_RANK") != nullptr) prctl(PR_SET_PDEATHSIG, SIGKILL);
}

}  // namespace

void EndProcessOnPeerLoss(const absl::Status& loss, bool reporter) {
  if (reporter) {
    const std::string line = absl::StrCat("shoal: ", std::string(loss.message()), "\n");
    // Not through stdio, whose lock a stopped main thread may hold.
    if (write(STDERR_FILENO, line.data(), line.size()) < 0) _exit(kExitUnavailable);
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(reporter ? 200 : 1000));
  _exit(kExitUnavailable);
}

absl::StatusOr<std::unique_ptr<Communicator>> MakeMpiCommunicator(const MpiOptions& options) {
  int initialized = 0;
  MPI_Initialized(&initialized);
  if (initialized) {
    return absl::FailedPreconditionError("this process has had its MPI communicator already");
  }
  DieWithLauncher();
  int provided = MPI_THREAD_SINGLE;
  {
    const char* rank = std::getenv("OMPI_COMM_WORLD_RANK");
    Watchdog watchdog(
        options.start,
        absl::StrCat("rank ", rank != nullptr ? rank : "?", " on host ", HostName(),
                     ": MPI did not start within ", absl::FormatDuration(options.start),
                     "; check that all hosts reach each other (--net)"));
    if (MPI_Init_thread(nullptr, nullptr, MPI_THREAD_SERIALIZED, &provided) != MPI_SUCCESS) {
      return absl::UnavailableError("MPI did not start on this host");
    }
  }
  MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
  if (provided < MPI_THREAD_SERIALIZED) {
    return absl::FailedPreconditionError("this MPI was built without thread support");
  }
  void* value = nullptr;
  int found = 0;
  MPI_Comm_get_attr(MPI_COMM_WORLD, MPI_TAG_UB, &value, &found);
  if (!found || *static_cast<int*>(value) < kTagEnd - 1) {
    return absl::FailedPreconditionError("this MPI has too few message tags (28 bits are needed)");
  }
  int rank = 0, size = 1;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  auto transport = std::make_shared<MpiTransport>(options, rank, size);
  SHOAL_RETURN_IF_ERROR(MpiTransport::Start(transport));
  return GroupCommunicator::World(std::move(transport));
}

}  // namespace shoal
