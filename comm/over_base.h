// A communicator that does sums in its own way and leaves the rest to another one.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "comm/communicator.h"

namespace shoal {

class OverBase : public Communicator {
 public:
  explicit OverBase(std::unique_ptr<Communicator> base = nullptr) : base_(std::move(base)) {}
  // Before the first call that goes there.
  void SetBase(std::unique_ptr<Communicator> base) { base_ = std::move(base); }

  int rank() const override { return base_->rank(); }
  int size() const override { return base_->size(); }
  std::string host(int rank) const override { return base_->host(rank); }
  absl::Status broken() const override { return base_->broken(); }
  double all_reduce_seconds() const override { return base_->all_reduce_seconds(); }
  absl::Status AllGather(const void* data, int64_t bytes, void* out) override {
    return base_->AllGather(data, bytes, out);
  }
  absl::Status Broadcast(void* data, int64_t bytes, int root) override {
    return base_->Broadcast(data, bytes, root);
  }
  absl::Status Send(const void* data, int64_t bytes, int dest, int tag) override {
    return base_->Send(data, bytes, dest, tag);
  }
  absl::Status Recv(void* data, int64_t bytes, int source, int tag) override {
    return base_->Recv(data, bytes, source, tag);
  }
  absl::Status Barrier() override { return base_->Barrier(); }
  absl::StatusOr<std::unique_ptr<Communicator>> Split(int color, int key) override {
    return base_->Split(color, key);
  }
  void Abort(const absl::Status& reason) override { base_->Abort(reason); }

 protected:
  Communicator& base() const { return *base_; }

 private:
  std::unique_ptr<Communicator> base_;
};

}  // namespace shoal
