#include "shard/shard_cache.h"

#include <sys/stat.h>

#include <algorithm>
#include <filesystem>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/status_macros.h"
#include "offload/memory_budget.h"
#include "shard/shard_cache_room.h"
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
    for (const Extent& e : {r.dense_ffn, r.shared_ffn}) {
      if (e.size() > 0) absl::StrAppend(&text, " ", e.begin, "-", e.end);
    }
  }
  const XXH128_hash_t h = XXH3_128bits(text.data(), text.size());
  return absl::StrCat(kShardCachePrefix, absl::Hex(h.high64, absl::kZeroPad16),
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

// On disk, a little more rather than less.
int64_t PackedBytes(const Checkpoint& checkpoint, const ModelConfig& config,
                    const ShardPlan& plan) {
  constexpr int64_t kManifest = 1 << 20;
  int64_t bytes = checkpoint.TotalBytes() + kManifest;  // metadata, after the next line
  for (const TensorInfo& t : checkpoint.tensors()) bytes -= t.bytes;
  for (const RankPlan& rank : plan.ranks) {
    const absl::StatusOr<WeightLayout> layout = MakeWeightLayout(checkpoint, config, rank);
    if (layout.ok()) bytes += layout->bytes + 2 * kShardDataOffset;
  }
  return bytes;
}

absl::Status Pack(const Checkpoint& checkpoint, const ModelConfig& config, const ShardPlan& plan,
                  const std::string& name, const ShardCacheOptions& options, bool anew) {
  const int64_t needed = PackingBytes(checkpoint, config, plan);
  if (options.memory > 0 && needed > options.memory) {
    return absl::ResourceExhaustedError(absl::StrCat("packing takes ", FormatBytes(needed),
                                                     " of memory and may take ",
                                                     FormatBytes(options.memory)));
  }
  ShardWriteOptions write = options.write;
  write.force = anew;
  const std::string dir = absl::StrCat(options.dir, "/", name);
  if (options.bytes_max == 0) return WriteShards(checkpoint, config, dir, write).status();
  // Held until what was made room for is there.
  SHOAL_ASSIGN_OR_RETURN(const FolderLock lock, FolderLock::Take(options.dir));
  SHOAL_RETURN_IF_ERROR(MakeShardCacheRoom(options.dir, name, PackedBytes(checkpoint, config, plan),
                                           options.bytes_max));
  return WriteShards(checkpoint, config, dir, write).status();
}

}  // namespace

absl::StatusOr<CachedShards> OpenShardCache(const Checkpoint& checkpoint, const ModelConfig& config,
                                            const ShardCacheOptions& options, bool anew) {
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
  SHOAL_ASSIGN_OR_RETURN(FolderLock in_use, FolderLock::Use(dir));
  if (!anew) {
    absl::StatusOr<std::unique_ptr<ShardDirectory>> there = ShardDirectory::Open(dir);
    if (there.ok()) return CachedShards{std::move(in_use), *std::move(there)};
    anew = !absl::IsNotFound(there.status());  // whole but damaged; else new, or to be gone on with
  }
  if (absl::Status s = Pack(checkpoint, config, plan, name, options, anew); !s.ok()) {
    EmptyShardCacheEntry(dir);
    return s;
  }
  SHOAL_ASSIGN_OR_RETURN(std::unique_ptr<ShardDirectory> packed, ShardDirectory::Open(dir));
  return CachedShards{std::move(in_use), std::move(packed)};
}

}  // namespace shoal
