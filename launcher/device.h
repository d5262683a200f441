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
#include "shard/device_forecast.h"
#include "shard/shard_plan.h"

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

// -ngl: two stages of one process, the last `gpu_layers` of `layers` layers on a GPU. Returns the
// --device that says so.
std::string KeepOnGpu(int gpu_layers, int layers, ShardRequest& shard);

// Whether the rank computes on a GPU, on a machine where auto finds one or not.
bool WantsGpu(const std::string& flag, int local_rank, bool auto_finds_one);

// A rank's part of what is free on its GPU now: those of the host that use the same one share it. 0
// on the CPU.
absl::StatusOr<int64_t> FreeGpuShare(const std::string& flag, int local_rank, int local_size);
absl::StatusOr<std::string> GpuName(int gpu);
// A second.
absl::StatusOr<DeviceSpeed> MeasureGpu(int gpu);
// "1008,165,25": GB/s of its memory, TFLOP/s of f16 products, GB/s from host memory to it.
// kInvalidArgument (usage) for anything else.
absl::StatusOr<DeviceSpeed> ParseGpuSpeed(const std::string& text);

}  // namespace shoal
