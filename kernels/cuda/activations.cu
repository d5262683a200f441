#include "kernels/cuda/activations.cuh"

namespace shoal::cuda {

void QuantizeRows(const InputRows& in, const Int8Rows& out, Stream stream) {
  if (in.rows == 0) return;
  const dim3 grid(in.rows, (in.cols + 4 * kRowThreads - 1) / (4 * kRowThreads));
  Launch(QuantizeRowsKernel, grid, dim3(kRowThreads), 0, stream, in, out);
}

}  // namespace shoal::cuda
