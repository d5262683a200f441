// CopyEngine on a stream of its own.
#pragma once

#include <vector>

#include "kernels/copy_engine.h"
#include "kernels/cuda/device.h"

namespace shoal::cuda {

class CudaCopies final : public CopyEngine {
 public:
  // ops: the stream that ops run on, of the current device.
  static absl::StatusOr<CudaCopies> Create(cudaStream_t ops);
  CudaCopies(CudaCopies&&) = default;
  CudaCopies& operator=(CudaCopies&&) = delete;
  ~CudaCopies() override;

  absl::StatusOr<int> NewFence() override;
  absl::Status Copy(uint8_t* to, const uint8_t* from, int64_t bytes) override;
  absl::Status CopyBack(uint8_t* to, const uint8_t* from, int64_t bytes) override;
  bool Pin(const uint8_t* from, int64_t bytes) override;
  absl::Status MarkCopies(int fence) override;
  absl::Status MarkOps(int fence) override;
  absl::Status OpsWaitFor(int fence) override;
  absl::Status CopiesWaitFor(int fence) override;
  absl::Status Await(int fence) override;
  absl::Status EnterThread() override;

 private:
  CudaCopies(int device, cudaStream_t ops, OwnedStream stream)
      : device_(device), ops_(ops), stream_(std::move(stream)) {}

  int device_;
  cudaStream_t ops_;
  OwnedStream stream_;
  std::vector<OwnedEvent> fences_;
  std::vector<void*> pinned_;
};

}  // namespace shoal::cuda
