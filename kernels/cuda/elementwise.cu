#include "kernels/cuda/elementwise.cuh"

#include "kernels/cuda/row_ops.h"

namespace shoal::cuda {
namespace {

constexpr int kMaxColumnBlocks = 65535;  // of a grid in y

unsigned ColumnBlocks(int64_t cols) {
  const int64_t blocks = (cols + kElementThreads - 1) / kElementThreads;
  return static_cast<unsigned>(blocks < kMaxColumnBlocks ? blocks : kMaxColumnBlocks);
}

}  // namespace

void RmsNorm(const float* x, int64_t stride, const float* weight, float eps, int rows, int cols,
             float* out, int64_t out_stride, Stream stream) {
  if (rows == 0) return;
  Launch(RmsNormRow, dim3(rows), dim3(kElementThreads), 0, stream, x, stride, weight, eps, cols,
         out, out_stride);
}

void Add(float* x, int64_t x_stride, const float* y, int64_t y_stride, int rows, int cols,
         Stream stream) {
  if (rows == 0) return;
  Launch(AddRow, dim3(rows, ColumnBlocks(cols)), dim3(kElementThreads), 0, stream, x, x_stride, y,
         y_stride, cols);
}

void Embed(const PackedMatrix& table, const int32_t* ids, int n, float* out, Stream stream) {
  if (n == 0) return;
  PackedView view = {};
  view.data = table.data;
  view.cols = table.shape.cols;
  view.panel_bytes = table.shape.panel_bytes();
  view.type = table.shape.type;
  view.lead = table.shape.lead;
  if (Info(view.type).block_elems > 1) {
    view.planes = Planes(view.type);
    view.header_bytes = kPanelRows * view.planes.header_bytes();
    view.sub_bytes = kPanelRows * view.planes.sub_bytes();
  }
  Launch(EmbedRow, dim3(n, ColumnBlocks(view.cols)), dim3(kElementThreads), 0, stream, view, ids,
         out);
}

void Route(const RouterArgs& args, int rows, int32_t* ids, float* weights, Stream stream) {
  if (rows == 0) return;
  const RouteParams params{args.logits,      args.experts,    args.used, args.softmax_all,
                           args.renormalize, args.scale,      ids,       weights,
                           args.sigmoid,     args.choice_bias};
  Launch(RouteRow, dim3((rows + kElementWarps - 1) / kElementWarps), dim3(kElementThreads), 0,
         stream, params, rows);
}

}  // namespace shoal::cuda
