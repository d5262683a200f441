// Exit codes of the shoal binary, and how a Status carries one.
#pragma once

#include "absl/status/status.h"

namespace shoal {

enum ExitCode : int {
  kExitOk = 0,
  kExitUsage = 2,         // flags that make no sense, alone or for this model
  kExitNoMemory = 3,      // does not fit
  kExitMalformed = 65,    // the input file is malformed or of an unknown kind
  kExitNoInput = 66,      // the input cannot be read
  kExitUnavailable = 69,  // a node or port is unavailable
  kExitInternal = 70,
  kExitNotPermitted = 77,
  kExitConfig = 78,
  kExitInterrupted = 130,
};

// A copy of an error that ExitCodeOf maps to `code`.
absl::Status WithExitCode(absl::Status status, int code);
// The code given by WithExitCode, else the usual one of the status code: malformed for
// InvalidArgument, DataLoss and Unimplemented (readers of files use those); no input for NotFound,
// PermissionDenied and FailedPrecondition.
int ExitCodeOf(const absl::Status& status);
absl::Status UsageError(const std::string& message);

// An allocation that the system refuses ends the process with kExitNoMemory and a line on stderr.
void ExitWhenOutOfMemory();

// "shoal: <message>" on stderr; returns the exit code.
int ReportError(const absl::Status& status);

}  // namespace shoal
