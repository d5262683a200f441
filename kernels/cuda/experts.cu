#include "kernels/cuda/experts.cuh"

namespace shoal::cuda {

void GroupByExpert(const int32_t* ids, int count, int experts, int group_rows, const Grouping& out,
                   Stream stream) {
  if (count == 0) return;
  Launch(GroupKernel, dim3(1), dim3(kGroupThreads), experts * sizeof(int32_t), stream, ids, count,
         experts, group_rows, out);
}

void WritePointers(const uint8_t* const* host, int count, const uint8_t** device, Stream stream) {
  for (int begin = 0; begin < count; begin += kPointersAtOnce) {
    PointerList list = {};
    list.count = count - begin < kPointersAtOnce ? count - begin : kPointersAtOnce;
    for (int i = 0; i < list.count; ++i) list.pointer[i] = host[begin + i];
    Launch(WritePointersKernel, dim3(1), dim3(kGroupThreads), 0, stream, list, device + begin);
  }
}

void WeightedSum(const float* slots, int64_t slot_stride, const int32_t* ids, const float* weights,
                 int used, int rows, int cols, float* out, int64_t out_stride, Stream stream) {
  if (rows == 0 || cols == 0) return;
  const dim3 grid((cols + kSumThreads - 1) / kSumThreads, rows);
  Launch(WeightedSumKernel, grid, dim3(kSumThreads), 0, stream, slots, slot_stride, ids, weights,
         used, cols, out, out_stride);
}

}  // namespace shoal::cuda
