// A world of one.
#include <cstring>
#include <memory>
#include <string>

#include "comm/communicator.h"
#include "comm/host_name.h"
#include "kernels/check.h"
#include "kernels/mutex.h"

namespace shoal {
namespace {

class SelfCommunicator final : public Communicator {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }
  std::string host(int) const override { return HostName(); }

  absl::Status AllReduceSum(float*, int64_t, Wire) override { return status(); }
  double all_reduce_seconds() const override { return 0; }
  absl::Status AllGather(const void* data, int64_t bytes, void* out) override {
    if (out != data && bytes > 0) std::memcpy(out, data, bytes);
    return status();
  }
  absl::Status Broadcast(void*, int64_t, int) override { return status(); }
  absl::Status Send(const void*, int64_t, int, int) override { return NoPeer(); }
  absl::Status Recv(void*, int64_t, int, int) override { return NoPeer(); }
  absl::Status Barrier() override { return status(); }
  absl::StatusOr<std::unique_ptr<Communicator>> Split(int, int) override {
    return std::make_unique<SelfCommunicator>();
  }
  void Abort(const absl::Status& reason) override {
    MutexLock lock(&mu_);
    if (status_.ok()) status_ = reason;
  }

 private:
  absl::Status status() {
    MutexLock lock(&mu_);
    return status_;
  }
  static absl::Status NoPeer() {
    SHOAL_CHECK(false, "a world of one has nobody to send to or receive from");
    return absl::OkStatus();
  }

  Mutex mu_;
  absl::Status status_ ABSL_GUARDED_BY(mu_);
};

}  // namespace

std::unique_ptr<Communicator> MakeSelfCommunicator() {
  return std::make_unique<SelfCommunicator>();
}

}  // namespace shoal
