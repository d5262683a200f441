#include "comm/nccl.h"

#include <limits>
#include <string>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "kernels/check.h"
#include "kernels/status_macros.h"

namespace shoal {
namespace {

// The library's communicator and what became of it. Shared with the queue's watch, which may be
// asked after the communicator is gone.
class NcclState {
 public:
  // The queue lives as long as it may ask its watches.
  NcclState(std::shared_ptr<const nccl::Api> api, nccl::Comm* comm, DeviceQueue& queue)
      : api_(std::move(api)), comm_(comm), queue_(queue) {}
  ~NcclState() {  // with the queue's watches, when what it has recorded is gone
    if (comm_ == nullptr) return;
    if (status_.ok()) {
      api_->destroy(comm_);
    } else {
      api_->abort(comm_);
    }
  }

  const nccl::Api& api() const { return *api_; }
  nccl::Comm* comm() const { return comm_; }
  const absl::Status& status() const { return status_; }

  // An error is final. What NCCL has on the device is ended, so that the queue goes on. Graphs that
  // hold its work go before: NCCL waits for the last of them (commDestroySync).
  absl::Status Fail(absl::Status status) {
    if (status_.ok()) {
      status_ = std::move(status);
      if (comm_ != nullptr) {
        queue_.ForgetRecordings();
        api_->abort(std::exchange(comm_, nullptr));
      }
    }
    return status_;
  }

  // What went wrong since, without waiting.
  absl::Status Poll(nccl::Result* result = nullptr) {
    if (!status_.ok() || comm_ == nullptr) return status_;
    nccl::Result error = nccl::kSuccess;
    const nccl::Result asked = api_->get_async_error(comm_, &error);
    if (result != nullptr) *result = error;
    if (asked != nccl::kSuccess) error = asked;
    if (error == nccl::kSuccess || error == nccl::kInProgress) return absl::OkStatus();
    return Fail(Error("a peer or the link failed", error));
  }

  // Until the library has taken the call that returned `result`.
  absl::Status Settle(nccl::Result result, const char* what, absl::Duration patience) {
    const absl::Time deadline = absl::Now() + patience;
    while (result == nccl::kInProgress) {
      SHOAL_RETURN_IF_ERROR(Poll(&result));
      if (result != nccl::kInProgress) break;
      if (absl::Now() > deadline) {
        return Fail(absl::UnavailableError(
            absl::StrCat("NCCL: ", what, ": not done after ", absl::FormatDuration(patience),
                         "; a rank did not come (NCCL_DEBUG=INFO tells more)")));
      }
      std::this_thread::yield();
    }
    return result == nccl::kSuccess ? absl::OkStatus() : Fail(Error(what, result));
  }

 private:
  absl::Status Error(const char* what, nccl::Result result) const {
    return absl::UnavailableError(absl::StrCat("NCCL: ", what, ": ", api_->error_string(result)));
  }

  std::shared_ptr<const nccl::Api> api_;
  nccl::Comm* comm_;
  DeviceQueue& queue_;
  absl::Status status_;
};

class NcclCommunicator final : public Communicator {
 public:
  NcclCommunicator(std::shared_ptr<NcclState> state, std::unique_ptr<Communicator> owned,
                   Communicator& host, std::shared_ptr<const nccl::Api> api, DeviceQueue& queue,
                   const NcclOptions& options)
      : state_(std::move(state)),
        owned_(std::move(owned)),
        host_(host),
        api_(std::move(api)),
        queue_(queue),
        options_(options) {}

  int rank() const override { return host_.rank(); }
  int size() const override { return host_.size(); }
  std::string host(int rank) const override { return host_.host(rank); }

  absl::Status AllReduceSum(float* data, int64_t count, Wire) override {
    return Call("all-reduce", [&](nccl::Comm* comm) {
      return api_->all_reduce(data, data, count, nccl::kFloat32, nccl::kSum, comm, queue_.handle());
    });
  }
  int64_t recordable_sum() const override { return std::numeric_limits<int64_t>::max(); }
  // The sums run on the device's queue: this thread does not wait for them.
  double all_reduce_seconds() const override { return 0; }
  absl::Status AllGather(const void* data, int64_t bytes, void* out) override {
    return Call("all-gather", [&](nccl::Comm* comm) {
      return api_->all_gather(data, out, bytes, nccl::kInt8, comm, queue_.handle());
    });
  }
  absl::Status Broadcast(void* data, int64_t bytes, int root) override {
    return Call("broadcast", [&](nccl::Comm* comm) {
      return api_->broadcast(data, data, bytes, nccl::kInt8, root, comm, queue_.handle());
    });
  }
  // Messages of two ranks arrive in the order of the calls; NCCL knows no tags.
  absl::Status Send(const void* data, int64_t bytes, int dest, int) override {
    return Call("send", [&](nccl::Comm* comm) {
      return api_->send(data, bytes, nccl::kInt8, dest, comm, queue_.handle());
    });
  }
  absl::Status Recv(void* data, int64_t bytes, int source, int) override {
    return Call("receive", [&](nccl::Comm* comm) {
      return api_->recv(data, bytes, nccl::kInt8, source, comm, queue_.handle());
    });
  }
  absl::Status Barrier() override {
    SHOAL_RETURN_IF_ERROR(state_->Poll());
    return host_.Barrier();
  }
  absl::StatusOr<std::unique_ptr<Communicator>> Split(int color, int key) override;
  absl::Status broken() const override {
    return state_->status().ok() ? host_.broken() : state_->status();
  }
  void Abort(const absl::Status& reason) override {
    host_.Abort(reason);
    state_->Fail(reason).IgnoreError();
  }

 private:
  template <typename Enqueue>
  absl::Status Call(const char* what, const Enqueue& enqueue) {
    SHOAL_RETURN_IF_ERROR(state_->Poll());
    // NCCL would take a stream whose capture failed for an error of its own, which is final.
    if (queue_.recording_lost()) return absl::OkStatus();
    return state_->Settle(enqueue(state_->comm()), what, options_.call);
  }

  std::shared_ptr<NcclState> state_;
  std::unique_ptr<Communicator> owned_;  // the host communicator of a split
  Communicator& host_;
  std::shared_ptr<const nccl::Api> api_;
  DeviceQueue& queue_;
  const NcclOptions options_;
};

absl::StatusOr<std::unique_ptr<Communicator>> Make(std::shared_ptr<const nccl::Api> api,
                                                   std::unique_ptr<Communicator> owned,
                                                   Communicator& host, DeviceQueue& queue,
                                                   const NcclOptions& options) {
  struct Invitation {
    nccl::UniqueId id = {};
    nccl::Result result = nccl::kSuccess;
  };
  Invitation invitation;
  if (host.rank() == 0) invitation.result = api->get_unique_id(&invitation.id);
  SHOAL_RETURN_IF_ERROR(host.Broadcast(&invitation, sizeof invitation, 0));
  if (invitation.result != nccl::kSuccess) {
    return absl::UnavailableError(
        absl::StrCat("NCCL: rank 0 on ", host.host(0),
                     " could not start: ", api->error_string(invitation.result)));
  }
  nccl::Config config;
  config.blocking = 0;
  nccl::Comm* comm = nullptr;
  const nccl::Result result =
      api->init_rank(&comm, host.size(), invitation.id, host.rank(), &config);
  auto state = std::make_shared<NcclState>(api, comm, queue);
  SHOAL_RETURN_IF_ERROR(state->Settle(result, "joining the ranks", options.start));
  queue.AddWatch([state] { return state->Poll(); });
  return std::make_unique<NcclCommunicator>(std::move(state), std::move(owned), host,
                                            std::move(api), queue, options);
}

absl::StatusOr<std::unique_ptr<Communicator>> NcclCommunicator::Split(int color, int key) {
  SHOAL_ASSIGN_OR_RETURN(std::unique_ptr<Communicator> part, host_.Split(color, key));
  Communicator& host = *part;
  return Make(api_, std::move(part), host, queue_, options_);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Communicator>> MakeNcclCommunicator(
    std::shared_ptr<const nccl::Api> api, Communicator& host, DeviceQueue& queue,
    const NcclOptions& options) {
  return Make(std::move(api), nullptr, host, queue, options);
}

}  // namespace shoal
