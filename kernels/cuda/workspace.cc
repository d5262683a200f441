#include "kernels/cuda/workspace.h"

#include <algorithm>

#include "kernels/cuda/linear_ops.h"
#include "kernels/cuda/planner.h"

namespace shoal::cuda {
namespace {

constexpr int64_t kPartialItems = 2048;
constexpr int kGroupRowsMin = 8;  // smallest *GroupRows of linear_ops.h

int64_t RoundUp(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Bytes of `rows` operand rows in the largest of the four forms, f32, with the scales of the
// others.
int64_t OperandBytes(int64_t rows, int64_t cols) {
  return AlignWorkspace(rows * RoundUp(cols, 32) * 4) + AlignWorkspace(rows * 4);
}

}  // namespace

LinearWorkspace::LinearWorkspace(const Backend::Limits& l, int64_t unpacked_bytes) {
  const int64_t expert_rows = std::min(l.rows, kExpertRows);
  slots = expert_rows * l.experts_used;
  groups = slots / kGroupRowsMin + slots;
  expert_stride = RoundUp(l.expert_cols, 4);
  out_stride = slots > 0 ? RoundUp(l.cols, 4) : 0;
  int64_t at = 0;
  const auto take = [&at](int64_t size) {
    const int64_t here = at;
    at += AlignWorkspace(size);
    return here;
  };
  operand = take(std::max(OperandBytes(l.rows, l.cols), OperandBytes(slots, l.expert_cols)));
  grouping = take(groups * sizeof(RowGroup));
  group_count = take(sizeof(int32_t));
  sorted = take(slots * sizeof(int32_t));
  pointers = take(slots > 0 ? 6 * kExpertsMax * sizeof(void*) : 0);
  gate = take(slots * expert_stride * 4);
  up = take(slots * expert_stride * 4);
  down = take(slots * out_stride * 4);
  unpacked = take(l.rows >= kGemmRows ? unpacked_bytes : 0);
  bytes = at;
}

int64_t PartialItems(const Backend::Limits& l) {
  const int64_t of_one_row = l.context / kSplitTokens + 1;
  return std::max(of_one_row, std::min(of_one_row * l.rows, kPartialItems));
}

int64_t AttentionWorkspaceBytes(int q_heads, int head_dim, int items) {
  return static_cast<int64_t>(items) * q_heads * (PartialStride(head_dim) + 2) * sizeof(float);
}

int LogitsKept(int candidates) {
  if (candidates == 0) return 0;
  int keep = 2;
  while (keep < candidates) keep *= 2;
  return keep;
}

int64_t LogitWorkspaceBytes(int rows, int vocab, int candidates) {
  const int64_t chunks = static_cast<int64_t>(rows) * LogitChunks(vocab);
  return chunks *
         static_cast<int64_t>(LogitsKept(candidates) * sizeof(uint64_t) + sizeof(LogitChunkSum));
}

int64_t ReducedLogitBytes(int rows, int candidates) {
  return rows * (static_cast<int64_t>(sizeof(LogitSummary)) +
                 candidates * static_cast<int64_t>(sizeof(LogitCandidate)));
}

int64_t MostReducedLogitBytes(const Backend::Limits& l) {
  if (l.logit_rows == 0) return 0;
  const int candidates = std::min(l.vocab, kMaxLogitCandidates);
  return RoundUp(ReducedLogitBytes(l.logit_rows, candidates), 16) +
         LogitWorkspaceBytes(l.logit_rows, l.vocab, candidates);
}

int64_t WorkspaceBytes(const Backend::Limits& l, bool gemm) {
  return LinearWorkspace(l, gemm ? kUnpackedBytes : 0).bytes +
         AttentionWorkspaceBytes(l.heads, l.head_dim, static_cast<int>(PartialItems(l))) +
         Planner(l).MaxBytes() + l.rows * static_cast<int64_t>(sizeof(int32_t)) +
         MostReducedLogitBytes(l) + l.logit_rows * static_cast<int64_t>(sizeof(LogitRequest));
}

}  // namespace shoal::cuda
