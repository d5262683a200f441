// A lock of a folder: processes, and threads of one, take turns at what lies in it.
#pragma once

#include <string>
#include <utility>

#include "absl/status/statusor.h"

namespace shoal {

// Of the file kFile in it; let go of when this goes, or the process. Move-only.
class FolderLock {
 public:
  static constexpr char kFile[] = ".lock";
  // Waits for whoever has it. kPermissionDenied, kUnavailable.
  static absl::StatusOr<FolderLock> Take(const std::string& dir);
  FolderLock(FolderLock&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;
  FolderLock& operator=(FolderLock&&) = delete;
  ~FolderLock();

 private:
  explicit FolderLock(int fd) : fd_(fd) {}
  int fd_;
};

}  // namespace shoal
