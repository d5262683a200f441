// What this machine reads and multiplies per second, measured once and remembered with the date.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/dtype.h"
#include "shard/device_forecast.h"
#include "shard/forecast.h"

namespace shoal {

struct SpeedQuestion {
  std::string path;                // a large file on the disk that is streamed from
  std::map<DType, int64_t> bytes;  // of the model's weights, by type
  AttentionShape attention;
  KvType kv_type = KvType::kF16;
  CpuOptions cpu;
  int64_t memory = 0;  // that measuring may take
};

struct MeasuredSpeed {
  MachineSpeed speed;
  std::string date;  // of the oldest number
};

// Takes what $XDG_CACHE_HOME/shoal/machine.json knows of this host's disk, these types and this CPU
// (not from longer than a month ago, and not when asked to measure `again`), and measures the rest:
// a few seconds. A cache that cannot be read or written is no error.
absl::StatusOr<MeasuredSpeed> MeasureSpeed(const SpeedQuestion& question, bool again);

// The same of a GPU, called `name`, that `measure` measures.
struct MeasuredDevice {
  DeviceSpeed speed;
  std::string date;
};
absl::StatusOr<MeasuredDevice> MeasureDevice(
    const std::string& name, bool again,
    const std::function<absl::StatusOr<DeviceSpeed>()>& measure);

}  // namespace shoal
