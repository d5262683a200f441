// A limit on what all shard directories of a disk cache take together, whatever models and
// processes they belong to.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"

namespace shoal {

// What every entry of a cache is called, with a hash behind it.
inline constexpr char kShardCachePrefix[] = "shards-";

// Removes all of an entry but its locks: whoever waits for one has the file open, and would share
// it with nobody who comes later.
void EmptyShardCacheEntry(const std::string& dir);

// Empties entries of the cache `dir` that nobody uses, those used longest ago first, until `name`
// may have `bytes` within `bytes_max` for all. REQUIRES: the lock of `dir`. kResourceExhausted with
// the sizes when that is not possible: nothing is emptied then.
absl::Status MakeShardCacheRoom(const std::string& dir, const std::string& name, int64_t bytes,
                                int64_t bytes_max);

}  // namespace shoal
