#include "offload/folder_lock.h"

#include <fcntl.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

#include "absl/strings/str_cat.h"
#include "kernels/status_macros.h"

namespace shoal {

absl::StatusOr<FolderLock> FolderLock::Lock(const std::string& path, int operation) {
  FolderLock lock(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  if (lock.fd_ >= 0 && flock(lock.fd_, operation) == 0) return lock;
  const std::string text = absl::StrCat("cannot lock ", path, ": ", strerror(errno));
  return errno == EACCES || errno == EROFS ? absl::PermissionDeniedError(text)
                                           : absl::UnavailableError(text);
}

absl::StatusOr<FolderLock> FolderLock::Take(const std::string& dir) {
  return Lock(absl::StrCat(dir, "/", kFile), LOCK_EX);
}

absl::StatusOr<FolderLock> FolderLock::Use(const std::string& dir) {
  SHOAL_ASSIGN_OR_RETURN(FolderLock lock, Lock(absl::StrCat(dir, "/", kUseFile), LOCK_SH));
  futimens(lock.fd_, nullptr);
  return lock;
}

std::optional<FolderLock> FolderLock::TakeUnused(const std::string& dir) {
  absl::StatusOr<FolderLock> lock = Lock(absl::StrCat(dir, "/", kUseFile), LOCK_EX | LOCK_NB);
  if (!lock.ok()) return std::nullopt;
  return *std::move(lock);
}

FolderLock::~FolderLock() {
  if (fd_ >= 0) close(fd_);
}

}  // namespace shoal
