// Opens a rank's weights where the plan puts them: in memory, or streamed from a shard file or a
// GGUF.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "offload/weight_source.h"
#include "offload/weight_streamer.h"
#include "shard/checkpoint.h"
#include "shard/placement.h"
#include "shard/weight_layout.h"

namespace shoal {

struct WeightStoreOptions {
  int threads = 1;          // that load what stays, and repack what is streamed from a GGUF
  AsyncFile::Options file;  // engine, and faults for tests
  std::function<void(int64_t done, int64_t total)> progress;
  // What the shard directory is made from, when that is at hand: a unit that turns out damaged is
  // packed from it again, in memory and in the file, and `warn` hears of it.
  const Checkpoint* source = nullptr;
  std::function<void(const std::string&)> warn;
  // Units that are never asked for, as they are on a device; empty: none. They are neither read nor
  // given memory.
  std::vector<bool> skip;
};

// Owned by the rank; used by its engine thread.
struct WeightStore {
  std::unique_ptr<WeightSource> source;
  const WeightStreamer* streamer = nullptr;  // null: everything was loaded at once
  std::string origin;  // "shards/rank-000.shard", "model.gguf, repacked on the fly"
};

// The checkpoint and the layout outlive the store. From a shard directory, each unit is compared
// with its checksums the first time it is whole in memory, an embedding that is only read by rows
// here.
absl::StatusOr<WeightStore> OpenWeights(const Checkpoint& checkpoint, const WeightLayout& layout,
                                        const Placement& placement,
                                        const WeightStoreOptions& options);

}  // namespace shoal
