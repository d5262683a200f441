// cuBLAS, loaded when it is installed: the binary does not depend on it.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/cuda/linear.h"
#include "kernels/device_memory.h"

struct CUstream_st;

namespace shoal::cuda {

// One handle of the calling thread's GPU; one thread at a time. Products go to `stream`, which
// outlives it.
class Cublas final : public HalfGemm {
 public:
  // kUnavailable with the reason when the library cannot be loaded or used.
  static absl::StatusOr<std::unique_ptr<Cublas>> Load(CUstream_st* stream);
  ~Cublas() override;
  Cublas(const Cublas&) = delete;
  Cublas& operator=(const Cublas&) = delete;

  void Multiply(int m, int n, int k, const uint16_t* a, const uint16_t* b, const float* alpha,
                bool accumulate, float* c, int64_t stride) override;
  // The first product that failed.
  absl::Status status() const { return status_; }

 private:
  struct Functions;
  Cublas(std::unique_ptr<Functions> f, void* handle);
  std::unique_ptr<Functions> f_;
  void* handle_;
  DeviceMemory constants_;  // 0 and 1
  absl::Status status_;
};

}  // namespace shoal::cuda
