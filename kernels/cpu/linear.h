// Products of packed weights with rows of activations, on the threads of one CPU rank.
//
// A call has two phases with a barrier between: the threads turn the input rows into operands
// (`Activations`: norm or SwiGLU fused with the conversion to int8, bf16 or plain f32), then they
// take runs of panels from a shared counter and multiply. Where gate, up and down of a prompt all
// take tiles, the product of gate and up makes the operand of down. Each output element is computed
// by one thread in one fixed order, so results do not depend on the number of threads, and a decode
// row's result not on the rows beside it.
//
// Needs from thread_pool.h: `int threads() const`, `void Run(fn)` that calls fn(int thread) once on
// each of the threads() threads (the caller is thread 0) and returns when all are done, and `void
// Barrier()` that fn may call: it returns when all threads have called it.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/backend.h"
#include "kernels/cpu/features.h"
#include "kernels/cpu/thread_pool.h"

namespace shoal {

// Not thread-safe: one call at a time, like the Backend that owns it.
class LinearEngine {
 public:
  // `level` must be one that this machine has (features.h). The pool outlives the engine.
  LinearEngine(CpuLevel level, ThreadPool* pool);
  ~LinearEngine();
  LinearEngine(const LinearEngine&) = delete;
  LinearEngine& operator=(const LinearEngine&) = delete;

  // Sizes the workspace; call once before the products. kResourceExhausted when the system refuses.
  absl::Status Reserve(const Backend::Limits& limits);
  // Bytes that Reserve() takes for these limits.
  int64_t WorkspaceBytes(const Backend::Limits& limits) const;

  // As Backend::Linear, Backend::Ffn and Backend::Experts.
  void Linear(const LinearInput& input, int cols, RowCount rows,
              absl::Span<const LinearOutput> outputs);
  void Ffn(const LinearInput& input, int cols, RowCount rows, const FfnWeights& ffn, float* gate,
           float* up, const LinearOutput& out);
  void Experts(const LinearInput& input, int cols, RowCount rows, const int32_t* ids,
               const float* weights, int used, const ExpertWeights& experts, float* out,
               int64_t out_stride);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace shoal
