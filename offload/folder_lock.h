// Locks of a folder: processes, and threads of one, take turns at what lies in it, and nobody
// removes what another uses.
#pragma once

#include <optional>
#include <string>
#include <utility>

#include "absl/status/statusor.h"

namespace shoal {

// Of a file in it; let go of when this goes, or the process. Move-only.
class FolderLock {
 public:
  static constexpr char kFile[] = ".lock";
  // Its time is that of the latest Use.
  static constexpr char kUseFile[] = ".used";
  // Waits for whoever has it. kPermissionDenied, kUnavailable.
  static absl::StatusOr<FolderLock> Take(const std::string& dir);
  // Beside Take: what lies there is in use, by any number at once. Waits for a TakeUnused. Errors
  // as above.
  static absl::StatusOr<FolderLock> Use(const std::string& dir);
  // Whoever wants to use what lies there waits now; nothing when somebody does already.
  static std::optional<FolderLock> TakeUnused(const std::string& dir);
  FolderLock(FolderLock&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;
  FolderLock& operator=(FolderLock&&) = delete;
  ~FolderLock();

 private:
  explicit FolderLock(int fd) : fd_(fd) {}
  static absl::StatusOr<FolderLock> Lock(const std::string& path, int operation);
  int fd_;
};

}  // namespace shoal
