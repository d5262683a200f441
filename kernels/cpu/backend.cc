#include "kernels/cpu/backend.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "kernels/cpu/elementwise.h"
#include "kernels/cpu/segments.h"

namespace shoal {

CpuBackend::CpuBackend(CpuLevel level, std::unique_ptr<ThreadPool> pool)
    : level_(level),
      pool_(std::move(pool)),
      linear_(level, pool_.get()),
      attention_(level, pool_.get()),
      kv_store_(attention_.kernels().to_half, pool_.get()) {}

std::string CpuBackend::Describe() const {
  // AMX serves prefill; decode runs on AVX-512.
  const char* name = level_ == CpuLevel::kAmx ? "avx512+amx" : CpuLevelName(level_);
  const int threads = pool_->threads();
  return absl::StrCat(name, ", ", threads, threads == 1 ? " thread" : " threads");
}

absl::Status CpuBackend::Reserve(const Limits& limits) {
  SHOAL_CHECK(limits.rows > 0 && limits.cols > 0 && limits.out_rows > 0 && limits.heads > 0 &&
                  limits.head_dim > 0 && limits.context > 0,
              "Limits must be positive");
  SHOAL_CHECK(limits_.rows == 0, "Reserve is called once");
  if (absl::Status s = linear_.Reserve(limits); !s.ok()) return s;
  if (absl::Status s = attention_.Reserve(limits); !s.ok()) return s;
  limits_ = limits;
  return absl::OkStatus();
}

int64_t CpuBackend::WorkspaceBytes(const Limits& limits) const {
  return linear_.WorkspaceBytes(limits) + attention_.WorkspaceBytes(limits);
}

void CpuBackend::Embed(const PackedMatrix& table, absl::Span<const int32_t> ids, float scale,
                       float* out) {
  EmbedRows(pool_.get(), table, ids, scale, out);
}

void CpuBackend::Norm(const LinearInput& input, int rows, int cols, float* out,
                      int64_t out_stride) {
  NormRows(pool_.get(), input, rows, cols, out, out_stride);
}

void CpuBackend::SumSquares(const float* x, int64_t stride, const ColumnRun (&runs)[2], int rows,
                            float* sums) {
  SumRowSquares(pool_.get(), x, stride, runs, rows, sums);
}

void CpuBackend::Linear(const LinearInput& input, int cols, RowCount rows,
                        absl::Span<const LinearOutput> outputs) {
  SHOAL_CHECK(rows.decode >= 0 && rows.prefill >= 0 && rows.total() <= limits_.rows,
              "more rows than Limits");
  SHOAL_CHECK(cols > 0 && cols <= limits_.cols, "more columns than Limits");
  for (const LinearOutput& o : outputs) {
    SHOAL_CHECK(o.weight->shape.cols == cols, "weight and input differ in columns");
    SHOAL_CHECK(o.weight->shape.rows <= limits_.out_rows, "more output rows than Limits");
  }
  linear_.Linear(input, cols, rows, outputs);
}

void CpuBackend::Ffn(const LinearInput& input, int cols, RowCount rows, const FfnWeights& ffn,
                     float* gate, float* up, const LinearOutput& out) {
  SHOAL_CHECK(rows.decode >= 0 && rows.prefill >= 0 && rows.total() <= limits_.rows,
              "more rows than Limits");
  SHOAL_CHECK(cols > 0 && cols <= limits_.cols && out.weight->shape.cols <= limits_.cols,
              "more columns than Limits");
  SHOAL_CHECK(ffn.gate->shape.cols == cols && ffn.up->shape.cols == cols,
              "weight and input differ in columns");
  SHOAL_CHECK(
      ffn.gate->shape.rows == ffn.up->shape.rows && ffn.gate->shape.rows == out.weight->shape.cols,
      "gate, up and down differ in width");
  linear_.Ffn(input, cols, rows, ffn, gate, up, out);
}

void CpuBackend::QkvToCache(const QkvArgs& args, const AttentionShape& shape, const KvLayer& kv,
                            absl::Span<const Segment> segments) {
  CheckSegments(limits_, shape, kv, segments);
  kv_store_.Write(args, shape, kv, segments);
}

void CpuBackend::Attention(const float* q, int64_t q_stride, const AttentionShape& shape,
                           const KvLayer& kv, absl::Span<const Segment> segments, float* out,
                           int64_t out_stride) {
  attention_.Run(q, q_stride, shape, kv, segments, out, out_stride);
}

void CpuBackend::Route(const RouterArgs& args, int rows, int32_t* ids, float* weights) {
  SHOAL_CHECK(rows <= limits_.rows && args.used <= limits_.experts_used,
              "more rows or experts than Limits");
  RouteRows(pool_.get(), args, rows, ids, weights);
}

void CpuBackend::Experts(const LinearInput& input, int cols, RowCount rows, const int32_t* ids,
                         const float* weights, int used, const ExpertWeights& experts, float* out,
                         int64_t out_stride) {
  SHOAL_CHECK(rows.decode >= 0 && rows.prefill >= 0 && rows.total() <= limits_.rows,
              "more rows than Limits");
  SHOAL_CHECK(cols > 0 && cols <= limits_.cols, "more columns than Limits");
  SHOAL_CHECK(used >= 1 && used <= limits_.experts_used, "more experts than Limits");
  SHOAL_CHECK(!experts.gate.empty() && experts.gate.size() == experts.up.size() &&
                  experts.gate.size() == experts.down.size(),
              "an expert lacks gate, up or down");
  SHOAL_CHECK(experts.gate[0].shape.rows <= limits_.expert_cols, "experts wider than Limits");
  linear_.Experts(input, cols, rows, ids, weights, used, experts, out, out_stride);
}

void CpuBackend::Add(float* x, int64_t x_stride, const float* y, int64_t y_stride, int rows,
                     int cols) {
  AddRows(pool_.get(), x, x_stride, y, y_stride, rows, cols);
}

absl::StatusOr<std::unique_ptr<Backend>> MakeCpuBackend(const CpuOptions& options) {
  absl::StatusOr<CpuLevel> level = ChooseCpuLevel(options.level);
  if (!level.ok()) return level.status();
  absl::StatusOr<std::unique_ptr<ThreadPool>> pool = ThreadPool::Create(
      {.threads = options.threads, .pin = options.pin, .first_core = options.first_core});
  if (!pool.ok()) return pool.status();
  return std::make_unique<CpuBackend>(*level, *std::move(pool));
}

}  // namespace shoal
