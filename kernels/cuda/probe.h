// What `shoal doctor` tells of this machine's GPUs. No device code.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/cuda/device.h"

namespace shoal::cuda {

struct GpuProbe {
  GpuInfo info;
  int64_t free_bytes = 0;
  // Measured with pinned host memory, bytes per second; 0 when the memory for it was not to be had.
  double from_host_bytes_per_s = 0;
  double to_host_bytes_per_s = 0;
  std::vector<int> peers;  // GPUs whose memory this one can reach directly
};

struct GpuProbes {
  std::string driver, runtime;  // CUDA versions, "13.0"
  std::vector<GpuProbe> gpus;
};

absl::StatusOr<int64_t> FreeBytesOf(int device);

// A fraction of a second for each GPU. kUnavailable with the reason when there is none.
absl::StatusOr<GpuProbes> ProbeGpus();

}  // namespace shoal::cuda
