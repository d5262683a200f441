// Memory of a backend's device: host memory for CPUs, video memory for GPUs.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <utility>

#include "absl/status/statusor.h"

namespace shoal {

// Move-only, zero-filled when allocated, aligned to 64 bytes or more. Freed with the last owner;
// the backend that made it lives longer.
class DeviceMemory {
 public:
  using Free = std::function<void(uint8_t*)>;
  DeviceMemory() = default;
  DeviceMemory(uint8_t* data, int64_t bytes, Free free)
      : data_(data, std::move(free)), bytes_(bytes) {}

  uint8_t* data() const { return data_.get(); }
  int64_t size() const { return bytes_; }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_.get());
  }

 private:
  std::unique_ptr<uint8_t, Free> data_;
  int64_t bytes_ = 0;
};

// Host memory as a Buffer is. kResourceExhausted with the sizes when the system refuses.
absl::StatusOr<DeviceMemory> AllocateHost(int64_t bytes);

}  // namespace shoal
