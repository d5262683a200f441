// A job on the hosts that answer, when some do not.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace shoal {

// One host of a job, as the user named it.
struct JobHost {
  std::string name;
  int ranks = 1;  // that it takes
  bool operator==(const JobHost&) const = default;
};

struct JobPlacement {
  int tp = 1;
  int pp = 1;
  std::vector<JobHost> hosts;
};

// Whether each host runs commands: this machine does; of the others is asked what mpirun would use
// (ssh, or what OMPI_MCA_plm_rsh_agent names), of all at once. Blocks for `timeout` at most.
std::vector<bool> AskHosts(const std::vector<JobHost>& hosts, absl::Duration timeout);

// The job without the hosts that do not answer. Stages go first, as they are few messages apart;
// tensor parallelism shrinks when a whole stage has no place. kUnavailable: no host answers.
absl::StatusOr<JobPlacement> PlaceOnFewer(const JobPlacement& job,
                                          const std::vector<bool>& answers);

}  // namespace shoal
