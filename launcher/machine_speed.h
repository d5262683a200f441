// What this machine reads and multiplies per second, measured once and remembered with the date.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/dtype.h"

namespace shoal {

struct MeasuredSpeed {
  double read_bytes_per_s =
      0;  // of a large file on the disk where `path` lies, past the page cache
  double decode_bytes_per_s = 0;   // weights of `type` multiplied with one row
  double prefill_bytes_per_s = 0;  // with a batch, counted once per row
  std::string date;                // of the oldest of them
};

// Takes what $XDG_CACHE_HOME/shoal/machine.json knows of this disk, this type and this backend
// (unless `again`), and measures the rest: about two seconds. A cache that cannot be written is no
// error.
absl::StatusOr<MeasuredSpeed> MeasureSpeed(const std::string& path, DType type,
                                           const CpuOptions& cpu, bool again);

}  // namespace shoal
