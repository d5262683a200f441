// Where this rank stands: the world, its tensor-parallel group and its neighbours in the pipeline.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "comm/communicator.h"
#include "kernels/backend.h"
#include "shard/shard_plan.h"

namespace shoal {

// Owns the group communicator, borrows the world. One per rank, used by its engine thread.
class Mesh {
 public:
  // Collective. REQUIRES: world.size() == plan.world().
  static absl::StatusOr<Mesh> Create(Communicator& world, const ShardPlan& plan);

  // Collective. Sums and hidden states are read and written in this rank's backend's memory from
  // now on: by NCCL among ranks that have a GPU each, else through the host. The backend lives
  // longer than the mesh.
  absl::Status UseMemoryOf(Backend& backend);
  // How they travel: "NCCL 2.28.9", "host memory", and why.
  const std::string& transport() const { return transport_; }

  // Between all ranks, host memory: batches and results.
  Communicator& world() const { return *world_; }
  // Device memory: sums inside a stage, hidden states between stages.
  Communicator& tp() const { return device_tp_ != nullptr ? *device_tp_ : *tp_; }
  // Numbers of the largest sum inside the stage that a recorded step may hold.
  int64_t recordable_sum() const { return recordable_sum_; }
  // Collective over the stage: whether all its ranks say yes.
  absl::StatusOr<bool> AllAgree(bool mine) const;
  Communicator& pipeline() const { return device_world_ != nullptr ? *device_world_ : *world_; }
  const RankPlan& plan() const { return plan_; }
  int stages() const { return stages_; }
  // World ranks that hold the same tp index one stage before and after; -1 at the ends.
  int previous() const { return plan_.first_stage ? -1 : world_->rank() - tp_->size(); }
  int next() const { return plan_.last_stage ? -1 : world_->rank() + tp_->size(); }
  // World rank of the last stage's rank `tp_index`.
  int last_stage_rank(int tp_index) const { return (stages_ - 1) * tp_->size() + tp_index; }

 private:
  Communicator* world_ = nullptr;
  std::unique_ptr<Communicator> tp_;
  std::unique_ptr<Communicator> device_tp_, device_world_;  // null: device memory is host memory
  RankPlan plan_;
  int stages_ = 1;
  int64_t recordable_sum_ = 0;
  std::string transport_ = "host memory";
};

}  // namespace shoal
