#include "shard/shard_cache_room.h"

#include <sys/stat.h>

#include <algorithm>
#include <filesystem>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "offload/folder_lock.h"
#include "offload/memory_budget.h"
#include "shard/shard_manifest.h"

namespace shoal {
namespace {

namespace fs = std::filesystem;

struct Entry {
  std::string path;
  int64_t bytes = 0;   // of the disk
  timespec used = {};  // last
};

int64_t BytesOnDisk(const fs::path& dir) {
  int64_t bytes = 0;
  std::error_code error;
  for (const fs::directory_entry& e : fs::directory_iterator(dir, error)) {
    struct stat st = {};
    if (lstat(e.path().c_str(), &st) == 0) bytes += int64_t{st.st_blocks} * 512;
  }
  return bytes;
}

// All but the one called `name`, that used longest ago first.
std::vector<Entry> OthersThan(const std::string& name, const std::string& dir) {
  std::vector<Entry> entries;
  std::error_code error;
  for (const fs::directory_entry& e : fs::directory_iterator(dir, error)) {
    const std::string file = e.path().filename();
    std::error_code ignored;
    if (file == name || !absl::StartsWith(file, kShardCachePrefix) || !e.is_directory(ignored)) {
      continue;
    }
    struct stat st = {};
    // An entry that was never used has no such file, and the time zero.
    stat((e.path() / FolderLock::kUseFile).c_str(), &st);
    entries.push_back({e.path(), BytesOnDisk(e.path()), st.st_mtim});
  }
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return std::pair(a.used.tv_sec, a.used.tv_nsec) < std::pair(b.used.tv_sec, b.used.tv_nsec);
  });
  return entries;
}

}  // namespace

void EmptyShardCacheEntry(const std::string& dir) {
  std::error_code error;
  // Killed in between, it shall not look whole.
  fs::remove(dir + "/" + kManifestName, error);
  for (const fs::directory_entry& e : fs::directory_iterator(dir, error)) {
    const fs::path file = e.path().filename();
    std::error_code ignored;
    if (file != FolderLock::kFile && file != FolderLock::kUseFile) fs::remove_all(e, ignored);
  }
}

absl::Status MakeShardCacheRoom(const std::string& dir, const std::string& name, int64_t bytes,
                                int64_t bytes_max) {
  const std::vector<Entry> others = OthersThan(name, dir);
  int64_t taken = bytes, in_use = 0;
  for (const Entry& e : others) taken += e.bytes;
  std::vector<std::pair<const Entry*, FolderLock>> go;
  for (const Entry& e : others) {
    if (taken <= bytes_max || bytes > bytes_max) break;
    if (e.bytes == 0) continue;
    if (std::optional<FolderLock> unused = FolderLock::TakeUnused(e.path)) {
      taken -= e.bytes;
      go.emplace_back(&e, *std::move(unused));
    } else {
      in_use += e.bytes;
    }
  }
  if (taken > bytes_max) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "the packed model takes ", FormatBytes(bytes), " of disk and ", dir, " may take ",
        FormatBytes(bytes_max), " (--disk-cache-limit)",
        in_use > 0 ? absl::StrCat(", ", FormatBytes(in_use), " of them used by running processes")
                   : ""));
  }
  for (const auto& [entry, lock] : go) EmptyShardCacheEntry(entry->path);
  return absl::OkStatus();
}

}  // namespace shoal
