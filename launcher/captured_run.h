// Runs a program to its end and keeps what it says.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace shoal {

struct CapturedRun {
  int exit_code = 0;  // 128 + signal when a signal ended it
  std::string out;
  std::string err;
};

// arguments[0] is a path, or a name that PATH leads to. Without stdin. kNotFound when there is no
// such program; kDeadlineExceeded when it was ended (SIGTERM, then SIGKILL) because it took longer
// or said more than a MiB. Any thread.
absl::StatusOr<CapturedRun> RunCaptured(const std::vector<std::string>& arguments,
                                        absl::Duration timeout);

}  // namespace shoal
