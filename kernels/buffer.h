// Owned memory for weights, KV pages and workspaces: aligned, huge pages where the system gives
// them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "absl/status/statusor.h"

namespace shoal {

// Move-only. Zero-filled when created. 2 MiB aligned when it holds 2 MiB or more, else 64 B
// aligned.
class Buffer {
 public:
  Buffer() = default;
  // kResourceExhausted with the sizes when the system refuses.
  static absl::StatusOr<Buffer> Allocate(size_t bytes);
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer();

  uint8_t* data() { return data_; }
  const uint8_t* data() const { return data_; }
  size_t size() const { return size_; }
  template <typename T>
  T* as() {
    return reinterpret_cast<T*>(data_);
  }
  template <typename T>
  const T* as() const {
    return reinterpret_cast<const T*>(data_);
  }

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
  size_t mapped_ = 0;
};

}  // namespace shoal
