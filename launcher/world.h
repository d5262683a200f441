// The ranks of a job: starting them with mpirun, joining them, knowing where this one stands.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "comm/communicator.h"

namespace shoal {

struct WorldOptions {
  int tp = 1;
  int pp = 1;
  std::string hostfile;
  std::string hosts;
  std::string net;
};

// True in a process that mpirun started.
bool IsMpiRank();
// This rank's number among the ranks of its host, and how many there are.
int LocalRank();
int LocalSize();

// Returns the exit code if this process became the parent of an MPI job and the job is over;
// nullopt if the caller is a rank or a world of one and must go on.
absl::StatusOr<std::optional<int>> MaybeLaunchRanks(const WorldOptions& options, int argc,
                                                    char** argv);

// A world of one, or the MPI world.
absl::StatusOr<std::unique_ptr<Communicator>> OpenWorld(const WorldOptions& options);

}  // namespace shoal
