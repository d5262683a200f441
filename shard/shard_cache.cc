#include "shard/shard_cache.h"

#include <sys/stat.h>

#include <algorithm>
#include <filesystem>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/status_macros.h"
#include "offload/folder_lock.h"
#include "offload/memory_budget.h"
#include "shard/source_fingerprint.h"
#include "xxhash.h"

namespace shoal {
namespace {

namespace fs = std::filesystem;

absl::StatusOr<std::string> EntryName(const Checkpoint& checkpoint, const ShardPlan& plan) {
  SHOAL_ASSIGN_OR_RETURN(const uint64_t source, SourceFingerprint(checkpoint));
  std::string text = absl::StrCat("shards ", kShardFormatVersion, " of ", source);
  for (const std::string& path : checkpoint.Files()) {
    // The fingerprint is of samples: a file that was written since is another one.
    struct stat st = {};
    if (stat(path.c_str(), &st) == 0) {
      absl::StrAppend(&text, " ", st.st_size, " ", st.st_mtim.tv_sec, ".", st.st_mtim.tv_nsec);
    }
  }
  for (const RankPlan& r : plan.ranks) {
    for (const Extent& e : {r.layers, r.q_heads, r.kv_heads, r.ffn, r.vocab})
      absl::StrAppend(&text, " ", e.begin, "-", e.end);
  }
  const XXH128_hash_t h = XXH3_128bits(text.data(), text.size());
  return absl::StrCat("shards-", absl::Hex(h.high64, absl::kZeroPad16),
                      absl::Hex(h.low64, absl::kZeroPad16));
}

// A unit is packed while the one before it is written (WriteShards).
int64_t PackingBytes(const Checkpoint& checkpoint, const ModelConfig& config,
                     const ShardPlan& plan) {
  int64_t largest = 0;
  for (const RankPlan& rank : plan.ranks) {
    const absl::StatusOr<WeightLayout> layout = MakeWeightLayout(checkpoint, config, rank);
    for (const WeightUnit& u : layout.ok() ? layout->units : std::vector<WeightUnit>())
      largest = std::max(largest, u.bytes);
  }
  return 2 * largest;
}

// All but the lock: whoever waits for it has the file open, and would share it with nobody who
// comes later.
void RemovePacked(const std::string& dir) {
  std::error_code error;
  for (const fs::directory_entry& e : fs::directory_iterator(dir, error)) {
    std::error_code ignored;
    if (e.path().filename() != FolderLock::kFile) fs::remove_all(e.path(), ignored);
  }
}

}  // namespace

absl::StatusOr<std::unique_ptr<ShardDirectory>> OpenShardCache(const Checkpoint& checkpoint,
                                                               const ModelConfig& config,
                                                               const ShardCacheOptions& options,
                                                               bool anew) {
  SHOAL_ASSIGN_OR_RETURN(const ShardPlan plan,
                         MakeShardPlan(config, checkpoint, options.write.shard));
  SHOAL_ASSIGN_OR_RETURN(const std::string name, EntryName(checkpoint, plan));
  const std::string dir = absl::StrCat(options.dir, "/", name);
  std::error_code error;
  fs::create_directories(dir, error);
  if (error) {
    return absl::PermissionDeniedError(
        absl::StrCat("cannot make the folder ", dir, ": ", error.message()));
  }
  SHOAL_ASSIGN_OR_RETURN(const FolderLock lock, FolderLock::Take(dir));
  if (!anew) {
    absl::StatusOr<std::unique_ptr<ShardDirectory>> there = ShardDirectory::Open(dir);
    if (there.ok()) return there;
    anew = !absl::IsNotFound(there.status());  // whole but damaged; else new, or to be gone on with
  }
  absl::Status status;
  const int64_t needed = PackingBytes(checkpoint, config, plan);
  if (options.memory > 0 && needed > options.memory) {
    status = absl::ResourceExhaustedError(absl::StrCat("packing takes ", FormatBytes(needed),
                                                       " of memory and may take ",
                                                       FormatBytes(options.memory)));
  } else {
    ShardWriteOptions write = options.write;
    write.force = anew;
    status = WriteShards(checkpoint, config, dir, write).status();
  }
  if (status.ok()) return ShardDirectory::Open(dir);
  RemovePacked(dir);
  return status;
}

}  // namespace shoal
