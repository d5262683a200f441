#include "parallel/mesh.h"

#include <algorithm>
#include <cstdio>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "comm/nccl.h"
#include "comm/peer.h"
#include "comm/staged.h"
#include "kernels/status_macros.h"

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
  if (world_->size() == 1 && backend.shares_host_memory()) return absl::OkStatus();
  absl::StatusOr<std::shared_ptr<const nccl::Api>> api = absl::UnavailableError("no GPU");
  if (backend.queue() != nullptr && world_->size() > 1) api = nccl::Load();

  // What every rank offers to NCCL: the name of its GPU, or nothing.
  struct Offer {
    char device[96] = {};
    int32_t own_memory = 0;
  };
  Offer mine;
  mine.own_memory = backend.shares_host_memory() ? 0 : 1;
  if (api.ok()) {
    std::snprintf(mine.device, sizeof mine.device, "%s %s", world_->host(world_->rank()).c_str(),
                  backend.queue()->device().c_str());
  }
  std::vector<Offer> world(world_->size()), group(tp_->size());
  SHOAL_RETURN_IF_ERROR(world_->AllGather(&mine, sizeof mine, world.data()));
  SHOAL_RETURN_IF_ERROR(tp_->AllGather(&mine, sizeof mine, group.data()));
  const auto has_a_gpu_each = [](const std::vector<Offer>& offers) {
    std::set<std::string> devices;
    for (const Offer& o : offers) devices.insert(o.device);
    return offers.size() > 1 && devices.size() == offers.size() && devices.count("") == 0;
  };
  if (backend.shares_host_memory()) return absl::OkStatus();

  const auto reach = [&](Communicator& host,
                         bool by_nccl) -> absl::StatusOr<std::unique_ptr<Communicator>> {
    if (by_nccl) return MakeNcclCommunicator(*api, host, *backend.queue());
    return MakeStagedCommunicator(host, backend);
  };
  SHOAL_ASSIGN_OR_RETURN(device_tp_, reach(*tp_, has_a_gpu_each(group)));
  const bool all_own =
      std::all_of(group.begin(), group.end(), [](const Offer& o) { return o.own_memory != 0; });
  bool peer_sums = false;
  if (group.size() == 2 && all_own && !has_a_gpu_each(group)) {  // NCCL has its own short way
    SHOAL_ASSIGN_OR_RETURN(PeerResult peer,
                           MakePeerCommunicator(std::move(device_tp_), *tp_, backend));
    device_tp_ = std::move(peer.communicator);
    peer_sums = peer.why_not.empty();
  }
  SHOAL_ASSIGN_OR_RETURN(device_world_, reach(*world_, stages_ > 1 && has_a_gpu_each(world)));
  if (has_a_gpu_each(group)) {
    transport_ = absl::StrCat("NCCL ", nccl::VersionText((*api)->version));
  } else if (world_->size() > 1 && !api.ok()) {
    transport_ = absl::StrCat("host memory (", api.status().message(), ")");
  }
  if (peer_sums) transport_ += ", sums of few rows from GPU memory to GPU memory";
  return absl::OkStatus();
}

}  // namespace shoal
