// A limit on what all page files of a folder take together, whatever models, ranks and processes
// they belong to.
//
// Room is made by the files that no process has open: the pages written first of the file used
// longest ago go first. A file in use keeps what it has.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <utility>

#include "absl/status/status.h"

namespace shoal {

// Any thread; processes take turns by a lock in the folder.
class KvDirectory {
 public:
  // bytes_max 0: no limit.
  KvDirectory(std::string dir, int64_t bytes_max) : dir_(std::move(dir)), bytes_max_(bytes_max) {}

  // Runs `grow`, which takes at most `bytes` more of the disk, once there is room for it.
  // kResourceExhausted with the sizes when files in use leave none; errors of `grow`.
  absl::Status Grow(int64_t bytes, const std::function<absl::Status()>& grow) const;

  int64_t bytes_max() const { return bytes_max_; }

 private:
  std::string dir_;
  int64_t bytes_max_;
};

}  // namespace shoal
