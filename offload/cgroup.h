// The cgroups, v1 and v2, that this process is in.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <vector>

namespace shoal {

struct CgroupFolder {
  std::string path;  // of its files, below `root`
  std::string name;  // "/user.slice/job", "/"
  bool v2 = false;
};
// This process's own group of a v1 controller ("memory", "blkio") and of v2, each followed by those
// above it as far as they can be seen. `root` stands for "/" (tests bring their own /proc and
// /sys).
std::vector<CgroupFolder> CgroupsOf(const std::string& controller, const std::string& root = "");

// Bytes per second that cgroups let this process read from the disk that holds device `device`
// (st_dev of a file on it); 0: no limit.
int64_t DiskReadLimit(dev_t device, const std::string& root = "");

}  // namespace shoal
