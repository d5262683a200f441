#include "comm/mpi_transport.h"

#define OMPI_SKIP_MPICXX 1  // only the C interface: the C++ one needs another library
#include <mpi.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/status_macros.h"

namespace shoal {
namespace {

using Clock = std::chrono::steady_clock;

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

}  // namespace

MpiTransport::~MpiTransport() {
  const bool was_healthy = !is_broken_.load(std::memory_order_acquire);
  if (was_healthy) {
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
  const bool all_left = WaitUntilAllLeave();
  if (all_left) {
    MPI_Finalize();
  } else if (was_healthy && is_broken_.load(std::memory_order_acquire)) {
    // The job failed behind the back of this rank's owner, who takes it for done and would return
    // 0: mpirun calls that an improper exit and reports 1 in place of the failure's own code.
    std::fflush(nullptr);
    std::this_thread::sleep_for(std::chrono::seconds(1));  // who reports the failure goes first
    _exit(kExitPeerLost);
  }
  {
    MutexLock lock(&state_);
    closing_ = true;
  }
  closing_changed_.SignalAll();
  liveness_.reset();
  if (exit_.joinable()) exit_.join();
  if (!all_left) {  // MPI may still move bytes from and to these, if anybody calls it
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

}  // namespace shoal
