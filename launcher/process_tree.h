// Starting a process and ending it with everything it started.
#pragma once

#include <sys/types.h>

#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace shoal {

struct ChildProcess {
  pid_t pid = -1;
  int output_fd = -1;  // reads what the child writes to stdout and stderr; the caller closes it
};

// Makes this process the one that inherits orphaned descendants, so that KillDescendants finds the
// ranks of an mpirun that died.
void AdoptOrphans();
// arguments[0] is the path of the program.
absl::StatusOr<ChildProcess> StartProcess(const std::vector<std::string>& arguments);
// Every living process below `root`, children first found first.
std::vector<pid_t> Descendants(pid_t root);
// SIGKILL to all descendants of this process until none is left, reaped. Bounded: a process in an
// uninterruptible wait is left behind after a second.
void KillDescendants();
// Reaps children that ended; the raw wait status of `pid` if it was among them.
std::optional<int> ReapChildren(pid_t pid);
// "exit code 3" or "signal 9 (Killed)".
std::string DescribeWaitStatus(int status);

}  // namespace shoal
