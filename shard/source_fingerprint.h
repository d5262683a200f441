// A number that tells one model from another.
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "shard/checkpoint.h"

namespace shoal {

// Of the metadata, the tensors and samples of their data: reading all of a 400 GB file to name it
// would take longer than sharding it. A shard directory has the one that its manifest says.
absl::StatusOr<uint64_t> SourceFingerprint(const Checkpoint& checkpoint);

}  // namespace shoal
