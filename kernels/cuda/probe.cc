#include "kernels/cuda/probe.h"

#include <algorithm>
#include <chrono>

#include "absl/strings/str_cat.h"
#include "kernels/status_macros.h"

namespace shoal::cuda {
namespace {

constexpr int64_t kCopyBytes = int64_t{64} << 20;
constexpr int kCopies = 5;

std::string VersionText(int version) {
  return absl::StrCat(version / 1000, ".", version % 1000 / 10);
}

// Bytes per second of the best of a few copies on the current device.
absl::StatusOr<double> CopySpeed(void* to, const void* from, cudaMemcpyKind kind) {
  double best = 0;
  for (int i = 0; i <= kCopies; ++i) {  // the first one warms up
    const auto start = std::chrono::steady_clock::now();
    SHOAL_RETURN_IF_ERROR(ToStatus(cudaMemcpy(to, from, kCopyBytes, kind), "copying"));
    SHOAL_RETURN_IF_ERROR(ToStatus(cudaDeviceSynchronize(), "copying"));
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    if (i > 0) best = std::max(best, static_cast<double>(kCopyBytes) / elapsed.count());
  }
  return best;
}

absl::Status MeasureLink(GpuProbe& gpu) {
  SHOAL_ASSIGN_OR_RETURN(const DeviceMemory host, AllocatePinned(kCopyBytes));
  SHOAL_ASSIGN_OR_RETURN(const DeviceMemory device, AllocateDevice(kCopyBytes));
  SHOAL_ASSIGN_OR_RETURN(gpu.from_host_bytes_per_s,
                         CopySpeed(device.data(), host.data(), cudaMemcpyHostToDevice));
  SHOAL_ASSIGN_OR_RETURN(gpu.to_host_bytes_per_s,
                         CopySpeed(host.data(), device.data(), cudaMemcpyDeviceToHost));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<int64_t> FreeBytesOf(int device) {
  size_t free = 0, total = 0;
  SHOAL_RETURN_IF_ERROR(ToStatus(cudaSetDevice(device), "choosing a GPU"));
  SHOAL_RETURN_IF_ERROR(ToStatus(cudaMemGetInfo(&free, &total), "asking for free memory"));
  return static_cast<int64_t>(free);
}

absl::StatusOr<GpuProbes> ProbeGpus() {
  SHOAL_ASSIGN_OR_RETURN(const std::vector<GpuInfo> gpus, ListGpus());
  GpuProbes probes;
  int driver = 0, runtime = 0;
  SHOAL_RETURN_IF_ERROR(ToStatus(cudaDriverGetVersion(&driver), "asking for the driver's version"));
  SHOAL_RETURN_IF_ERROR(
      ToStatus(cudaRuntimeGetVersion(&runtime), "asking for the runtime's version"));
  probes.driver = VersionText(driver);
  probes.runtime = VersionText(runtime);
  for (const GpuInfo& info : gpus) {
    GpuProbe& gpu = probes.gpus.emplace_back();
    gpu.info = info;
    SHOAL_ASSIGN_OR_RETURN(gpu.free_bytes, FreeBytesOf(info.index));
    for (const GpuInfo& other : gpus) {
      int can = 0;
      if (other.index != info.index &&
          cudaDeviceCanAccessPeer(&can, info.index, other.index) == cudaSuccess && can != 0) {
        gpu.peers.push_back(other.index);
      }
    }
    const absl::Status measured = MeasureLink(gpu);
    // A GPU that is full is a finding, not an error.
    if (!measured.ok() && !absl::IsResourceExhausted(measured)) return measured;
    cudaGetLastError();
  }
  return probes;
}

}  // namespace shoal::cuda
