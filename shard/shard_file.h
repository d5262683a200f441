// Shard directories: a model cut for its ranks and packed as the kernels multiply it, ready to be
// streamed.
//
// shard/README.md ("Shard directories") specifies the files. A directory without manifest.json is
// unfinished; the manifest is written last, under a temporary name, so a killed run leaves nothing
// that looks whole.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "offload/async_file.h"
#include "shard/checkpoint.h"
#include "shard/model_config.h"
#include "shard/shard_manifest.h"
#include "shard/shard_plan.h"

namespace shoal {

using ByteProgress = std::function<void(int64_t done, int64_t total)>;

struct ShardWriteOptions {
  ShardRequest shard;
  int threads = 1;     // that read and pack
  bool force = false;  // replace what is there
  ByteProgress progress;
  AsyncFile::Options file;  // engine, and faults for tests
};

struct ShardWriteResult {
  int64_t bytes = 0;          // of all shard files
  int64_t resumed_bytes = 0;  // of those, found finished from a run before
  bool already_there = false;
};

// Writes the directory, or goes on with one that was interrupted (same source, same plan).
// kFailedPrecondition: it holds another model or plan (say --force). kResourceExhausted: the disk
// is full; what was written stays, and the same call goes on from there.
absl::StatusOr<ShardWriteResult> WriteShards(const Checkpoint& checkpoint,
                                             const ModelConfig& config, const std::string& dir,
                                             const ShardWriteOptions& options);

// A finished directory, as a checkpoint without readable weights: those are in the rank files.
class ShardDirectory final : public Checkpoint {
 public:
  // kInvalidArgument / kDataLoss: malformed, cut, of another model; kNotFound: no manifest.
  static absl::StatusOr<std::unique_ptr<ShardDirectory>> Open(const std::string& dir);

  const ShardManifest& manifest() const { return manifest_; }
  std::string RankPath(int rank) const { return dir_ + "/" + manifest_.ranks[rank].file; }
  // The rank whose file holds exactly this layout. kFailedPrecondition: the directory was cut for
  // another number of ranks.
  absl::StatusOr<int> FindRank(const WeightLayout& layout) const;
  // Compares a unit in memory with its checksums. kDataLoss names the tensor and the file.
  absl::Status CheckUnit(int rank, int unit, const uint8_t* data) const;
  // The same, reading it by and by: for a unit that is never whole in memory.
  absl::Status CheckUnitOnDisk(int rank, int unit, const AsyncFile::Options& options) const;
  // Packs a unit that is damaged from its source once more, into `data` (whole blocks of
  // kIoAlignment) and into the file.
  absl::Status Repair(int rank, int unit, const Checkpoint& source, uint8_t* data) const;
  // Reads everything. Lists every extent that differs.
  absl::Status Verify(const ByteProgress& progress) const;

  const std::vector<TensorInfo>& tensors() const override { return manifest_.tensors; }
  const TensorInfo* FindTensor(const std::string& name) const override;
  const MetadataValue* FindMetadata(const std::string& key) const override {
    return metadata_->FindMetadata(key);
  }
  std::vector<std::string> MetadataKeys() const override { return metadata_->MetadataKeys(); }
  // Only tensors that no rank's layout holds (rope_freqs); kFailedPrecondition for the others.
  absl::Status Read(const TensorInfo& tensor, int64_t begin, int64_t n,
                    uint8_t* out) const override;
  std::vector<std::string> Files() const override;
  int64_t TotalBytes() const override;

 private:
  ShardDirectory() = default;
  absl::Status CheckHeader(int rank) const;
  absl::Status Damaged(int rank, int unit, const WeightExtent& extent) const;

  std::string dir_;
  ShardManifest manifest_;
  std::unique_ptr<Checkpoint> metadata_;
};

// True when `path` is a directory: OpenCheckpoint then opens it as a ShardDirectory.
bool IsDirectory(const std::string& path);

}  // namespace shoal
