// PeerSums by CUDA: device memory of the peers through cudaIpc*, in the same process by pointers,
// or shared host memory that every rank has pinned.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels/cuda/device.h"
#include "kernels/cuda/one_shot.h"
#include "kernels/peer_sums.h"

namespace shoal::cuda {

// Host memory that several processes map, and the GPU with them.
class SharedPinned {
 public:
  // A new one, zero-filled; others open it while `fd` is open.
  static absl::StatusOr<SharedPinned> Create(int64_t bytes);
  static absl::StatusOr<SharedPinned> Open(int64_t process, int fd, uint64_t token, int64_t bytes);
  SharedPinned() = default;
  SharedPinned(SharedPinned&& other) noexcept;
  SharedPinned& operator=(SharedPinned&& other) noexcept;
  SharedPinned(const SharedPinned&) = delete;
  SharedPinned& operator=(const SharedPinned&) = delete;
  ~SharedPinned();

  int fd() const { return fd_; }
  uint64_t token() const { return token_; }          // of this memory among all
  uint8_t* on_device() const { return on_device_; }  // its bytes as kernels see them

 private:
  absl::Status Map(int64_t bytes);
  absl::Status Pin();

  int fd_ = -1;
  uint64_t token_ = 0;
  uint8_t* mapped_ = nullptr;
  int64_t mapped_bytes_ = 0;
  bool pinned_ = false;
  uint8_t* on_device_ = nullptr;
};

class CudaPeerSums final : public PeerSums {
 public:
  // On the current device, whose name is `pci`. `stream` is that of the ops, and lives longer.
  static absl::StatusOr<std::unique_ptr<CudaPeerSums>> Create(PeerMemory memory, int rank,
                                                              int ranks, const std::string& pci,
                                                              cudaStream_t stream);
  ~CudaPeerSums() override;

  PeerSumsAddress address() const override;
  absl::Status Connect(absl::Span<const PeerSumsAddress> ranks) override;
  void SetPatience(std::chrono::nanoseconds silence, std::chrono::nanoseconds stall) override;
  void Enqueue(float* data, int64_t count) override;
  std::optional<int> Missing() const override;
  void Vouch() override;
  void Abort() override;

 private:
  struct Address;
  CudaPeerSums(PeerMemory memory, std::string pci, cudaStream_t stream)
      : memory_(memory), pci_(std::move(pci)), stream_(stream) {}
  absl::StatusOr<uint8_t*> Reach(const Address& peer);
  absl::Status ConnectDevices(const std::vector<Address>& ranks);
  absl::Status ConnectHost(const Address& owner);

  const PeerMemory memory_;
  const std::string pci_;
  const cudaStream_t stream_;
  int device_ = 0;
  OneShotParams params_ = {};
  DeviceMemory control_, blocks_;
  // kDevice: a part for each rank, which that rank writes. Ranks of this process share the owner.
  std::shared_ptr<DeviceMemory> inbox_;
  std::vector<std::shared_ptr<DeviceMemory>> of_peers_;
  std::vector<void*> opened_;  // of other processes
  SharedPinned shared_;        // kHost: a part for each rank, which all read
};

}  // namespace shoal::cuda
