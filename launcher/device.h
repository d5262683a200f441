// Which device each rank computes on: --device auto, cpu, cuda, cuda:N, or a list with one for each
// rank of a host.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace shoal {

// What to make for local rank `local_rank`. A null function stands for the CPU.
struct DeviceChoice {
  std::function<absl::StatusOr<std::unique_ptr<Backend>>()> make;
  std::string note;  // a line for the log: why a binary with CUDA computes on the CPU
  int gpu = -1;      // which one, as CUDA counts
};

// kInvalidArgument (usage) when the text says nothing known. Whether such a device exists is for
// the host of the rank to say.
absl::Status CheckDeviceFlag(const std::string& flag);

// cuda: the GPUs this process sees (CUDA_VISIBLE_DEVICES) are taken in turn, so that with more
// ranks than GPUs some share one. auto: the same where there is a GPU, else the CPU.
// kInvalidArgument (usage) when the text says nothing known; kUnavailable when cuda is asked for
// and cannot be had.
absl::StatusOr<DeviceChoice> ChooseDevice(const std::string& flag, int local_rank);

// Bytes that are free on a GPU now.
absl::StatusOr<int64_t> FreeGpuBytes(int gpu);

}  // namespace shoal
