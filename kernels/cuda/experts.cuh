// Mixture of experts on the device: grouping rows by expert without the host, and the weighted sum.
#pragma once

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/linear_ops.h"

namespace shoal::cuda {

inline constexpr int kGroupThreads = 512;
inline constexpr int kSumThreads = 256;
inline constexpr int kPointersAtOnce =
    384;  // 3 KiB of the 4 KiB that a kernel's arguments may have

// One block; a warp takes an expert at a time and walks the ids itself, 32 at once, so slots stay
// in order without a sort.
__global__ void __launch_bounds__(kGroupThreads)
    GroupKernel(const int32_t* ids, int count, int experts, int group_rows, Grouping out) {
  GridWait();
  auto* counts = reinterpret_cast<int32_t*>(DynamicShared());  // [experts]
  for (int e = threadIdx.x; e < experts; e += kGroupThreads) counts[e] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += kGroupThreads) {
    if (ids[i] >= 0) atomicAdd(&counts[ids[i]], 1);
  }
  __syncthreads();
  const int lane = threadIdx.x % 32;
  int begin = 0, group = 0;
  for (int e = 0, warp = threadIdx.x / 32; e < experts; ++e) {
    const int rows = counts[e];
    if (e % (kGroupThreads / 32) == warp && rows > 0) {
      for (int at = lane * group_rows; at < rows; at += 32 * group_rows) {
        out.groups[group + at / group_rows] = {e, begin + at, min(group_rows, rows - at)};
      }
      int slot = begin;
      for (int first = 0; first < count; first += 32) {
        const bool mine = first + lane < count && ids[first + lane] == e;
        const unsigned all = __ballot_sync(0xFFFFFFFFu, mine);
        if (mine) out.slots[slot + __popc(all & ((1u << lane) - 1))] = first + lane;
        slot += __popc(all);
      }
    }
    begin += rows;
    group += (rows + group_rows - 1) / group_rows;
  }
  if (threadIdx.x == 0) *out.group_count = group;
}

struct PointerList {
  const uint8_t* pointer[kPointersAtOnce];
  int count;
};
__global__ void __launch_bounds__(kGroupThreads)
    WritePointersKernel(const __grid_constant__ PointerList list, const uint8_t** out) {
  GridWait();
  if (static_cast<int>(threadIdx.x) < list.count) out[threadIdx.x] = list.pointer[threadIdx.x];
}

// Block (columns, row).
__global__ void __launch_bounds__(kSumThreads)
    WeightedSumKernel(const float* slots, int64_t slot_stride, const int32_t* ids,
                      const float* weights, int used, int cols, float* out, int64_t out_stride) {
  GridWait();
  const int row = blockIdx.y;
  const int col = blockIdx.x * kSumThreads + threadIdx.x;
  if (col >= cols) return;
  float sum = 0;
  for (int k = 0; k < used; ++k) {
    const int slot = row * used + k;
    if (ids[slot] < 0) continue;
    sum += (weights != nullptr ? weights[slot] : 1) * slots[slot * slot_stride + col];
  }
  out[row * out_stride + col] = sum;
}

}  // namespace shoal::cuda
