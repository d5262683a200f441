// The cheap operations of a step, each over the rows of a batch.
#pragma once

#include <cstdint>

#include "absl/types/span.h"
#include "kernels/backend.h"
#include "kernels/cpu/thread_pool.h"

namespace shoal {

// As the Backend methods of the same names. A row is computed by one thread, in one order.
void EmbedRows(ThreadPool* pool, const PackedMatrix& table, absl::Span<const int32_t> ids,
               float scale, float* out);
void NormRows(ThreadPool* pool, const LinearInput& input, int rows, int cols, float* out,
              int64_t out_stride);
void SumRowSquares(ThreadPool* pool, const float* x, int64_t stride, const ColumnRun (&runs)[2],
                   int rows, float* sums);
void AddRows(ThreadPool* pool, float* x, int64_t x_stride, const float* y, int64_t y_stride,
             int rows, int cols);
void RouteRows(ThreadPool* pool, const RouterArgs& args, int rows, int32_t* ids, float* weights);

// What a LayerNorm takes of a row: its mean, and the sum of the squares of what differs from it.
struct Moments {
  float mean = 0;
  float squares = 0;
};
Moments MomentsOf(const float* x, int64_t n);
// out = (x - mean) * factor * weight
void Normalize(const float* x, const float* weight, float mean, float factor, int64_t n,
               float* out);

}  // namespace shoal
