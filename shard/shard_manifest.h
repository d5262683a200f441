// manifest.json of a shard directory: which file holds which bytes of which tensor, and their
// checksums. shard/README.md ("Shard directories") specifies the files.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "shard/checkpoint.h"
#include "shard/shard_plan.h"
#include "shard/weight_layout.h"

namespace shoal {

inline constexpr uint32_t kShardFormatVersion = 1;
inline constexpr char kShardMagic[8] = {'S', 'H', 'O', 'A', 'L', 'S', 'H', 'D'};
inline constexpr int64_t kShardDataOffset =
    4096;  // the weights begin here; units are page-aligned behind it
inline constexpr char kManifestName[] = "manifest.json";
inline constexpr char kMetadataName[] =
    "model.gguf";  // metadata and the tensors that are in no layout

// The first block of a shard file, little-endian; zeros follow up to kShardDataOffset.
struct ShardHeader {
  char magic[8];
  uint32_t version;
  uint32_t rank;
  uint32_t world;
  uint32_t reserved;     // 0
  uint64_t fingerprint;  // of the source model and the plan: all files of a directory have the same
  uint64_t data_bytes;   // after kShardDataOffset
  uint64_t checksum;     // xxh3 of the 40 bytes before
};
static_assert(sizeof(ShardHeader) == 48);
static_assert(offsetof(ShardHeader, checksum) == 40);

uint64_t Checksum(const void* data, int64_t bytes);  // xxh3, 64 bits

struct ShardRank {
  std::string file;
  RankPlan plan;
  WeightLayout layout;
  std::vector<std::vector<uint64_t>> checksums;  // [unit][extent]
};

struct ShardManifest {
  uint64_t fingerprint = 0;
  std::string model;                // general.name
  std::vector<std::string> source;  // file names, for people
  int64_t source_bytes = 0;
  int tp = 1;
  int pp = 1;
  std::vector<double> split;
  int64_t metadata_bytes = 0;  // of model.gguf
  uint64_t metadata_checksum = 0;
  std::vector<TensorInfo> tensors;  // of the source; offset is 0
  std::vector<ShardRank> ranks;
};

std::string ManifestToJson(const ShardManifest& manifest);
// kInvalidArgument: what is malformed, or a version that this program does not read.
absl::StatusOr<ShardManifest> ManifestFromJson(const std::string& text, const std::string& name);

// Same units, extents, shapes and places.
bool SameLayout(const WeightLayout& a, const WeightLayout& b);
// "layer 3 attention", "layer 3 expert 7", "embedding"
std::string UnitName(const WeightUnit& unit);

}  // namespace shoal
