#include "kernels/cuda/activations.cuh"

namespace shoal::cuda {

void QuantizeRows(const InputRows& in, const Int8Rows& out, Stream stream) {
  if (in.rows == 0) return;
  const dim3 grid(in.rows, (in.cols + kRowStep - 1) / kRowStep);
  Launch(QuantizeRowsKernel, grid, dim3(kRowThreads), 0, stream, in, out);
}

void HalveRows(const InputRows& in, bool bf16, const HalfRows& out, Stream stream) {
  if (in.rows == 0) return;
  Launch(bf16 ? HalveRowsKernel<true> : HalveRowsKernel<false>, dim3(in.rows), dim3(kRowThreads), 0,
         stream, in, out);
}

void HalveAll(const InputRows& in, float* extremes, const PlainHalves& out, Stream stream) {
  if (in.rows == 0) return;
  Launch(RowExtremesKernel, dim3(in.rows), dim3(kRowThreads), 0, stream, in, extremes);
  Launch(HalveAllKernel, dim3(in.rows), dim3(kRowThreads), 0, stream, in, extremes, out);
}

void CopyRows(const InputRows& in, const FloatRows& out, Stream stream) {
  if (in.rows == 0) return;
  Launch(CopyRowsKernel, dim3(in.rows), dim3(kRowThreads), 0, stream, in, out);
}

}  // namespace shoal::cuda
