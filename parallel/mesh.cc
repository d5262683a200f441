#include "parallel/mesh.h"

#include "absl/strings/str_cat.h"
#include "comm/staged.h"

namespace shoal {

absl::StatusOr<Mesh> Mesh::Create(Communicator& world, const ShardPlan& plan) {
  if (world.size() != plan.world()) {
    return absl::InvalidArgumentError(absl::StrCat("the plan is for ", plan.tp, " x ", plan.pp,
                                                   " = ", plan.world(), " ranks, but ",
                                                   world.size(), " were started"));
  }
  Mesh mesh;
  mesh.world_ = &world;
  mesh.plan_ = plan.ranks[world.rank()];
  mesh.stages_ = plan.pp;
  absl::StatusOr<std::unique_ptr<Communicator>> tp =
      world.Split(mesh.plan_.stage, mesh.plan_.tp_index);
  if (!tp.ok()) return tp.status();
  mesh.tp_ = *std::move(tp);
  return mesh;
}

absl::Status Mesh::UseMemoryOf(Backend& backend) {
  if (backend.shares_host_memory()) return absl::OkStatus();
  device_tp_ = MakeStagedCommunicator(*tp_, backend);
  device_world_ = MakeStagedCommunicator(*world_, backend);
  return absl::OkStatus();
}

}  // namespace shoal
