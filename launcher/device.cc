#include "launcher/device.h"

#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "kernels/status_macros.h"
#include "launcher/exit_code.h"
#ifdef SHOAL_CUDA
#include "kernels/cuda/backend.h"
#include "kernels/cuda/kernel_bench.h"
#include "kernels/cuda/probe.h"
#endif

namespace shoal {
namespace {

// Number of GPUs; the reason when there is none.
absl::StatusOr<int> CountGpus() {
#ifdef SHOAL_CUDA
  const absl::StatusOr<std::vector<cuda::GpuInfo>> gpus = cuda::ListGpus();
  if (!gpus.ok()) return gpus.status();
  return static_cast<int>(gpus->size());
#else
  return absl::UnavailableError("this shoal was built without CUDA (cmake --preset cuda)");
#endif
}

absl::StatusOr<std::unique_ptr<Backend>> MakeGpu([[maybe_unused]] int index) {
#ifdef SHOAL_CUDA
  absl::StatusOr<std::unique_ptr<cuda::CudaBackend>> backend = cuda::CudaBackend::Create(index);
  if (!backend.ok()) return backend.status();
  return *std::move(backend);
#else
  return absl::UnavailableError("this shoal was built without CUDA");
#endif
}

constexpr bool HasCuda() {
#ifdef SHOAL_CUDA
  return true;
#else
  return false;
#endif
}

absl::StatusOr<int64_t> FreeGpuBytes([[maybe_unused]] int gpu) {
#ifdef SHOAL_CUDA
  return cuda::FreeBytesOf(gpu);
#else
  return absl::UnavailableError("this shoal was built without CUDA");
#endif
}

}  // namespace

absl::Status CheckDeviceFlag(const std::string& flag) {
  const std::vector<std::string> list = absl::StrSplit(flag, ',');
  for (const std::string& name : list) {
    int index = 0;
    const bool numbered =
        name.rfind("cuda:", 0) == 0 && absl::SimpleAtoi(name.substr(5), &index) && index >= 0;
    if (name == "auto" || name == "cpu" || name == "cuda" || numbered) continue;
    return UsageError(absl::StrCat("--device ", flag, ": '", name,
                                   "' is not a device; give auto, cpu, cuda or cuda:0, or a list "
                                   "such as cuda,cpu with one for each rank of a host"));
  }
  return absl::OkStatus();
}

absl::StatusOr<DeviceChoice> ChooseDevice(const std::string& flag, int local_rank) {
  SHOAL_RETURN_IF_ERROR(CheckDeviceFlag(flag));
  const std::vector<std::string> list = absl::StrSplit(flag, ',');
  const int at = local_rank % static_cast<int>(list.size());
  const std::string& name = list[at];
  DeviceChoice choice;
  if (name == "cpu") return choice;
  const absl::StatusOr<int> gpus = CountGpus();
  if (!gpus.ok()) {
    if (name == "auto") {
      if (HasCuda())
        choice.note = absl::StrCat("no GPU: ", gpus.status().message(), "; running on the CPU");
      return choice;
    }
    return WithExitCode(
        absl::UnavailableError(absl::StrCat("--device ", name, ": ", gpus.status().message())),
        kExitUnavailable);
  }
  int index = 0;
  if (name.size() > 5) {
    // Checked above.
    (void)absl::SimpleAtoi(name.substr(5), &index);
  } else {
    // The how-manieth rank of this host that asks for any GPU.
    for (int r = 0; r < local_rank; ++r) {
      const std::string& other = list[r % list.size()];
      index += other == "cuda" || other == "auto" ? 1 : 0;
    }
    index %= *gpus;
  }
  if (index >= *gpus) {
    return WithExitCode(
        absl::UnavailableError(absl::StrCat("--device ", name, ": this process sees ", *gpus,
                                            *gpus == 1 ? " GPU" : " GPUs", ", counted from 0")),
        kExitUnavailable);
  }
  choice.make = [index] { return MakeGpu(index); };
  choice.gpu = index;
  return choice;
}

std::string KeepOnGpu(int gpu_layers, int layers, ShardRequest& shard) {
  if (gpu_layers == 0) return "cpu";
  if (gpu_layers >= layers) return "cuda";
  shard.pp = 2;
  shard.stage_layers = {layers - gpu_layers, gpu_layers};
  return "cpu,cuda";
}

bool WantsGpu(const std::string& flag, int local_rank, bool auto_finds_one) {
  const std::vector<std::string> list = absl::StrSplit(flag, ',');
  const std::string& name = list[local_rank % list.size()];
  return name == "auto" ? auto_finds_one : name != "cpu";
}

absl::StatusOr<DeviceSpeed> ParseGpuSpeed(const std::string& text) {
  const std::vector<std::string> parts = absl::StrSplit(text, ',');
  double values[3] = {};
  bool good = parts.size() == 3;
  for (size_t i = 0; good && i < 3; ++i) {
    good = absl::SimpleAtod(parts[i], &values[i]) && values[i] > 0 && values[i] < 1e9;
  }
  if (!good) {
    return UsageError(absl::StrCat("--gpu-speed ", text,
                                   ": give three numbers such as 1008,165,25: GB/s of the GPU's "
                                   "memory, its TFLOP/s in f16, GB/s from host memory to it"));
  }
  return DeviceSpeed{values[0] * 1e9, values[1] * 1e12, values[2] * 1e9};
}

absl::StatusOr<std::string> GpuName([[maybe_unused]] int gpu) {
#ifdef SHOAL_CUDA
  SHOAL_ASSIGN_OR_RETURN(const std::vector<cuda::GpuInfo> gpus, cuda::ListGpus());
  if (gpu >= 0 && gpu < static_cast<int>(gpus.size())) return gpus[gpu].name;
#endif
  return absl::UnavailableError("there is no such GPU");
}

absl::StatusOr<DeviceSpeed> MeasureGpu([[maybe_unused]] int gpu) {
#ifdef SHOAL_CUDA
  SHOAL_ASSIGN_OR_RETURN(const cuda::ChipLimits limits, cuda::MeasureChip(gpu));
  return DeviceSpeed{limits.read_gbps * 1e9, limits.matrix_tflops() * 1e12,
                     limits.pinned_gbps * 1e9};
#else
  return absl::UnavailableError("this shoal was built without CUDA");
#endif
}

absl::StatusOr<int64_t> FreeGpuShare(const std::string& flag, int local_rank, int local_size) {
  SHOAL_ASSIGN_OR_RETURN(const DeviceChoice mine, ChooseDevice(flag, local_rank));
  if (mine.gpu < 0) return int64_t{0};
  int sharing = 0;
  for (int r = 0; r < local_size; ++r) {
    SHOAL_ASSIGN_OR_RETURN(const DeviceChoice choice, ChooseDevice(flag, r));
    sharing += choice.gpu == mine.gpu ? 1 : 0;
  }
  SHOAL_ASSIGN_OR_RETURN(const int64_t free, FreeGpuBytes(mine.gpu));
  return free / sharing;
}

}  // namespace shoal
