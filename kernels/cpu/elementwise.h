// The cheap operations of a step, each over the rows of a batch.
#pragma once

#include <cstdint>

#include "absl/types/span.h"
#include "kernels/backend.h"
#include "kernels/cpu/thread_pool.h"

namespace shoal {

// As the Backend methods of the same names. A row is computed by one thread, in one order.
void EmbedRows(ThreadPool* pool, const PackedMatrix& table, absl::Span<const int32_t> ids,
               float* out);
void RmsNormRows(ThreadPool* pool, const float* x, int64_t stride, const float* weight, float eps,
                 int rows, int cols, float* out, int64_t out_stride);
void AddRows(ThreadPool* pool, float* x, int64_t x_stride, const float* y, int64_t y_stride,
             int rows, int cols);
void RouteRows(ThreadPool* pool, const RouterArgs& args, int rows, int32_t* ids, float* weights);

}  // namespace shoal
