// CUDA graphs of decode steps: the launches of a step are recorded once for each shape and launched
// again as one piece. No device code.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/planner.h"

namespace shoal::cuda {

// Used by the rank's thread; the queue outlives it.
//
// A shape is enqueued as it is the first time, which loads its kernels, recorded the second time
// and replayed from then on. A stream that cannot be captured, or SHOAL_CUDA_GRAPHS=0, leaves every
// step as it is.
//
// Steps with sums between ranks: NCCL wants a sum recorded by all ranks or by none, and replayed by
// all. What is done here follows from the shapes so far, which are the same on all of them, and
// from what they agree on after each recording.
class StepGraphs {
 public:
  using Agree = std::function<absl::StatusOr<bool>(bool recorded)>;  // DecodeStep::agree

  explicit StepGraphs(CudaQueue& queue);
  ~StepGraphs();
  StepGraphs(const StepGraphs&) = delete;
  StepGraphs& operator=(const StepGraphs&) = delete;

  // Does what `enqueue` enqueues on the queue's stream. It may be called twice (when a recording
  // failed) or not at all. REQUIRES: its launches and their arguments follow from the shape alone.
  absl::Status Run(const StepShape& shape, absl::FunctionRef<absl::Status()> enqueue,
                   const Agree& agree = nullptr);

  bool on() const { return why_off_.empty(); }
  const std::string& why_off() const { return why_off_; }
  int64_t recorded() const { return recorded_; }
  int64_t replayed() const { return replayed_; }

  // Shapes that are remembered; the one that was used longest ago makes room.
  static constexpr int kMost = 16;

 private:
  struct Known {
    StepShape shape;
    cudaGraphExec_t graph = nullptr;
    int64_t used = 0;
  };
  Known& Find(const StepShape& shape);
  static void Drop(Known& known);
  void Forget();
  // Not ok when the stream cannot be captured; *said is what enqueue answered.
  absl::Status Record(absl::FunctionRef<absl::Status()> enqueue, absl::Status* said,
                      cudaGraphExec_t* graph);

  CudaQueue& queue_;
  std::vector<Known> known_;
  std::string why_off_;
  bool recording_ = false;
  int64_t clock_ = 0, recorded_ = 0, replayed_ = 0;
};

}  // namespace shoal::cuda
