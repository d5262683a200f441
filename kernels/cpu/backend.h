// The CPU implementation of Backend: a thread team, the linear engine, attention, and the small
// operations.
#pragma once

#include <memory>
#include <string>

#include "kernels/backend.h"
#include "kernels/cpu/attention.h"
#include "kernels/cpu/features.h"
#include "kernels/cpu/kv_store.h"
#include "kernels/cpu/linear.h"
#include "kernels/cpu/thread_pool.h"

namespace shoal {

class CpuBackend : public Backend {
 public:
  // `level` must be one that this machine has.
  CpuBackend(CpuLevel level, std::unique_ptr<ThreadPool> pool);

  std::string Describe() const override;
  absl::Status Reserve(const Limits& limits) override;
  int64_t WorkspaceBytes(const Limits& limits) const override;
  void Embed(const PackedMatrix& table, absl::Span<const int32_t> ids, float scale,
             float* out) override;
  void Norm(const LinearInput& input, int rows, int cols, float* out, int64_t out_stride) override;
  void SumSquares(const float* x, int64_t stride, const ColumnRun (&runs)[2], int rows,
                  float* sums) override;
  void Linear(const LinearInput& input, int cols, RowCount rows,
              absl::Span<const LinearOutput> outputs) override;
  void Ffn(const LinearInput& input, int cols, RowCount rows, const FfnWeights& ffn, float* gate,
           float* up, const LinearOutput& out) override;
  void QkvToCache(const QkvArgs& args, const AttentionShape& shape, const KvLayer& kv,
                  absl::Span<const Segment> segments) override;
  void Attention(const float* q, int64_t q_stride, const AttentionShape& shape, const KvLayer& kv,
                 absl::Span<const Segment> segments, float* out, int64_t out_stride) override;
  void Route(const RouterArgs& args, int rows, int32_t* ids, float* weights) override;
  void Experts(const LinearInput& input, int cols, RowCount rows, const int32_t* ids,
               const float* weights, int used, const ExpertWeights& experts, float* out,
               int64_t out_stride) override;
  void Add(float* x, int64_t x_stride, const float* y, int64_t y_stride, int rows,
           int cols) override;

 private:
  const CpuLevel level_;
  const std::unique_ptr<ThreadPool> pool_;
  LinearEngine linear_;
  AttentionEngine attention_;
  KvStore kv_store_;
  Limits limits_;
};

}  // namespace shoal
