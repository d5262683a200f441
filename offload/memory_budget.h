// How much memory this process may use, and one hard budget that everything large is taken from.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/mutex.h"

namespace shoal {

// "4G", "512M", "1.5GiB", "300000" (bytes). K, M, G, T are powers of 1024. kInvalidArgument
// otherwise.
absl::StatusOr<int64_t> ParseBytes(std::string_view text);
// "3.7 GiB", "512 MiB", "12 KiB"
std::string FormatBytes(int64_t bytes);

struct FreeMemory {
  int64_t available =
      0;              // what can be taken now without swapping and without meeting a cgroup limit
  std::string bound;  // what says so: "MemAvailable" or the cgroup's path
  bool in_cgroup = false;  // a limit of the group says so
};
// `root` stands for "/" (tests bring their own /proc and /sys). Every cgroup from this process's
// own up to the root counts, v1 and v2: the tightest limit less what its members already use (page
// cache that can be dropped is not counted as used).
absl::StatusOr<FreeMemory> ReadFreeMemory(const std::string& root = "");
// What is kept free when the user names no budget: a twentieth for the rest of the machine, a
// fiftieth of a cgroup, which has its limit for itself.
int64_t DefaultMargin(const FreeMemory& free);

// Named reservations out of a fixed number of bytes. Any thread.
class MemoryBudget {
 public:
  explicit MemoryBudget(int64_t total, std::string source)
      : total_(total), source_(std::move(source)) {}
  // kResourceExhausted with a table of what is taken, needed and free. A name used again adds to
  // it.
  absl::Status Reserve(const std::string& name, int64_t bytes);
  void Release(const std::string& name);
  int64_t total() const { return total_; }
  int64_t free() const;
  std::string Table() const;

 private:
  struct Entry {
    std::string name;
    int64_t bytes;
  };
  std::string TableLocked() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  int64_t FreeLocked() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const int64_t total_;
  const std::string source_;  // "--ram", "cgroup /x", ...
  mutable Mutex mu_;
  std::vector<Entry> entries_ ABSL_GUARDED_BY(mu_);
};

}  // namespace shoal
