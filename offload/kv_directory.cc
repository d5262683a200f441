#include "offload/kv_directory.h"

#include <fcntl.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/status_macros.h"
#include "offload/folder_lock.h"
#include "offload/kv_page_file.h"
#include "offload/memory_budget.h"

namespace shoal {
namespace {

struct PageFile {
  std::string path;
  int64_t bytes = 0;   // of the disk: holes take none
  timespec used = {};  // opened or written last
};

// Without what a file system keeps about the file beside it.
int64_t BytesOnDisk(const struct stat& st) {
  return std::min<int64_t>(int64_t{st.st_blocks} * 512, st.st_size);
}

std::vector<PageFile> PageFiles(const std::string& dir) {
  std::vector<PageFile> files;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(dir, error)) {
    struct stat st = {};
    if (entry.path().extension() != ".pages" || stat(entry.path().c_str(), &st) != 0) continue;
    files.push_back({entry.path(), BytesOnDisk(st), st.st_mtim});
  }
  std::sort(files.begin(), files.end(), [](const PageFile& a, const PageFile& b) {
    return std::pair(a.used.tv_sec, a.used.tv_nsec) < std::pair(b.used.tv_sec, b.used.tv_nsec);
  });
  return files;
}

// Empties pages of an open and locked file, the oldest first, until `bytes` are free again or
// nothing is left. Returns what came free.
int64_t Evict(int fd, int64_t bytes) {
  struct stat st = {};
  if (fstat(fd, &st) != 0) return 0;
  // Its next owner starts it anew; removed, it would be lost to one that has just opened it.
  const auto empty = [&] { return ftruncate(fd, 0) == 0 ? BytesOnDisk(st) : 0; };
  const absl::StatusOr<KvPageIndex> index = ReadKvPageIndex(fd);
  if (!index.ok()) return empty();
  std::vector<std::pair<uint64_t, int>> oldest;  // (stamp, record)
  for (size_t r = 0; r < index->records.size(); r++) {
    if (index->records[r].blocks() > 0)
      oldest.emplace_back(index->records[r].stamp, static_cast<int>(r));
  }
  std::sort(oldest.begin(), oldest.end());
  const int64_t size = index->shape.record_bytes();
  const auto needed = static_cast<size_t>((bytes + size - 1) / size);
  if (needed >= oldest.size()) return empty();
  for (size_t i = 0; i < needed; i++) {
    // Zeros are no page.
    if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                  index->shape.record_offset(oldest[i].second), size) != 0) {
      return empty();  // a file system without holes
    }
  }
  return static_cast<int64_t>(needed) * size;
}

}  // namespace

absl::Status KvDirectory::Grow(int64_t bytes, const std::function<absl::Status()>& grow) const {
  if (bytes_max_ == 0) return grow();
  SHOAL_ASSIGN_OR_RETURN(const FolderLock lock, FolderLock::Take(dir_));
  const std::vector<PageFile> files = PageFiles(dir_);
  int64_t taken = 0, in_use = 0;
  for (const PageFile& f : files) taken += f.bytes;
  for (const PageFile& f : files) {
    if (taken + bytes <= bytes_max_) break;
    const int fd = open(f.path.c_str(), O_RDWR | O_CLOEXEC);
    if (fd >= 0 && flock(fd, LOCK_EX | LOCK_NB) == 0) {
      taken -= Evict(fd, taken + bytes - bytes_max_);
    } else {
      in_use += f.bytes;
    }
    if (fd >= 0) close(fd);
  }
  if (taken + bytes > bytes_max_) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the page files in ", dir_, " may take ", FormatBytes(bytes_max_),
                     " (--kv-cache-limit) and ", FormatBytes(taken), " are taken, ",
                     FormatBytes(in_use), " of them by running processes"));
  }
  return grow();
}

}  // namespace shoal
