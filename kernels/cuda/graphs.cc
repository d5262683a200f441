#include "kernels/cuda/graphs.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>
#include <utility>

#include "kernels/status_macros.h"

namespace shoal::cuda {

StepGraphs::StepGraphs(CudaQueue& queue) : queue_(queue) {
  known_.reserve(kMost);
  const char* wanted = std::getenv("SHOAL_CUDA_GRAPHS");
  if (wanted != nullptr && std::string_view(wanted) == "0") why_off_ = "SHOAL_CUDA_GRAPHS=0";
  queue_.SetForget([this] { Forget(); });
}

StepGraphs::~StepGraphs() {
  queue_.SetForget(nullptr);
  Forget();
}

// One that is running goes when it is done; waiting for that could last forever, with a peer that
// is gone.
void StepGraphs::Drop(Known& known) {
  if (known.graph != nullptr) cudaGraphExecDestroy(known.graph);
  known.graph = nullptr;
}

void StepGraphs::Forget() {
  if (on()) why_off_ = "what was recorded had to go";
  for (Known& known : known_) Drop(known);
  if (!std::exchange(recording_, false)) return;
  cudaGraph_t recorded = nullptr;
  cudaStreamEndCapture(queue_.stream(), &recorded);
  if (recorded != nullptr) cudaGraphDestroy(recorded);
  cudaGetLastError();  // of a recording that nobody wants
}

StepGraphs::Known& StepGraphs::Find(const StepShape& shape) {
  for (Known& known : known_) {
    if (known.shape == shape) return known;
  }
  if (known_.size() < kMost) return known_.emplace_back(Known{shape});
  Known& oldest = *std::min_element(known_.begin(), known_.end(),
                                    [](const Known& a, const Known& b) { return a.used < b.used; });
  Drop(oldest);
  return oldest = Known{shape};
}

absl::Status StepGraphs::Run(const StepShape& shape, absl::FunctionRef<absl::Status()> enqueue,
                             const Agree& agree) {
  if (!on()) return enqueue();
  Known& known = Find(shape);
  const bool first = known.used == 0;
  known.used = ++clock_;
  if (first) return enqueue();
  if (known.graph == nullptr) {
    absl::Status said;
    const absl::Status made = Record(enqueue, &said, &known.graph);
    if (!said.ok() && (made.ok() || !on())) return said;
    bool by_all = made.ok();
    if (agree) {
      SHOAL_ASSIGN_OR_RETURN(by_all, agree(made.ok()));
    }
    if (!by_all) {
      why_off_ = made.ok() ? "another rank could not record a step" : std::string(made.message());
      Drop(known);
      return enqueue();
    }
    ++recorded_;
  }
  ++replayed_;
  return ToStatus(cudaGraphLaunch(known.graph, queue_.stream()), "launching a recorded step");
}

absl::Status StepGraphs::Record(absl::FunctionRef<absl::Status()> enqueue, absl::Status* said,
                                cudaGraphExec_t* graph) {
  // An error from before is not one of the recording.
  SHOAL_RETURN_IF_ERROR(ToStatus(cudaPeekAtLastError(), "before recording a step"));
  // Other threads of the process go on allocating.
  absl::Status s =
      ToStatus(cudaStreamBeginCapture(queue_.stream(), cudaStreamCaptureModeThreadLocal),
               "recording a step");
  if (!s.ok()) {
    cudaGetLastError();
    return s;
  }
  recording_ = true;
  queue_.SetRecording(true);
  *said = enqueue();
  queue_.SetRecording(false);
  if (!std::exchange(recording_, false)) return absl::UnavailableError(why_off_);  // Forget()
  cudaGraph_t recorded = nullptr;
  s = ToStatus(cudaStreamEndCapture(queue_.stream(), &recorded), "recording a step");
  // A refused launch leaves its error there too, and the recording may go on without it.
  s.Update(ToStatus(cudaGetLastError(), "recording a step"));
  if (s.ok() && said->ok()) {
    s = ToStatus(cudaGraphInstantiate(graph, recorded, 0), "making a graph of a step");
    if (!s.ok()) cudaGetLastError();
  }
  if (recorded != nullptr) cudaGraphDestroy(recorded);
  return s;
}

}  // namespace shoal::cuda
