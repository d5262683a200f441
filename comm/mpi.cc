// How a job of MPI ranks begins, and how a process of it ends.
#define OMPI_SKIP_MPICXX 1  // only the C interface: the C++ one needs another library
#include <mpi.h>
#include <sched.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "comm/communicator.h"
#include "comm/group.h"
#include "comm/host_name.h"
#include "comm/liveness.h"
#include "comm/mpi_transport.h"
#include "comm/net_interface.h"
#include "kernels/mutex.h"
#include "kernels/status_macros.h"

namespace shoal {
namespace {

using Clock = std::chrono::steady_clock;

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
          _exit(kExitPeerLost);
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

// A rank whose mpirun or daemon dies must not live on.
void DieWithLauncher() {
  if (std::getenv("OMPI_COMM_WORLD_RANK") != nullptr) prctl(PR_SET_PDEATHSIG, SIGKILL);
}

// Open MPI's shared memory sends up to 4 KB at once and asks the receiver first for more, which
// doubles the latency of a token's partial sums. The user's own settings stay.
void TuneSharedMemory() {
  setenv("OMPI_MCA_btl_vader_eager_limit", "131072", 0);
  setenv("OMPI_MCA_btl_vader_max_send_size", "262144", 0);
}

}  // namespace

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
    if (!closing_) _exit(kExitPeerLost);
  });
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
  // A network that was asked for and is not there is refused even where none is needed.
  if (one_network && options_.net.empty()) return Liveness::Listen("127.0.0.1");
  SHOAL_ASSIGN_OR_RETURN(std::vector<NetInterface> interfaces, ListInterfaces());
  SHOAL_ASSIGN_OR_RETURN(NetInterface chosen, ChooseInterface(interfaces, options_.net));
  return Liveness::Listen(one_network ? "127.0.0.1" : chosen.address);
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

void EndProcessOnPeerLoss(const absl::Status& loss, bool reporter) {
  if (reporter) {
    const std::string line = absl::StrCat("shoal: ", std::string(loss.message()), "\n");
    // Not through stdio, whose lock a stopped main thread may hold.
    if (write(STDERR_FILENO, line.data(), line.size()) < 0) _exit(kExitPeerLost);
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(reporter ? 200 : 1000));
  _exit(kExitPeerLost);
}

absl::StatusOr<std::unique_ptr<Communicator>> MakeMpiCommunicator(const MpiOptions& options) {
  int initialized = 0;
  MPI_Initialized(&initialized);
  if (initialized) {
    return absl::FailedPreconditionError("this process has had its MPI communicator already");
  }
  DieWithLauncher();
  TuneSharedMemory();
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
