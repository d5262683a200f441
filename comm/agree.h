// Decisions that all ranks must take the same way.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "comm/communicator.h"

namespace shoal {

// Collective: whether `mine` is ok on all ranks. If not, *why_not is what the first one that is not
// says. Errors are those of `host`.
absl::StatusOr<bool> AllAgree(Communicator& host, const absl::Status& mine, std::string* why_not);

}  // namespace shoal
