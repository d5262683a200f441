// Collectives of some of a job's ranks, written once over Transport. All transports get their
// Communicator here.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "comm/all_reduce.h"
#include "comm/communicator.h"
#include "comm/transport.h"

namespace shoal {

class GroupCommunicator final : public Communicator {
 public:
  // All ranks of the transport.
  static std::unique_ptr<GroupCommunicator> World(std::shared_ptr<Transport> transport);

  int rank() const override { return group_.index; }
  int size() const override { return group_.size(); }
  std::string host(int rank) const override;

  absl::Status AllReduceSum(float* data, int64_t count, Wire wire) override;
  double all_reduce_seconds() const override { return absl::ToDoubleSeconds(all_reduce_time_); }
  absl::Status AllGather(const void* data, int64_t bytes, void* out) override;
  absl::Status Broadcast(void* data, int64_t bytes, int root) override;
  absl::Status Send(const void* data, int64_t bytes, int dest, int tag) override;
  absl::Status Recv(void* data, int64_t bytes, int source, int tag) override;
  absl::Status Barrier() override;
  absl::StatusOr<std::unique_ptr<Communicator>> Split(int color, int key) override;
  absl::Status broken() const override { return transport_->broken(); }
  void Abort(const absl::Status& reason) override;

  // For tests and measurements: the choice by size is kAuto. Every rank must choose the same.
  void set_algorithm(AllReduceAlgorithm algorithm) { algorithm_ = algorithm; }

 private:
  GroupCommunicator(std::shared_ptr<Transport> transport, std::vector<int> members, int index,
                    int context);
  absl::Status CheckPeer(int peer, int tag) const;

  std::shared_ptr<Transport> transport_;
  Group group_;
  absl::Duration all_reduce_time_;
  AllReduceAlgorithm algorithm_ = AllReduceAlgorithm::kAuto;
};

}  // namespace shoal
