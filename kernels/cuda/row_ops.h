// Operations on rows, and the reduction of logits. See ops.h.
#pragma once

#include <cstdint>

#include "kernels/backend.h"
#include "kernels/cuda/batch_plan.h"
#include "kernels/cuda/workspace.h"
#include "kernels/packed_matrix.h"

struct CUstream_st;

namespace shoal::cuda {

using Stream = CUstream_st*;

// ---- Rows (elementwise.cu). As the Backend methods of the same names; ids and RouterArgs::logits
// are device memory too.

void Norm(const LinearInput& input, int rows, int cols, float* out, int64_t out_stride,
          Stream stream);
void SumSquares(const float* x, int64_t stride, const ColumnRun (&runs)[2], int rows, float* sums,
                Stream stream);
// x += y over [rows, cols]
void Add(float* x, int64_t x_stride, const float* y, int64_t y_stride, int rows, int cols,
         Stream stream);
// out[i] = row ids[i] of table times scale, zeros where ids[i] < 0. ids must be rows of the table.
void Embed(const PackedMatrix& table, const int32_t* ids, int n, float scale, float* out,
           Stream stream);
// places [rows] or null: a row without a position, which only fills a step up, is given no experts
// (ids -1), so that none is read for its sake.
void Route(const RouterArgs& args, int rows, const RowPlace* places, int32_t* ids, float* weights,
           Stream stream);

// ---- Logits (logits.cu)

struct LogitArgs {
  const float* logits = nullptr;  // [rows, stride]
  int64_t stride = 0;
  int rows = 0;
  int vocab = 0;                           // of the shard
  int first_token = 0;                     // token of column 0
  const LogitRequest* requests = nullptr;  // [rows]
  int candidates = 0;                      // for each row, at most kMaxLogitCandidates
  uint8_t* workspace = nullptr;            // LogitWorkspaceBytes, aligned to 16
};
// best [rows, candidates]: the best first, among equals the lower token; NaNs are left out.
void ReduceLogits(const LogitArgs& args, LogitSummary* summaries, LogitCandidate* best,
                  Stream stream);

}  // namespace shoal::cuda
