#include "kernels/cuda/elementwise.cuh"

#include "kernels/check.h"
#include "kernels/cuda/row_ops.h"

namespace shoal::cuda {
namespace {

constexpr int kMaxColumnBlocks = 65535;  // of a grid in y

unsigned ColumnBlocks(int64_t cols) {
  const int64_t blocks = (cols + kElementThreads - 1) / kElementThreads;
  return static_cast<unsigned>(blocks < kMaxColumnBlocks ? blocks : kMaxColumnBlocks);
}

}  // namespace

void Norm(const LinearInput& input, int rows, int cols, float* out, int64_t out_stride,
          Stream stream) {
  const bool layer = input.kind == LinearInput::Kind::kLayerNorm;
  SHOAL_CHECK(layer || input.kind == LinearInput::Kind::kRmsNorm, "a norm is wanted");
  if (rows == 0) return;
  NormParams params = {};
  params.x = input.x;
  params.stride = input.stride;
  params.weight = input.weight;
  params.eps = input.eps;
  params.scale = input.scale;
  params.row_scale = input.row_scale;
  params.layer = layer;
  params.cols = cols;
  params.out = out;
  params.out_stride = out_stride;
  Launch(NormRow, dim3(rows), dim3(kElementThreads), 0, stream, params);
}

void SumSquares(const float* x, int64_t stride, const ColumnRun (&runs)[2], int rows, float* sums,
                Stream stream) {
  if (rows == 0) return;
  Launch(SquaresRow, dim3(rows, 2), dim3(kElementThreads), 0, stream, x, stride, runs[0], runs[1],
         sums);
}

void Add(float* x, int64_t x_stride, const float* y, int64_t y_stride, int rows, int cols,
         Stream stream) {
  if (rows == 0) return;
  Launch(AddRow, dim3(rows, ColumnBlocks(cols)), dim3(kElementThreads), 0, stream, x, x_stride, y,
         y_stride, cols);
}

void Embed(const PackedMatrix& table, const int32_t* ids, int n, float scale, float* out,
           Stream stream) {
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
         scale, out);
}

void Route(const RouterArgs& args, int rows, const RowPlace* places, int32_t* ids, float* weights,
           Stream stream) {
  if (rows == 0) return;
  const RouteParams params{args.logits,      args.experts,     args.used,   args.softmax_all,
                           args.renormalize, args.scale,       ids,         weights,
                           args.sigmoid,     args.choice_bias, args.groups, args.groups_used};
  Launch(RouteRow, dim3((rows + kElementWarps - 1) / kElementWarps), dim3(kElementThreads), 0,
         stream, params, places, rows);
}

}  // namespace shoal::cuda
