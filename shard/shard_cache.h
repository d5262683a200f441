// Shard directories that are made while a GGUF is run and serve later runs (--disk-cache).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "shard/shard_file.h"

namespace shoal {

struct ShardCacheOptions {
  std::string dir;     // holds one shard directory for each model and plan
  int64_t memory = 0;  // that packing may take; 0: no limit
  ShardWriteOptions write;
};

// The directory for this checkpoint and plan, packed first unless it is there whole. Its name is a
// hash of the source (its files' sizes and times included) and of the plan. One process packs it,
// others wait; one that was killed is gone on from. `anew`: what is there is damaged. An error (a
// full disk, no permission, too little memory) leaves nothing behind that takes room.
absl::StatusOr<std::unique_ptr<ShardDirectory>> OpenShardCache(const Checkpoint& checkpoint,
                                                               const ModelConfig& config,
                                                               const ShardCacheOptions& options,
                                                               bool anew);

}  // namespace shoal
