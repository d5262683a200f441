#include "parallel/mesh.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "comm/nccl.h"
#include "comm/one_shot.h"
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
  if (mesh.tp_->size() == 1) mesh.recordable_sum_ = std::numeric_limits<int64_t>::max();
  return mesh;
}

absl::StatusOr<bool> Mesh::AllAgree(bool mine) const {
  const uint8_t answer = mine ? 1 : 0;
  std::vector<uint8_t> all(tp_->size());
  SHOAL_RETURN_IF_ERROR(tp_->AllGather(&answer, sizeof answer, all.data()));
  return std::count(all.begin(), all.end(), 1) == tp_->size();
}

absl::Status Mesh::UseMemoryOf(Backend& backend) {
  if (world_->size() == 1 && backend.shares_host_memory()) return absl::OkStatus();
  absl::StatusOr<std::shared_ptr<const nccl::Api>> api = absl::UnavailableError("no GPU");
  if (backend.queue() != nullptr && world_->size() > 1) api = nccl::Load();

  // What every rank has: the name of its GPU, or nothing.
  struct Offer {
    char device[96] = {};
    int32_t own_memory = 0;
    int32_t nccl = 0;
    int32_t replays = 0;  // steps with sums in them
  };
  Offer mine;
  mine.own_memory = backend.shares_host_memory() ? 0 : 1;
  const char* const sums = std::getenv("SHOAL_GRAPH_SUMS");
  const bool may_replay = sums == nullptr || std::string(sums) != "0";
  mine.replays = may_replay && backend.replays_steps() ? 1 : 0;
  mine.nccl = api.ok() ? 1 : 0;
  if (backend.queue() != nullptr) {
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
  const auto all = [](const std::vector<Offer>& offers, int32_t Offer::*what) {
    return std::all_of(offers.begin(), offers.end(), [&](const Offer& o) { return o.*what != 0; });
  };
  const auto by_nccl = [&](const std::vector<Offer>& offers) {
    return has_a_gpu_each(offers) && all(offers, &Offer::nccl);
  };
  if (backend.shares_host_memory()) return absl::OkStatus();

  const auto reach = [&](Communicator& host,
                         bool nccl) -> absl::StatusOr<std::unique_ptr<Communicator>> {
    if (nccl) return MakeNcclCommunicator(*api, host, *backend.queue());
    return MakeStagedCommunicator(host, backend);
  };
  SHOAL_ASSIGN_OR_RETURN(device_tp_, reach(*tp_, by_nccl(group)));
  if (by_nccl(group)) {
    transport_ = absl::StrCat("NCCL ", nccl::VersionText((*api)->version));
  } else if (world_->size() > 1 && !api.ok()) {
    transport_ = absl::StrCat("host memory (", api.status().message(), ")");
  }
  bool small_sums = false;
  if (has_a_gpu_each(group)) {
    SHOAL_ASSIGN_OR_RETURN(OneShotResult one_shot,
                           MakeOneShotCommunicator(std::move(device_tp_), *tp_, backend));
    device_tp_ = std::move(one_shot.communicator);
    small_sums = one_shot.why_not.empty();
    absl::StrAppend(&transport_,
                    small_sums ? ", sums of few rows by one kernel through "
                               : ", not sums of few rows by one kernel: ",
                    small_sums ? one_shot.way : one_shot.why_not);
  }
  if (!small_sums && group.size() == 2 && all(group, &Offer::own_memory) && !by_nccl(group)) {
    SHOAL_ASSIGN_OR_RETURN(PeerResult peer,
                           MakePeerCommunicator(std::move(device_tp_), *tp_, backend));
    device_tp_ = std::move(peer.communicator);
    if (peer.why_not.empty()) transport_ += ", sums of few rows from GPU memory to GPU memory";
  }
  if (group.size() > 1) {
    recordable_sum_ = all(group, &Offer::replays) ? device_tp_->recordable_sum() : 0;
  }
  SHOAL_ASSIGN_OR_RETURN(device_world_, reach(*world_, stages_ > 1 && by_nccl(world)));
  return absl::OkStatus();
}

}  // namespace shoal
