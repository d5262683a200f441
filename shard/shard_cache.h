// Shard directories that are made while a GGUF is run and serve later runs (--disk-cache).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "offload/folder_lock.h"
#include "shard/shard_file.h"

namespace shoal {

struct ShardCacheOptions {
  std::string dir;        // holds one shard directory for each model and plan
  int64_t bytes_max = 0;  // that all of them may take of the disk; 0: no limit
  int64_t memory = 0;     // that packing may take; 0: no limit
  ShardWriteOptions write;
};

struct CachedShards {
  FolderLock in_use;  // while it is held no process empties the directory to make room
  std::unique_ptr<ShardDirectory> directory;
};

// The directory for this checkpoint and plan, packed first unless it is there whole. Its name is a
// hash of the source (its files' sizes and times included) and of the plan. One process packs it,
// others wait; one that was killed is gone on from. `anew`: what is there is damaged. Within
// `bytes_max` the directories used longest ago give way, and one process packs at a time. An error
// (a full disk, no permission, too little memory, no room within the limit) leaves nothing behind
// that takes room.
absl::StatusOr<CachedShards> OpenShardCache(const Checkpoint& checkpoint, const ModelConfig& config,
                                            const ShardCacheOptions& options, bool anew);

}  // namespace shoal
