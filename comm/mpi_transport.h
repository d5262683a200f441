// The MPI transport: messages over MPI in host memory, heartbeats beside it.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "comm/communicator.h"
#include "comm/group.h"
#include "comm/liveness.h"
#include "comm/transport.h"
#include "kernels/mutex.h"

namespace shoal {

inline constexpr int kExitPeerLost = 69;  // EX_UNAVAILABLE of sysexits.h

// REQUIRES: MPI is initialized for one thread at a time; the destructor finalizes it unless the job
// failed.
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
  absl::Status CheckWait(const Pending& pending, Patience patience,
                         std::chrono::steady_clock::duration waited);
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
  std::chrono::steady_clock::time_point
      leaver_seen_{};  // when Wait first found that a peer has left

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

}  // namespace shoal
