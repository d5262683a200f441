#include "offload/memory_budget.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <fstream>
#include <limits>
#include <optional>
#include <sstream>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "fmt/format.h"
#include "offload/cgroup.h"

namespace shoal {
namespace {

std::optional<std::string> ReadText(const std::string& path) {
  std::ifstream in(path);
  if (!in) return std::nullopt;
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

std::optional<int64_t> ReadNumber(const std::string& path) {
  std::optional<std::string> text = ReadText(path);
  int64_t value;
  // "max" and v1's 2^63 rounded down to a page both mean no limit.
  if (!text || !absl::SimpleAtoi(absl::StripAsciiWhitespace(*text), &value)) return std::nullopt;
  return value;
}

// Value of "key 123" or "key: 123 kB" in a file of such lines.
std::optional<int64_t> FindLine(const std::string& text, const std::string& key) {
  for (auto line : absl::StrSplit(text, '\n')) {
    std::vector<std::string> words =
        absl::StrSplit(line, absl::ByAnyChar(" \t:"), absl::SkipEmpty());
    int64_t value;
    if (words.size() >= 2 && words[0] == key && absl::SimpleAtoi(words[1], &value)) return value;
  }
  return std::nullopt;
}

struct Limit {
  int64_t limit;
  int64_t used;
};

std::optional<Limit> ReadLimit(const std::string& dir, bool v2) {
  std::optional<int64_t> limit = ReadNumber(dir + (v2 ? "/memory.max" : "/memory.limit_in_bytes"));
  if (v2) {
    // Beyond memory.high a group is throttled until it crawls: as good as a limit.
    std::optional<int64_t> high = ReadNumber(dir + "/memory.high");
    if (high) limit = limit ? std::min(*limit, *high) : *high;
  }
  std::optional<int64_t> used =
      ReadNumber(dir + (v2 ? "/memory.current" : "/memory.usage_in_bytes"));
  if (!limit || !used) return std::nullopt;
  std::string stat = ReadText(dir + "/memory.stat").value_or("");
  const char* total = v2 ? "" : "total_";
  int64_t cache = FindLine(stat, absl::StrCat(total, "inactive_file")).value_or(0) +
                  FindLine(stat, absl::StrCat(total, "active_file")).value_or(0);
  return Limit{*limit, std::max<int64_t>(0, *used - cache)};
}

}  // namespace

absl::StatusOr<int64_t> ParseBytes(std::string_view text) {
  std::string s = absl::AsciiStrToUpper(absl::string_view(text.data(), text.size()));
  double scale = 1;
  if (absl::EndsWith(s, "IB")) {
    s.resize(s.size() - 2);
  } else if (absl::EndsWith(s, "B")) {
    s.resize(s.size() - 1);
  }
  static constexpr char kUnits[] = "KMGT";
  for (int i = 0; i < 4; i++) {
    if (!s.empty() && s.back() == kUnits[i]) {
      scale = std::pow(1024.0, i + 1);
      s.pop_back();
      break;
    }
  }
  double value;
  if (s.empty() || !std::isdigit(static_cast<unsigned char>(s[0])) ||
      !absl::SimpleAtod(s, &value) || !(value * scale < 9e18)) {
    return absl::InvalidArgumentError(
        absl::StrCat("\"", absl::string_view(text.data(), text.size()),
                     "\" is not a size; write 4G, 512M or a number of bytes"));
  }
  return static_cast<int64_t>(value * scale);
}

std::string FormatBytes(int64_t bytes) {
  if (bytes < 0) return absl::StrCat("-", FormatBytes(-bytes));
  double v = static_cast<double>(bytes);
  const char* unit = "B";
  for (const char* next : {"KiB", "MiB", "GiB", "TiB"}) {
    if (v < 1024) break;
    v /= 1024;
    unit = next;
  }
  return fmt::format("{:.{}f} {}", v,
                     v < 10 && unit[0] != 'B'    ? 2
                     : v < 100 && unit[0] != 'B' ? 1
                                                 : 0,
                     unit);
}

absl::StatusOr<FreeMemory> ReadFreeMemory(const std::string& root) {
  std::optional<int64_t> available;
  if (auto text = ReadText(root + "/proc/meminfo")) available = FindLine(*text, "MemAvailable");
  if (!available) {
    return absl::UnavailableError("/proc/meminfo has no MemAvailable; name a budget with --ram");
  }
  FreeMemory free{*available * 1024, "MemAvailable", false};
  for (const CgroupFolder& group : CgroupsOf("memory", root)) {
    const std::optional<Limit> limit = ReadLimit(group.path, group.v2);
    if (!limit.has_value()) continue;
    const int64_t left = std::max<int64_t>(0, limit->limit - limit->used);
    if (left < free.available) free = {left, absl::StrCat("cgroup ", group.name), true};
  }
  return free;
}

int64_t DefaultMargin(const FreeMemory& free) {
  constexpr int64_t kMost = int64_t{1} << 30;
  if (free.in_cgroup) return std::clamp<int64_t>(free.available / 50, 32 << 20, kMost);
  return std::clamp<int64_t>(free.available / 20, 128 << 20, kMost);
}

int64_t MemoryBudget::FreeLocked() const {
  int64_t free = total_;
  for (const Entry& e : entries_) free -= e.bytes;
  return free;
}

int64_t MemoryBudget::free() const {
  MutexLock lock(&mu_);
  return FreeLocked();
}

absl::Status MemoryBudget::Reserve(const std::string& name, int64_t bytes) {
  MutexLock lock(&mu_);
  int64_t free = FreeLocked();
  if (bytes > free) {
    return absl::ResourceExhaustedError(fmt::format("{} needs {}, but {} of {} are free:\n{}", name,
                                                    FormatBytes(bytes), FormatBytes(free),
                                                    FormatBytes(total_), TableLocked()));
  }
  for (Entry& e : entries_) {
    if (e.name == name) {
      e.bytes += bytes;
      return absl::OkStatus();
    }
  }
  entries_.push_back({name, bytes});
  return absl::OkStatus();
}

void MemoryBudget::Release(const std::string& name) {
  MutexLock lock(&mu_);
  std::erase_if(entries_, [&](const Entry& e) { return e.name == name; });
}

std::string MemoryBudget::TableLocked() const {
  std::string table;
  for (const Entry& e : entries_) {
    table += fmt::format("  {:<20} {:>12}\n", e.name, FormatBytes(e.bytes));
  }
  table += fmt::format("  {:<20} {:>12}\n", "free", FormatBytes(FreeLocked()));
  table += fmt::format("  {:<20} {:>12}\n", "budget (" + source_ + ")", FormatBytes(total_));
  return table;
}

std::string MemoryBudget::Table() const {
  MutexLock lock(&mu_);
  return TableLocked();
}

}  // namespace shoal
