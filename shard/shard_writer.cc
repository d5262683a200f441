// WriteShards: packs a model's ranks into files, and can be killed at any moment.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <future>
#include <set>
#include <sstream>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "kernels/buffer.h"
#include "kernels/status_macros.h"
#include "shard/shard_file.h"
#include "shard/small_gguf_writer.h"
#include "shard/source_fingerprint.h"
#include "xxhash.h"

namespace shoal {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kSyncBytes = int64_t{256} << 20;   // of data between two lines of the journal
constexpr int64_t kSmallTensor = int64_t{16} << 20;  // tensors outside the layouts that are kept

int64_t PageUp(int64_t n) {
  return (n + kShardDataOffset - 1) / kShardDataOffset * kShardDataOffset;
}

uint64_t LayoutHash(const WeightLayout& layout) {
  ShardManifest m;
  m.ranks.push_back({});
  m.ranks[0].layout = layout;
  for (const WeightUnit& u : layout.units) m.ranks[0].checksums.emplace_back(u.extents.size());
  const std::string json = ManifestToJson(m);
  return Checksum(json.data(), static_cast<int64_t>(json.size()));
}

absl::Status FileError(const std::string& what, const std::string& path, int error) {
  const std::string text = absl::StrCat("cannot ", what, " ", path, ": ", strerror(error));
  if (error == ENOSPC || error == EDQUOT) {
    return absl::ResourceExhaustedError(text + "; make room and run the same command again");
  }
  if (error == EACCES || error == EPERM || error == EROFS) return absl::PermissionDeniedError(text);
  return absl::FailedPreconditionError(text);
}

// Writes a small file so that it is there whole or not at all.
absl::Status WriteWhole(const std::string& path, const std::string& content) {
  const std::string temporary = path + ".part";
  const int fd = open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd < 0) return FileError("create", temporary, errno);
  size_t at = 0;
  int error = 0;
  while (at < content.size() && error == 0) {
    const ssize_t n = write(fd, content.data() + at, content.size() - at);
    if (n >= 0) {
      at += n;
    } else if (errno != EINTR) {
      error = errno;
    }
  }
  if (error == 0 && fsync(fd) != 0) error = errno;
  close(fd);
  if (error == 0 && rename(temporary.c_str(), path.c_str()) != 0) error = errno;
  if (error != 0) return FileError("write", temporary, error);
  return absl::OkStatus();
}

void SyncDirectory(const std::string& dir) {
  const int fd = open(dir.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return;
  fsync(fd);
  close(fd);
}

// What is known to be on disk of a rank's file: a line for each unit with its extents' checksums,
// appended only after the unit's bytes were synced. A torn last line does not count.
class Journal {
 public:
  Journal(std::string path, uint64_t fingerprint, const WeightLayout& layout)
      : path_(std::move(path)),
        head_(absl::StrCat("shoal-shard-journal 1 ", absl::Hex(fingerprint), " ",
                           absl::Hex(LayoutHash(layout)), "\n")) {}

  // The checksums of the units that an earlier run finished.
  std::vector<std::vector<uint64_t>> Load(const WeightLayout& layout) const {
    std::ifstream in(path_);
    std::stringstream text;
    text << in.rdbuf();
    std::vector<std::vector<uint64_t>> done;
    const std::string content = text.str();
    if (content.compare(0, head_.size(), head_) != 0) return done;
    size_t at = head_.size();
    while (done.size() < layout.units.size()) {
      const size_t end = content.find('\n', at);
      if (end == std::string::npos) break;
      std::vector<uint64_t> sums;
      bool ok = true;
      for (absl::string_view word :
           absl::StrSplit(absl::string_view(content).substr(at, end - at), ' ')) {
        uint64_t sum = 0;
        ok = ok && absl::SimpleHexAtoi(word, &sum);
        sums.push_back(sum);
      }
      if (!ok || sums.size() != layout.units[done.size()].extents.size()) break;
      done.push_back(std::move(sums));
      at = end + 1;
    }
    return done;
  }

  // Starts over with what is done.
  absl::Status Begin(const std::vector<std::vector<uint64_t>>& done) {
    std::string content = head_;
    for (const auto& sums : done) content += Line(sums);
    return WriteWhole(path_, content);
  }

  absl::Status Append(const std::vector<std::vector<uint64_t>>& units) {
    const int fd = open(path_.c_str(), O_WRONLY | O_APPEND | O_CLOEXEC);
    if (fd < 0) return FileError("append to", path_, errno);
    std::string lines;
    for (const auto& sums : units) lines += Line(sums);
    const ssize_t n = write(fd, lines.data(), lines.size());
    int error = n == static_cast<ssize_t>(lines.size()) ? 0 : n < 0 ? errno : ENOSPC;
    if (error == 0 && fsync(fd) != 0) error = errno;
    close(fd);
    return error == 0 ? absl::OkStatus() : FileError("append to", path_, error);
  }

 private:
  static std::string Line(const std::vector<uint64_t>& sums) {
    std::string line;
    for (const uint64_t s : sums) absl::StrAppend(&line, line.empty() ? "" : " ", absl::Hex(s));
    return line + "\n";
  }
  const std::string path_;
  const std::string head_;
};

// One rank's file, from its header to its new name.
class RankWriter {
 public:
  RankWriter(const Checkpoint& checkpoint, const ShardWriteOptions& options, const std::string& dir,
             ShardRank& rank, uint64_t fingerprint, int world)
      : checkpoint_(checkpoint),
        options_(options),
        path_(dir + "/" + rank.file),
        rank_(rank),
        fingerprint_(fingerprint),
        world_(world),
        journal_(path_ + ".journal", fingerprint, rank.layout) {}

  int64_t file_bytes() const { return kShardDataOffset + PageUp(rank_.layout.bytes); }

  // `add` is told of bytes that are done; returns those found done.
  absl::StatusOr<int64_t> Write(const std::function<void(int64_t)>& add) {
    rank_.checksums = journal_.Load(rank_.layout);
    std::error_code ignored;
    const size_t units = rank_.layout.units.size();
    const auto size_of = [&](const std::string& p) {
      const auto n = fs::file_size(p, ignored);
      return ignored ? int64_t{-1} : static_cast<int64_t>(n);
    };
    if (rank_.checksums.size() == units && size_of(path_) == file_bytes()) {
      add(rank_.layout.bytes);
      return rank_.layout.bytes;
    }
    const std::string part = path_ + ".part";
    const bool resume = !rank_.checksums.empty() && size_of(part) == file_bytes();
    if (!resume) rank_.checksums.clear();
    AsyncFile::Options file_options = options_.file;
    file_options.write = true;
    file_options.create = !resume;
    SHOAL_ASSIGN_OR_RETURN(file_, AsyncFile::Open(part, file_options));
    SHOAL_RETURN_IF_ERROR(file_->Reserve(0, file_bytes()));
    if (!resume) SHOAL_RETURN_IF_ERROR(WriteHeader());
    SHOAL_RETURN_IF_ERROR(journal_.Begin(rank_.checksums));
    const size_t first = rank_.checksums.size();
    const int64_t resumed = first < units ? rank_.layout.units[first].offset : rank_.layout.bytes;
    add(resumed);
    SHOAL_RETURN_IF_ERROR(WriteUnits(first, add));
    file_.reset();
    if (truncate(part.c_str(), file_bytes()) != 0) return FileError("size", part, errno);
    if (rename(part.c_str(), path_.c_str()) != 0) return FileError("rename", part, errno);
    return resumed;
  }

 private:
  absl::Status WriteHeader() {
    SHOAL_ASSIGN_OR_RETURN(Buffer block, Buffer::Allocate(2 << 20));
    ShardHeader header = {};
    std::memcpy(header.magic, kShardMagic, sizeof header.magic);
    header.version = kShardFormatVersion;
    header.rank = rank_.plan.rank;
    header.world = world_;
    header.fingerprint = fingerprint_;
    header.data_bytes = rank_.layout.bytes;
    header.checksum = Checksum(&header, offsetof(ShardHeader, checksum));
    std::memcpy(block.data(), &header, sizeof header);
    return file_->Transfer(true, 0, block.data(), kShardDataOffset);
  }

  // Packs the next unit while this one is written.
  absl::Status WriteUnits(size_t first, const std::function<void(int64_t)>& add) {
    const std::vector<WeightUnit>& units = rank_.layout.units;
    int64_t largest = 2 << 20;
    for (const WeightUnit& u : units) largest = std::max(largest, PageUp(u.bytes));
    Buffer buffers[2];
    for (Buffer& b : buffers) {
      SHOAL_ASSIGN_OR_RETURN(b, Buffer::Allocate(largest));
    }
    const auto load = [&](size_t i) {
      WeightLayout one;
      one.units.push_back(units[i]);
      one.units[0].offset = 0;
      one.bytes = PageUp(units[i].bytes);
      return LoadAll(checkpoint_, one, options_.threads, buffers[i % 2].data(), nullptr);
    };
    std::future<absl::Status> next;
    if (first < units.size()) next = std::async(std::launch::async, load, first);
    std::vector<std::vector<uint64_t>> unsynced;
    int64_t unsynced_bytes = 0;
    for (size_t i = first; i < units.size(); ++i) {
      SHOAL_RETURN_IF_ERROR(next.get());
      if (i + 1 < units.size()) next = std::async(std::launch::async, load, i + 1);
      const uint8_t* data = buffers[i % 2].data();
      std::vector<uint64_t> sums;
      for (const WeightExtent& e : units[i].extents)
        sums.push_back(Checksum(data + e.offset, e.bytes));
      const int64_t end = i + 1 < units.size() ? units[i + 1].offset : rank_.layout.bytes;
      absl::Status s = file_->Transfer(true, kShardDataOffset + units[i].offset,
                                       buffers[i % 2].data(), PageUp(units[i].bytes));
      unsynced.push_back(std::move(sums));
      unsynced_bytes += units[i].bytes;
      if (s.ok() && (unsynced_bytes >= kSyncBytes || i + 1 == units.size())) {
        s = file_->Sync();
        if (s.ok()) s = journal_.Append(unsynced);
        for (auto& done : unsynced) rank_.checksums.push_back(std::move(done));
        unsynced.clear();
        unsynced_bytes = 0;
      }
      if (!s.ok()) {
        if (next.valid()) next.wait();
        return s;
      }
      add(end - units[i].offset);
    }
    return absl::OkStatus();
  }

  const Checkpoint& checkpoint_;
  const ShardWriteOptions& options_;
  const std::string path_;
  ShardRank& rank_;
  const uint64_t fingerprint_;
  const int world_;
  Journal journal_;
  std::unique_ptr<AsyncFile> file_;
};

// model.gguf: the metadata without what describes the split of the source, and the small tensors
// that no layout holds.
absl::StatusOr<std::string> MetadataGguf(const Checkpoint& checkpoint,
                                         const ShardManifest& manifest) {
  std::set<std::string> placed;
  for (const ShardRank& r : manifest.ranks) {
    for (const WeightUnit& u : r.layout.units) {
      for (const WeightExtent& e : u.extents) placed.insert(e.tensor);
    }
  }
  SmallGgufWriter writer;
  for (const std::string& key : checkpoint.MetadataKeys()) {
    const bool drop = key.rfind("split.", 0) == 0 || key == "general.alignment";
    if (!drop) writer.AddMetadata(key, *checkpoint.FindMetadata(key));
  }
  for (const TensorInfo& t : checkpoint.tensors()) {
    if (placed.count(t.name) > 0 || t.bytes > kSmallTensor) continue;
    std::string data(t.bytes, '\0');
    SHOAL_RETURN_IF_ERROR(checkpoint.Read(t, 0, t.bytes, reinterpret_cast<uint8_t*>(data.data())));
    writer.AddTensor(t, std::move(data));
  }
  return writer.Finish();
}

absl::StatusOr<ShardManifest> PlanManifest(const Checkpoint& checkpoint, const ModelConfig& config,
                                           const ShardWriteOptions& options) {
  ShardManifest m;
  SHOAL_ASSIGN_OR_RETURN(const ShardPlan plan, MakeShardPlan(config, checkpoint, options.shard));
  SHOAL_ASSIGN_OR_RETURN(m.fingerprint, SourceFingerprint(checkpoint));
  m.model = config.name;
  for (const std::string& f : checkpoint.Files())
    m.source.push_back(fs::path(f).filename().string());
  m.source_bytes = checkpoint.TotalBytes();
  m.tp = plan.tp;
  m.pp = plan.pp;
  m.split = options.shard.split;
  m.tensors = checkpoint.tensors();
  for (TensorInfo& t : m.tensors) t.offset = t.file = 0;
  for (const RankPlan& rank : plan.ranks) {
    ShardRank r;
    r.plan = rank;
    r.file = absl::StrCat("rank-", absl::Dec(rank.rank, absl::kZeroPad3), ".shard");
    SHOAL_ASSIGN_OR_RETURN(r.layout, MakeWeightLayout(checkpoint, config, rank));
    const uint64_t layout = LayoutHash(r.layout);
    m.fingerprint = XXH3_64bits_withSeed(&layout, sizeof layout, m.fingerprint);
    m.ranks.push_back(std::move(r));
  }
  return m;
}

// Is a finished directory there, and the same one?
absl::StatusOr<bool> AlreadyThere(const std::string& dir, const ShardManifest& wanted, bool force) {
  if (!fs::exists(dir + "/" + kManifestName)) return false;
  if (force) {
    std::error_code ignored;
    fs::remove(dir + "/" + kManifestName, ignored);
    for (const auto& entry : fs::directory_iterator(dir, ignored)) {
      if (entry.path().filename().string().rfind("rank-", 0) == 0)
        fs::remove(entry.path(), ignored);
    }
    return false;
  }
  absl::StatusOr<std::unique_ptr<ShardDirectory>> there = ShardDirectory::Open(dir);
  if (there.ok() && (*there)->manifest().fingerprint == wanted.fingerprint) return true;
  return absl::FailedPreconditionError(absl::StrCat(
      dir, " already holds ",
      there.ok()
          ? absl::StrCat("'", (*there)->manifest().model, "' for tp ", (*there)->manifest().tp,
                         ", pp ", (*there)->manifest().pp)
          : absl::StrCat("shards that do not open (", std::string(there.status().message()), ")"),
      ": choose another folder, or --force to replace it"));
}

}  // namespace

absl::StatusOr<ShardWriteResult> WriteShards(const Checkpoint& checkpoint,
                                             const ModelConfig& config, const std::string& dir,
                                             const ShardWriteOptions& options) {
  SHOAL_ASSIGN_OR_RETURN(ShardManifest manifest, PlanManifest(checkpoint, config, options));
  std::error_code error;
  fs::create_directories(dir, error);
  if (error) return FileError("make the folder", dir, error.value());
  SHOAL_ASSIGN_OR_RETURN(const bool there, AlreadyThere(dir, manifest, options.force));
  ShardWriteResult result;
  for (const ShardRank& r : manifest.ranks) result.bytes += r.layout.bytes;
  if (there) {
    result.already_there = true;
    return result;
  }
  int64_t done = 0;
  for (ShardRank& rank : manifest.ranks) {
    RankWriter writer(checkpoint, options, dir, rank, manifest.fingerprint,
                      manifest.tp * manifest.pp);
    SHOAL_ASSIGN_OR_RETURN(const int64_t resumed, writer.Write([&](int64_t bytes) {
      done += bytes;
      if (options.progress) options.progress(done, result.bytes);
    }));
    result.resumed_bytes += resumed;
  }
  SHOAL_ASSIGN_OR_RETURN(const std::string metadata, MetadataGguf(checkpoint, manifest));
  manifest.metadata_bytes = static_cast<int64_t>(metadata.size());
  manifest.metadata_checksum = Checksum(metadata.data(), manifest.metadata_bytes);
  SHOAL_RETURN_IF_ERROR(WriteWhole(dir + "/" + kMetadataName, metadata));
  SyncDirectory(dir);
  SHOAL_RETURN_IF_ERROR(WriteWhole(dir + "/" + kManifestName, ManifestToJson(manifest)));
  SyncDirectory(dir);
  for (const ShardRank& rank : manifest.ranks)
    fs::remove(dir + "/" + rank.file + ".journal", error);
  return result;
}

}  // namespace shoal
