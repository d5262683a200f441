#include "offload/cgroup.h"

#include <sys/sysmacros.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"

namespace shoal {
namespace {

std::string ReadText(const std::string& path) {
  std::ifstream in(path);
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

bool Contains(const std::vector<std::string>& list, const std::string& item) {
  return std::find(list.begin(), list.end(), item) != list.end();
}

// The mount of a hierarchy, and from there all groups down to the one called `own`.
void AppendGroups(const std::string& root, const std::string& mount, const std::string& base,
                  std::string own, bool v2, std::vector<CgroupFolder>& found) {
  // In a container the mount shows a part of the tree: what lies above it cannot be seen.
  if (base != "/" && absl::StartsWith(own, base)) own = own.substr(base.size());
  while (true) {
    if (own == "/") own.clear();
    found.push_back({absl::StrCat(root, mount, own), own.empty() ? "/" : own, v2});
    if (own.empty()) return;
    own.resize(own.rfind('/') == std::string::npos ? 0 : own.rfind('/'));
  }
}

// "254:0" of the whole disk that a device is on or is: limits know no partitions.
std::string DiskName(dev_t device, const std::string& root) {
  const std::string name = absl::StrCat(major(device), ":", minor(device));
  std::error_code error;
  const std::filesystem::path node =
      std::filesystem::canonical(absl::StrCat(root, "/sys/dev/block/", name), error);
  if (error || !std::filesystem::exists(node / "partition", error)) return name;
  const std::string disk = ReadText(node.parent_path() / "dev");
  return disk.substr(0, disk.find('\n'));
}

// Of lines such as "254:0 1000000" (v1) and "254:0 rbps=1000000 wbps=max" (v2); 0: none.
int64_t LimitIn(const std::string& text, const std::string& disk, bool v2) {
  for (const absl::string_view line : absl::StrSplit(text, '\n')) {
    const std::vector<absl::string_view> words = absl::StrSplit(line, ' ', absl::SkipEmpty());
    if (words.size() < 2 || words[0] != disk) continue;
    for (size_t i = 1; i < words.size(); ++i) {
      absl::string_view number = words[i];
      if (v2 && !absl::ConsumePrefix(&number, "rbps=")) continue;
      int64_t limit = 0;
      return absl::SimpleAtoi(number, &limit) ? limit : 0;  // "max"
    }
  }
  return 0;
}

}  // namespace

std::vector<CgroupFolder> CgroupsOf(const std::string& controller, const std::string& root) {
  std::vector<CgroupFolder> found;
  const std::string groups = ReadText(root + "/proc/self/cgroup");
  const std::string mounts = ReadText(root + "/proc/self/mountinfo");
  for (const absl::string_view line : absl::StrSplit(groups, '\n', absl::SkipEmpty())) {
    const std::vector<std::string> part = absl::StrSplit(line, absl::MaxSplits(':', 2));
    if (part.size() != 3) continue;
    const bool v2 = part[0] == "0" && part[1].empty();
    if (!v2 && !Contains(absl::StrSplit(part[1], ','), controller)) continue;
    for (const absl::string_view mount : absl::StrSplit(mounts, '\n', absl::SkipEmpty())) {
      const std::vector<std::string> f = absl::StrSplit(mount, ' ');
      const auto dash = std::find(f.begin(), f.end(), "-");
      if (f.size() < 10 || f.end() - dash < 4) continue;
      const bool is_it =
          v2 ? *(dash + 1) == "cgroup2"
             : *(dash + 1) == "cgroup" && Contains(absl::StrSplit(*(dash + 3), ','), controller);
      if (is_it) AppendGroups(root, f[4], f[3], part[2], v2, found);
    }
  }
  return found;
}

int64_t DiskReadLimit(dev_t device, const std::string& root) {
  const std::string disk = DiskName(device, root);
  int64_t least = 0;
  for (const CgroupFolder& group : CgroupsOf("blkio", root)) {
    const char* file = group.v2 ? "/io.max" : "/blkio.throttle.read_bps_device";
    const int64_t limit = LimitIn(ReadText(group.path + file), disk, group.v2);
    if (limit > 0 && (least == 0 || limit < least)) least = limit;
  }
  return least;
}

}  // namespace shoal
