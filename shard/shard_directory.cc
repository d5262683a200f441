// ShardDirectory: opening, checking and verifying what WriteShards wrote.
#include <sys/stat.h>

#include <algorithm>
#include <cstring>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "kernels/buffer.h"
#include "kernels/status_macros.h"
#include "shard/byte_reader.h"
#include "shard/gguf.h"
#include "shard/shard_file.h"
#include "xxhash.h"

namespace shoal {
namespace {

constexpr int64_t kMaxManifestBytes = int64_t{256} << 20;

absl::StatusOr<std::string> ReadWhole(const std::string& path, int64_t max) {
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<ByteSource> file, OpenFileSource(path));
  if (file->size() > max) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, " has ", file->size(), " bytes, expected at most ", max));
  }
  std::string text(file->size(), '\0');
  SHOAL_RETURN_IF_ERROR(file->ReadAt(0, file->size(), reinterpret_cast<uint8_t*>(text.data())));
  return text;
}

std::string Again() { return "write the directory again with shoal shard"; }

}  // namespace

bool IsDirectory(const std::string& path) {
  struct stat st;
  return stat(path.c_str(), &st) == 0 && S_ISDIR(st.st_mode);
}

absl::StatusOr<std::unique_ptr<ShardDirectory>> ShardDirectory::Open(const std::string& dir) {
  std::unique_ptr<ShardDirectory> d(new ShardDirectory());
  d->dir_ = dir;
  const std::string manifest_path = dir + "/" + kManifestName;
  absl::StatusOr<std::string> text = ReadWhole(manifest_path, kMaxManifestBytes);
  if (absl::IsNotFound(text.status())) {
    return absl::NotFoundError(absl::StrCat(
        dir, " has no ", kManifestName,
        ": it is no shard directory, or shoal shard has not finished it (the same command "
        "goes on from there)"));
  }
  SHOAL_RETURN_IF_ERROR(text.status());
  SHOAL_ASSIGN_OR_RETURN(d->manifest_, ManifestFromJson(*text, manifest_path));
  const std::string metadata_path = dir + "/" + kMetadataName;
  SHOAL_ASSIGN_OR_RETURN(const std::string metadata, ReadWhole(metadata_path, kMaxManifestBytes));
  if (static_cast<int64_t>(metadata.size()) != d->manifest_.metadata_bytes ||
      Checksum(metadata.data(), static_cast<int64_t>(metadata.size())) !=
          d->manifest_.metadata_checksum) {
    return absl::DataLossError(absl::StrCat(metadata_path, " is not the one that ", kManifestName,
                                            " describes: it was cut or changed; ", Again()));
  }
  std::vector<std::unique_ptr<ByteSource>> parts(1);
  SHOAL_ASSIGN_OR_RETURN(parts[0], OpenFileSource(metadata_path));
  SHOAL_ASSIGN_OR_RETURN(d->metadata_, OpenGguf(std::move(parts)));
  return d;
}

absl::Status ShardDirectory::CheckHeader(int rank) const {
  const std::string path = RankPath(rank);
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<ByteSource> file, OpenFileSource(path));
  ShardHeader header;
  if (file->size() < kShardDataOffset) {
    return absl::DataLossError(
        absl::StrCat(path, " was cut: it has ", file->size(), " bytes; ", Again()));
  }
  SHOAL_RETURN_IF_ERROR(file->ReadAt(0, sizeof header, reinterpret_cast<uint8_t*>(&header)));
  if (std::memcmp(header.magic, kShardMagic, sizeof kShardMagic) != 0 ||
      header.checksum != Checksum(&header, offsetof(ShardHeader, checksum))) {
    return absl::DataLossError(
        absl::StrCat(path, " is no shard file: its header is damaged; ", Again()));
  }
  if (header.version != kShardFormatVersion) {
    return absl::InvalidArgumentError(absl::StrCat(path, " has format version ", header.version,
                                                   ", this program reads version ",
                                                   kShardFormatVersion, "; ", Again()));
  }
  const ShardRank& expected = manifest_.ranks[rank];
  if (header.fingerprint != manifest_.fingerprint ||
      header.rank != static_cast<uint32_t>(expected.plan.rank) ||
      header.world != manifest_.ranks.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, " belongs to another model or plan than ", kManifestName,
                     " beside it; do not mix the files of two shard directories; ", Again()));
  }
  const int64_t bytes = kShardDataOffset + (expected.layout.bytes + 4095) / 4096 * 4096;
  if (file->size() != bytes) {
    return absl::DataLossError(absl::StrCat(path, " has ", file->size(), " bytes, expected ", bytes,
                                            ": it was cut or grown; ", Again()));
  }
  return absl::OkStatus();
}

absl::StatusOr<int> ShardDirectory::FindRank(const WeightLayout& layout) const {
  for (size_t r = 0; r < manifest_.ranks.size(); ++r) {
    if (!SameLayout(manifest_.ranks[r].layout, layout)) continue;
    SHOAL_RETURN_IF_ERROR(CheckHeader(static_cast<int>(r)));
    return static_cast<int>(r);
  }
  std::string split;
  for (const double s : manifest_.split)
    absl::StrAppend(&split, split.empty() ? " --split " : ",", s);
  if (split.empty() && manifest_.tp > 1) split = " without --split";
  std::string layers;
  for (int stage = 0; manifest_.pp > 1 && stage < manifest_.pp; ++stage) {
    absl::StrAppend(&layers, stage == 0 ? " --pp-layers " : ",",
                    manifest_.ranks[stage * manifest_.tp].plan.layers.size());
  }
  return absl::FailedPreconditionError(
      absl::StrCat(dir_, " was cut for --tp ", manifest_.tp, " --pp ", manifest_.pp, layers, split,
                   "; run it with these, or cut the model again with shoal shard"));
}

absl::Status ShardDirectory::Damaged(int rank, int unit, const WeightExtent& extent) const {
  const WeightUnit& u = manifest_.ranks[rank].layout.units[unit];
  const int64_t begin = kShardDataOffset + u.offset + extent.offset;
  return absl::DataLossError(absl::StrCat(
      RankPath(rank), ": ", Printable(extent.tensor), " (", UnitName(u), ", bytes ", begin, " to ",
      begin + extent.bytes, ") does not have its checksum: the file was damaged; ", Again()));
}

absl::Status ShardDirectory::CheckUnit(int rank, int unit, const uint8_t* data) const {
  const ShardRank& r = manifest_.ranks[rank];
  const WeightUnit& u = r.layout.units[unit];
  for (size_t i = 0; i < u.extents.size(); ++i) {
    const WeightExtent& e = u.extents[i];
    if (Checksum(data + e.offset, e.bytes) != r.checksums[unit][i]) return Damaged(rank, unit, e);
  }
  return absl::OkStatus();
}

absl::Status ShardDirectory::CheckUnitOnDisk(int rank, int unit,
                                             const AsyncFile::Options& options) const {
  constexpr int64_t kStep = int64_t{8} << 20;
  const ShardRank& r = manifest_.ranks[rank];
  const WeightUnit& u = r.layout.units[unit];
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<AsyncFile> file,
                         AsyncFile::Open(RankPath(rank), options));
  SHOAL_ASSIGN_OR_RETURN(Buffer buffer, Buffer::Allocate(kStep));
  std::vector<std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)>> hashes;
  for (size_t i = 0; i < u.extents.size(); ++i) {
    hashes.emplace_back(XXH3_createState(), &XXH3_freeState);
    XXH3_64bits_reset(hashes.back().get());
  }
  for (int64_t at = 0; at < u.bytes; at += kStep) {
    const int64_t n = std::min(kStep, u.bytes - at);
    SHOAL_RETURN_IF_ERROR(file->Transfer(false, kShardDataOffset + u.offset + at, buffer.data(),
                                         (n + kIoAlignment - 1) / kIoAlignment * kIoAlignment));
    for (size_t i = 0; i < u.extents.size(); ++i) {
      const int64_t begin = std::max(at, u.extents[i].offset);
      const int64_t end = std::min(at + n, u.extents[i].offset + u.extents[i].bytes);
      if (begin < end) XXH3_64bits_update(hashes[i].get(), buffer.data() + begin - at, end - begin);
    }
  }
  for (size_t i = 0; i < u.extents.size(); ++i) {
    if (XXH3_64bits_digest(hashes[i].get()) != r.checksums[unit][i]) {
      return Damaged(rank, unit, u.extents[i]);
    }
  }
  return absl::OkStatus();
}

absl::Status ShardDirectory::Repair(int rank, int unit, const Checkpoint& source,
                                    uint8_t* data) const {
  const WeightUnit& u = manifest_.ranks[rank].layout.units[unit];
  SHOAL_RETURN_IF_ERROR(LoadUnit(source, u, data));
  SHOAL_RETURN_IF_ERROR(CheckUnit(rank, unit, data));
  AsyncFile::Options options;
  options.write = true;
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<AsyncFile> file,
                         AsyncFile::Open(RankPath(rank), options));
  return file->Transfer(true, kShardDataOffset + u.offset, data,
                        (u.bytes + kIoAlignment - 1) / kIoAlignment * kIoAlignment);
}

absl::Status ShardDirectory::Verify(const ByteProgress& progress) const {
  int64_t total = 0, done = 0, largest = 2 << 20;
  for (const ShardRank& r : manifest_.ranks) {
    total += r.layout.bytes;
    for (const WeightUnit& u : r.layout.units)
      largest = std::max(largest, (u.bytes + 4095) / 4096 * 4096);
  }
  SHOAL_ASSIGN_OR_RETURN(Buffer buffer, Buffer::Allocate(largest));
  std::string bad;
  for (size_t rank = 0; rank < manifest_.ranks.size(); ++rank) {
    const int r = static_cast<int>(rank);
    SHOAL_RETURN_IF_ERROR(CheckHeader(r));
    SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<AsyncFile> file, AsyncFile::Open(RankPath(r), {}));
    const std::vector<WeightUnit>& units = manifest_.ranks[r].layout.units;
    for (size_t i = 0; i < units.size(); ++i) {
      SHOAL_RETURN_IF_ERROR(file->Transfer(false, kShardDataOffset + units[i].offset, buffer.data(),
                                           (units[i].bytes + 4095) / 4096 * 4096));
      const absl::Status s = CheckUnit(r, static_cast<int>(i), buffer.data());
      if (!s.ok()) absl::StrAppend(&bad, bad.empty() ? "" : "\n", s.message());
      done += units[i].bytes;
      if (progress) progress(done, total);
    }
  }
  return bad.empty() ? absl::OkStatus() : absl::DataLossError(bad);
}

const TensorInfo* ShardDirectory::FindTensor(const std::string& name) const {
  for (const TensorInfo& t : manifest_.tensors) {
    if (t.name == name) return &t;
  }
  return nullptr;
}

absl::Status ShardDirectory::Read(const TensorInfo& tensor, int64_t begin, int64_t n,
                                  uint8_t* out) const {
  if (const TensorInfo* kept = metadata_->FindTensor(tensor.name)) {
    return metadata_->Read(*kept, begin, n, out);
  }
  return absl::FailedPreconditionError(absl::StrCat(
      dir_, " holds ", Printable(tensor.name),
      " packed for its ranks only; this command needs the GGUF that it was made from"));
}

std::vector<std::string> ShardDirectory::Files() const {
  std::vector<std::string> files = {dir_};
  for (const ShardRank& r : manifest_.ranks) files.push_back(dir_ + "/" + r.file);
  return files;
}

int64_t ShardDirectory::TotalBytes() const { return manifest_.source_bytes; }

}  // namespace shoal
