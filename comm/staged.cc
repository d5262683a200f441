#include "comm/staged.h"

#include <algorithm>
#include <string>
#include <utility>

#include "kernels/status_macros.h"

namespace shoal {
namespace {

class StagedCommunicator final : public Communicator {
 public:
  StagedCommunicator(Communicator& inner, Backend& device) : inner_(&inner), device_(device) {}
  StagedCommunicator(std::unique_ptr<Communicator> inner, Backend& device)
      : owned_(std::move(inner)), inner_(owned_.get()), device_(device) {}

  int rank() const override { return inner_->rank(); }
  int size() const override { return inner_->size(); }
  std::string host(int rank) const override { return inner_->host(rank); }

  absl::Status AllReduceSum(float* data, int64_t count, Wire wire) override {
    if (size() == 1) return inner_->AllReduceSum(data, count, wire);
    const int64_t bytes = count * static_cast<int64_t>(sizeof(float));
    SHOAL_ASSIGN_OR_RETURN(uint8_t * staged, Staged(data, bytes));
    SHOAL_RETURN_IF_ERROR(inner_->AllReduceSum(reinterpret_cast<float*>(staged), count, wire));
    device_.Copy(data, staged, bytes);
    return absl::OkStatus();
  }

  double all_reduce_seconds() const override { return inner_->all_reduce_seconds(); }

  absl::Status AllGather(const void* data, int64_t bytes, void* out) override {
    SHOAL_ASSIGN_OR_RETURN(uint8_t * all, Staging(bytes * size()));
    uint8_t* const mine = all + bytes * rank();
    device_.Copy(mine, data, bytes);
    SHOAL_RETURN_IF_ERROR(inner_->AllGather(mine, bytes, all));
    device_.Copy(out, all, bytes * size());
    return absl::OkStatus();
  }

  absl::Status Broadcast(void* data, int64_t bytes, int root) override {
    SHOAL_ASSIGN_OR_RETURN(uint8_t * staged, rank() == root ? Staged(data, bytes) : Staging(bytes));
    SHOAL_RETURN_IF_ERROR(inner_->Broadcast(staged, bytes, root));
    if (rank() != root) device_.Copy(data, staged, bytes);
    return absl::OkStatus();
  }

  absl::Status Send(const void* data, int64_t bytes, int dest, int tag) override {
    SHOAL_ASSIGN_OR_RETURN(uint8_t * staged, Staged(data, bytes));
    return inner_->Send(staged, bytes, dest, tag);
  }

  absl::Status Recv(void* data, int64_t bytes, int source, int tag) override {
    SHOAL_ASSIGN_OR_RETURN(uint8_t * staged, Staging(bytes));
    SHOAL_RETURN_IF_ERROR(inner_->Recv(staged, bytes, source, tag));
    device_.Copy(data, staged, bytes);
    return absl::OkStatus();
  }

  absl::Status Barrier() override { return inner_->Barrier(); }

  absl::StatusOr<std::unique_ptr<Communicator>> Split(int color, int key) override {
    SHOAL_ASSIGN_OR_RETURN(std::unique_ptr<Communicator> part, inner_->Split(color, key));
    return std::make_unique<StagedCommunicator>(std::move(part), device_);
  }

  absl::Status broken() const override { return inner_->broken(); }
  void Abort(const absl::Status& reason) override { inner_->Abort(reason); }

 private:
  // At least this many bytes of host memory; grows to the largest message.
  absl::StatusOr<uint8_t*> Staging(int64_t bytes) {
    if (bytes > staging_.size()) {
      SHOAL_ASSIGN_OR_RETURN(staging_,
                             device_.AllocateStaging(std::max(bytes, 2 * staging_.size())));
    }
    return staging_.data();
  }
  absl::StatusOr<uint8_t*> Staged(const void* data, int64_t bytes) {
    SHOAL_ASSIGN_OR_RETURN(uint8_t * staged, Staging(bytes));
    device_.Copy(staged, data, bytes);
    return staged;
  }

  std::unique_ptr<Communicator> owned_;
  Communicator* inner_;
  Backend& device_;
  DeviceMemory staging_;
};

}  // namespace

std::unique_ptr<Communicator> MakeStagedCommunicator(Communicator& inner, Backend& device) {
  return std::make_unique<StagedCommunicator>(inner, device);
}

}  // namespace shoal
