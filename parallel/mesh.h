// Where this rank stands: the world, its tensor-parallel group and its neighbours in the pipeline.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "comm/communicator.h"
#include "shard/shard_plan.h"

namespace shoal {

// Owns the group communicator, borrows the world. One per rank, used by its engine thread.
class Mesh {
 public:
  // Collective. REQUIRES: world.size() == plan.world().
  static absl::StatusOr<Mesh> Create(Communicator& world, const ShardPlan& plan);

  Communicator& world() const { return *world_; }
  Communicator& tp() const { return *tp_; }
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
  RankPlan plan_;
  int stages_ = 1;
};

}  // namespace shoal
