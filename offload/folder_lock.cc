#include "offload/folder_lock.h"

#include <fcntl.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>

#include "absl/strings/str_cat.h"

namespace shoal {

absl::StatusOr<FolderLock> FolderLock::Take(const std::string& dir) {
  const std::string path = absl::StrCat(dir, "/", kFile);
  FolderLock lock(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  if (lock.fd_ >= 0 && flock(lock.fd_, LOCK_EX) == 0) return lock;
  const std::string text = absl::StrCat("cannot lock ", path, ": ", strerror(errno));
  return errno == EACCES || errno == EROFS ? absl::PermissionDeniedError(text)
                                           : absl::UnavailableError(text);
}

FolderLock::~FolderLock() {
  if (fd_ >= 0) close(fd_);
}

}  // namespace shoal
