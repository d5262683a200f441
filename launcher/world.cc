#include "launcher/world.h"

namespace shoal {

bool IsMpiRank() { return false; }
int LocalRank() { return 0; }
int LocalSize() { return 1; }

absl::StatusOr<std::optional<int>> MaybeLaunchRanks(const WorldOptions& options, int, char**) {
  if (options.tp * options.pp == 1) return std::optional<int>();
  return absl::UnavailableError("ranks in several processes are not built in: add --in-process");
}

absl::StatusOr<std::unique_ptr<Communicator>> OpenWorld(const WorldOptions&) {
  return MakeSelfCommunicator();
}

}  // namespace shoal
