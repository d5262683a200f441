// Linear layers and experts on one GPU: which operand and which kernel each product takes, and the
// workspace between them. As cpu/linear.h, enqueued on a stream.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "kernels/backend.h"
#include "kernels/cuda/linear_ops.h"

namespace shoal::cuda {

// Not thread-safe; one stream at a time.
class LinearEngine {
 public:
  // bf16_mma: the chip multiplies bf16 tiles (sm_80 and up). Without them BF16 weights take f32
  // rows.
  explicit LinearEngine(bool bf16_mma) : bf16_mma_(bf16_mma) {}

  static int64_t WorkspaceBytes(const Backend::Limits& limits);
  // workspace: WorkspaceBytes(limits) of device memory, aligned to 256, that outlives the engine.
  void SetWorkspace(const Backend::Limits& limits, uint8_t* workspace);

  // As Backend::Linear and Backend::Experts, over device memory, ids and weights too. Decode rows,
  // and the rows of short prompts, give bits that do not depend on the rows beside them.
  void Linear(const LinearInput& input, int cols, RowCount rows,
              absl::Span<const LinearOutput> outputs, Stream stream);
  void Experts(const LinearInput& input, int cols, RowCount rows, const int32_t* ids,
               const float* weights, int used, const ExpertWeights& experts, float* out,
               int64_t out_stride, Stream stream);

 private:
  enum class Operand { kInt8, kFloat, kF16, kBf16 };
  struct Layout;
  struct ExpertBatch;

  Operand OperandOf(DType type, bool prefill) const;
  // The rows as `operand`, in the workspace; then the product of all of `outputs` that take it.
  void Prepare(const LinearInput& input, int cols, int rows, Operand operand, Stream stream);
  void Multiply(const Product& product, Operand operand, int rows, Stream stream);
  void Rows(const LinearInput& input, int cols, int rows, bool prefill, int first_row,
            absl::Span<const LinearOutput> outputs, Stream stream);
  void ExpertRows(const ExpertBatch& batch, Stream stream);

  bool bf16_mma_;
  Backend::Limits limits_;
  uint8_t* workspace_ = nullptr;
  std::vector<const uint8_t*> pointers_;  // of one call's experts
};

}  // namespace shoal::cuda
