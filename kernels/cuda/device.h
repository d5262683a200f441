// GPUs, and the CUDA runtime with owners and absl::Status. No device code.
//
// The memory of one rank's device is allocated when the rank starts; the owners here are destroyed
// by the rank's thread before the device is left.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/device_memory.h"
#include "kernels/device_queue.h"

namespace shoal::cuda {

// kResourceExhausted when memory ran out, kUnavailable for whatever else went wrong; says what was
// tried and what the runtime answered.
absl::Status ToStatus(cudaError_t error, const char* tried);

struct GpuInfo {
  int index = 0;  // as CUDA counts: CUDA_VISIBLE_DEVICES hides and renumbers
  std::string name;
  int major = 0, minor = 0;  // compute capability
  int64_t total_bytes = 0;
  std::string pci;  // "0000:01:00", the same for every process of the host
};
// kUnavailable with the reason when there is none: no driver, one too old, all hidden.
absl::StatusOr<std::vector<GpuInfo>> ListGpus();

// Tells this process from others, also from those of other containers, whose numbers may be equal.
uint64_t ThisProcess();

// Zero-filled memory of the current device, aligned to 256 bytes.
absl::StatusOr<DeviceMemory> AllocateDevice(int64_t bytes);
// Pinned host memory: what the copy engines reach without a detour. Not zero-filled.
absl::StatusOr<DeviceMemory> AllocatePinned(int64_t bytes);

// A stream of the current device that waits for no other stream.
class OwnedStream {
 public:
  static absl::StatusOr<OwnedStream> Create();
  OwnedStream() = default;
  OwnedStream(OwnedStream&& other) noexcept;
  OwnedStream& operator=(OwnedStream&& other) noexcept;
  OwnedStream(const OwnedStream&) = delete;
  OwnedStream& operator=(const OwnedStream&) = delete;
  ~OwnedStream();
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

// What the ops of a rank are ordered on, and how the host waits for them.
class CudaQueue final : public DeviceQueue {
 public:
  CudaQueue(OwnedStream stream, std::string device)
      : stream_(std::move(stream)), device_(std::move(device)) {}
  void* handle() override { return stream_.get(); }
  std::string device() const override { return device_; }
  void AddWatch(std::function<absl::Status()> watch) override {
    watches_.push_back(std::move(watch));
  }
  void ForgetRecordings() override {
    if (forget_) forget_();
  }
  bool recording_lost() const override;
  // Of who records the stream: what ForgetRecordings() calls, and when a recording is under way.
  void SetForget(std::function<void()> forget) { forget_ = std::move(forget); }
  void SetRecording(bool recording) { recording_ = recording; }

  cudaStream_t stream() const { return stream_.get(); }
  // Until all that was enqueued is done, or a watch says what went wrong (also with what is done).
  absl::Status Wait() const;

 private:
  OwnedStream stream_;
  std::string device_;
  std::function<void()> forget_;
  bool recording_ = false;
  std::vector<std::function<absl::Status()>> watches_;
};

// A point in a stream's order.
class OwnedEvent {
 public:
  static absl::StatusOr<OwnedEvent> Create();
  // One that other processes may wait for.
  static absl::StatusOr<OwnedEvent> CreateShared();
  OwnedEvent() = default;
  OwnedEvent(OwnedEvent&& other) noexcept;
  OwnedEvent& operator=(OwnedEvent&& other) noexcept;
  OwnedEvent(const OwnedEvent&) = delete;
  OwnedEvent& operator=(const OwnedEvent&) = delete;
  ~OwnedEvent();
  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

// Small host data that kernels read: written to pinned memory, copied in stream order. The next
// write waits until the copy before it has read the pinned side.
class Upload {
 public:
  static absl::StatusOr<Upload> Create(int64_t bytes);
  // The pinned side, free to be written.
  absl::StatusOr<uint8_t*> Begin();
  // Enqueues the copy of its first `bytes`.
  absl::Status Commit(int64_t bytes, cudaStream_t stream);
  uint8_t* device() const { return device_.data(); }
  int64_t size() const { return device_.size(); }

 private:
  DeviceMemory host_, device_;
  OwnedEvent read_;
};

}  // namespace shoal::cuda
