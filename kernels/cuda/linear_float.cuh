// F32, F16 and BF16 weights times f32 rows, in plain f32 sums. A block owns one panel, its warps
// split the columns; a warp reads eight lines at once, lane l four rows (4 (l % 4) ..) of line l
// / 4.
#pragma once

#include "kernels/cuda/product.cuh"

namespace shoal::cuda {

inline constexpr int kFloatWarps = 8;

// The columns of one weight word: F32 one, F16 and BF16 two.
template <DType kType>
__device__ __forceinline__ void Widen(uint32_t word, float out[2]) {
  if constexpr (kType == DType::kF32) {
    out[0] = __uint_as_float(word);
  } else if constexpr (kType == DType::kBF16) {
    out[0] = __uint_as_float(word << 16);
    out[1] = __uint_as_float(word & 0xFFFF0000u);
  } else {
    out[0] = __half2float(__ushort_as_half(static_cast<uint16_t>(word)));
    out[1] = __half2float(__ushort_as_half(static_cast<uint16_t>(word >> 16)));
  }
}

// acc[4 rows of the panel][rows] += line * columns.
template <DType kType, int kRows>
__device__ __forceinline__ void AddLine(const uint4& line, const float* const (&x)[kRows], int col,
                                        float acc[4][kRows]) {
  constexpr int kCols = kType == DType::kF32 ? 1 : 2;
  const uint32_t words[4] = {line.x, line.y, line.z, line.w};
  float w[4][2];
#pragma unroll
  for (int r = 0; r < 4; ++r) Widen<kType>(words[r], w[r]);
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    float a[2];
    if constexpr (kCols == 2) {
      const float2 pair = *reinterpret_cast<const float2*>(x[i] + col);
      a[0] = pair.x;
      a[1] = pair.y;
    } else {
      a[0] = x[i][col];
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int c = 0; c < kCols; ++c) acc[r][i] += w[r][c] * a[c];
    }
  }
}

// Block (rows, panel): blocks that run at the same time share the panel in the L2 cache.
template <DType kType, int kRows>
__global__ void __launch_bounds__(32 * kFloatWarps)
    FloatKernel(const __grid_constant__ Product p, const FloatRows a) {
  GridWait();
  constexpr int kCols = kType == DType::kF32 ? 1 : 2;
  constexpr int kAhead = 4;  // loads of 512 bytes that a warp has under way
  const BlockRows block = RowsOfBlock(p.rows, blockIdx.x, kRows);
  if (block.count <= 0) return;
  int panel = blockIdx.y;
  const ProductOutput& o = p.outputs[OutputOfPanel(p, &panel)];
  const uint8_t* weight = WeightOf(o, block.expert) + panel * p.panel_bytes;
  const float* x[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) x[i] = a.data + RowOf(p.rows, block, i).operand * a.stride;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int lines = (p.cols + kCols - 1) / kCols;
  const int runs = (lines + 8 * kAhead - 1) / (8 * kAhead);
  const int end = runs * (warp + 1) / kFloatWarps;
  float acc[4][kRows] = {};
  for (int run = runs * warp / kFloatWarps; run < end; ++run) {
    const int first = run * 8 * kAhead + lane / 4;
    uint4 line[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int at = min(first + 8 * k, lines - 1);
      line[k] = LoadStream<uint4>(weight + at * int64_t{64} + lane % 4 * 16);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (first + 8 * k < lines) AddLine<kType, kRows>(line[k], x, (first + 8 * k) * kCols, acc);
    }
  }

  // Over the lanes that hold other lines of the same rows, then over the warps, in fixed order.
  auto& sums = StaticShared<float[kFloatWarps][kRows][kPanelRows]>();
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int lanes = 16; lanes >= 4; lanes /= 2) {
        acc[r][i] += __shfl_xor_sync(0xFFFFFFFFu, acc[r][i], lanes);
      }
      if (lane < 4) sums[warp][i][4 * lane + r] = acc[r][i];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < block.count * kPanelRows; i += 32 * kFloatWarps) {
    const int row = i / kPanelRows, at = i % kPanelRows;
    float v = 0;
    for (int w = 0; w < kFloatWarps; ++w) v += sums[w][row][at];
    StoreOutput(o, block.expert, RowOf(p.rows, block, row).output, panel * kPanelRows + at, v);
  }
}

template <DType kType>
void LaunchFloat(Product p, const FloatRows& a, Stream stream) {
  const int panels = NumberPanels(&p);
  const bool one = p.rows.groups == nullptr && p.rows.count == 1;
  const int blocks = RowBlocks(p.rows, kFloatGroupRows);
  if (panels == 0 || blocks == 0) return;
  Launch(one ? FloatKernel<kType, 1> : FloatKernel<kType, kFloatGroupRows>, dim3(blocks, panels),
         dim3(32 * kFloatWarps), 0, stream, p, a);
}

}  // namespace shoal::cuda
