// Linear layers and experts on one GPU: which operand and which kernel each product takes, and the
// workspace between them. As cpu/linear.h, enqueued on a stream.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "kernels/backend.h"
#include "kernels/cuda/linear_ops.h"
#include "kernels/cuda/workspace.h"

namespace shoal::cuda {

// A library's product of f16 matrices.
class HalfGemm {
 public:
  virtual ~HalfGemm() = default;
  // c[j, i] (+)= *alpha * sum over l of a[i, l] * b[j, l], f32 sums. a [m, k] and b [n, k] are
  // contiguous f16, c [n, stride] f32, alpha one f32; all of them device memory. Enqueues; an error
  // shows when the stream is checked.
  virtual void Multiply(int m, int n, int k, const uint16_t* a, const uint16_t* b,
                        const float* alpha, bool accumulate, float* c, int64_t stride) = 0;
};

// Not thread-safe; one stream at a time.
class LinearEngine {
 public:
  // bf16_mma: the chip multiplies bf16 tiles (sm_80 and up). Without them BF16 weights take f32
  // rows.
  // gemm: multiplies long prompts (of kGemmRows and more) with quantized weights, which are
  // unpacked for it; it must outlive the engine. Null: own tiles do.
  // unpacked_bytes: weights that are unpacked at once, what a large L2 cache holds.
  explicit LinearEngine(bool bf16_mma, HalfGemm* gemm = nullptr,
                        int64_t unpacked_bytes = kUnpackedBytes)
      : bf16_mma_(bf16_mma), gemm_(gemm), unpacked_bytes_(unpacked_bytes) {}

  // Decode rows that meet weights read once: 8, 16 or 32; SHOAL_CUDA_PASS_ROWS or else 16. The
  // results are the same. 32 read the least, but take so many registers that an SM holds one block:
  // to be measured.
  void SetPassRows(int rows) { pass_rows_ = rows; }

  int64_t WorkspaceBytes(const Backend::Limits& limits) const;
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
  static int DefaultPassRows();
  enum class Operand { kInt8, kFloat, kF16, kBf16 };
  struct ExpertBatch;

  LinearWorkspace LayoutOf(const Backend::Limits& limits) const;
  Operand OperandOf(DType type, bool prefill) const;
  // The rows as `operand`, in the workspace; then the product of all of `outputs` that take it.
  void Prepare(const LinearInput& input, int cols, int rows, Operand operand, Stream stream);
  void Multiply(const Product& product, Operand operand, int rows, Stream stream);
  void Rows(const LinearInput& input, int cols, int rows, bool prefill, int first_row,
            absl::Span<const LinearOutput> outputs, Stream stream);
  void ExpertRows(const ExpertBatch& batch, Stream stream);
  // Whether a library's product takes this output; the product, with the rows as HalveAll made
  // them.
  bool TakesGemm(const LinearOutput& output, Operand operand, int rows) const;
  void Multiply(const LinearOutput& output, int rows, int first_row, Stream stream);
  // The rows for such products, in the workspace.
  PlainHalves GemmRows(int rows, int64_t cols, float** extremes) const;

  bool bf16_mma_;
  HalfGemm* gemm_;
  int64_t unpacked_bytes_;
  int pass_rows_ = DefaultPassRows();
  Backend::Limits limits_;
  uint8_t* workspace_ = nullptr;
  std::vector<const uint8_t*> pointers_;  // of one call's experts
};

}  // namespace shoal::cuda
