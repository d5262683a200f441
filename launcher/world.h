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
  std::string hostfile;    // as mpirun's --hostfile
  std::string hosts;       // as mpirun's --host: a,b or a:2,b:2
  std::string net;         // network card, address or subnet; empty chooses
  int ranks_per_host = 0;  // 0: as the slots say, else evenly
};

// The path of this program.
absl::StatusOr<std::string> ThisProgram();
// The mpirun that lies beside this program is the one that its ranks were linked for; without one
// the name that PATH leads to.
std::string MpirunFor(const std::string& program);

// True in a process that mpirun started.
bool IsMpiRank();
// How many ranks mpirun started; 1 outside.
int MpiWorldSize();
// This rank's number among the ranks of its host, and how many there are.
int LocalRank();
int LocalSize();
// isatty, but true to the user's terminal: under mpirun a rank's own stdout is always a
// pseudo-terminal.
bool IsTerminal(int fd);

// Refuses in words what would be ignored: a network that this host does not have, hosts for a job
// that runs in this process. For the process that a person started, not for a rank.
absl::Status CheckWorldOptions(const WorldOptions& options, bool in_process);

// Returns the exit code if this process became the parent of an MPI job and the job is over;
// nullopt if the caller is a rank or a world of one and must go on. argv[0] is not looked at: the
// ranks run this very program.
absl::StatusOr<std::optional<int>> MaybeLaunchRanks(const WorldOptions& options, int argc,
                                                    char** argv);

// A world of one, which touches no MPI, or the MPI world. kInvalidArgument when mpirun started
// another number of ranks than tp * pp. When a rank is lost, the process ends
// (EndProcessOnPeerLoss).
absl::StatusOr<std::unique_ptr<Communicator>> OpenWorld(const WorldOptions& options);

}  // namespace shoal
