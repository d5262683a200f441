// Prefill: f16 (BF16 weights: bf16) tiles with f32 sums.
//
// The weights are the A operand and are unpacked from their packed bytes straight into registers:
// no pass through shared memory, and no two warps of a block unpack the same panel. A warp owns two
// panels and 64 rows of activations, a block four warps: 128 x 64 outputs. The rows come through
// shared memory, 32 columns to a stage, kHalfStages stages in flight. They are stored so that a
// lane's share of two mma steps is one aligned load of 16 bytes, and a warp's loads are one run of
// memory: no bank conflicts.
#pragma once

#include "kernels/cuda/packed_formats.cuh"
#include "kernels/cuda/product.cuh"

namespace shoal::cuda {

inline constexpr int kHalfWarps = 4;
inline constexpr int kHalfPanels = 2;                  // of a warp
inline constexpr int kHalfStages = 4;                  // of 32 columns
inline constexpr int kHalfTiles = kHalfGroupRows / 8;  // mma tiles along the rows
inline constexpr int kHalfAtOnce = 4;                  // of them between two products of one sum
inline constexpr int kHalfBlockPanels = kHalfWarps * kHalfPanels;
__device__ __forceinline__ uint32_t Bits(half2 v) {
  union {
    half2 h;
    uint32_t u;
  } both;
  both.h = v;
  return both.u;
}
__device__ __forceinline__ half2 AsHalf2(uint32_t v) {
  union {
    uint32_t u;
    half2 h;
  } both;
  both.u = v;
  return both.h;
}

// A fragments of 32 columns of a panel: two mma steps of 16.
struct HalfFragments {
  uint32_t a[2][4];
};

// How a warp reads a panel of a quantized type, 32 columns at a time, in order.
template <DType kType>
struct HalfReader {
  using Format = Packed<kType>;
  const uint8_t* next;  // the first byte not read
  int sub;              // of the super-block, 0..7
  bool fresh = true;    // a header comes next
  typename Format::Head head, next_head;
  typename Format::Raw raw;

  __device__ __forceinline__ HalfReader(const uint8_t* panel, int lead, int)
      : next(panel), sub(lead), head(), next_head(), raw() {}

  // Starts the loads of the next 32 columns.
  __device__ __forceinline__ void Load(const TileLane& at) {
    if constexpr (Format::kSuper) {
      if (fresh) {
        next_head = Format::LoadHead(next, at);
        next += Format::kHeaderBytes;
      }
    }
    raw = Format::LoadRaw(next, at);
    next += Format::kSubBytes + (Format::kSuper ? 0 : Format::kHeaderBytes);
  }

  // The columns loaded last.
  __device__ __forceinline__ void Unpack(const TileLane& at, HalfFragments* out) {
    if (fresh) head = next_head;
    uint32_t level[4];
    Format::Levels(raw, at, level);
    const TileScales w = Format::Scales(head, raw, sub, at);
    sub = (sub + 1) % 8;
    fresh = sub == 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int from = Format::kHalves ? h : 0;
        const half2 scale = __float2half2_rn(kHalfWeightScale * w.scale[r][from]);
        const half2 bias = __float2half2_rn(kHalfWeightScale * w.bias[r][from]);
        // Bytes u become the halves 1024 + u; signed ones are offset by 128 first.
        const uint32_t bytes = Format::kSigned ? level[2 * h + r] ^ 0x80808080u : level[2 * h + r];
        const half2 offset = AsHalf2(Format::kSigned ? 0x64806480u : 0x64006400u);
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          const uint32_t wide = __byte_perm(bytes, 0x64646464u, pair == 0 ? 0x4140 : 0x4342);
          const half2 v = __hsub2(AsHalf2(wide), offset);
          out->a[h][2 * pair + r] =
              Bits(Format::kBias ? __hfma2(v, scale, bias) : __hmul2(v, scale));
        }
      }
    }
  }
};

// F16 and BF16: the fragments are the stored words. Lines behind the last column are zeros.
template <DType kType>
struct HalfFloatReader {
  const uint8_t* next;
  int lines;  // left
  uint2 raw[4];

  __device__ __forceinline__ HalfFloatReader(const uint8_t* panel, int, int cols)
      : next(panel), lines((cols + 1) / 2), raw() {}
  __device__ __forceinline__ void Load(const TileLane& at) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int line = 8 * (i / 2) + 2 * at.t + i % 2;
      raw[i] = make_uint2(0, 0);
      if (line < lines) raw[i] = LoadStream<uint2>(next + 64 * line + 8 * at.g);
    }
    next += 16 * 64;
    lines -= 16;
  }
  __device__ __forceinline__ void Unpack(const TileLane&, HalfFragments* out) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out->a[i / 2][2 * (i % 2)] = raw[i].x;
      out->a[i / 2][2 * (i % 2) + 1] = raw[i].y;
    }
  }
};
template <>
struct HalfReader<DType::kF16> : HalfFloatReader<DType::kF16> {
  using HalfFloatReader::HalfFloatReader;
};
template <>
struct HalfReader<DType::kBF16> : HalfFloatReader<DType::kBF16> {
  using HalfFloatReader::HalfFloatReader;
};

// One stage: [row][32] halves, as HalfRows has them.
struct HalfStages {
  uint4 row[kHalfStages][kHalfGroupRows][4];
};

// Block (rows, panels): blocks that run at the same time share the panels in the L2 cache.
template <DType kType>
__global__ void __launch_bounds__(32 * kHalfWarps)
    HalfKernel(const __grid_constant__ Product p, const HalfRows a) {
  GridWait();
  const BlockRows block = RowsOfBlock(p.rows, blockIdx.x, kHalfGroupRows);
  if (block.count <= 0) return;
  const TileLane at = ThisTileLane();
  auto& stages = StaticShared<HalfStages>();
  const int warp = threadIdx.x / 32;
  const int blocks = (p.cols + 31) / 32;

  // This thread copies a quarter of two rows of each stage.
  static_assert(kHalfGroupRows * 4 == 2 * 32 * kHalfWarps);
  const int copy_row = threadIdx.x / 4, copy_part = threadIdx.x % 4;
  const uint16_t* source[2];
  for (int i = 0; i < 2; ++i) {
    const int row = RowOf(p.rows, block, copy_row + i * kHalfGroupRows / 2).operand;
    source[i] = a.data + int64_t{row} * 32 + 8 * copy_part;
  }
  const auto copy = [&](int kb) {
    if (kb < blocks) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        CpAsync16(&stages.row[kb % kHalfStages][copy_row + i * kHalfGroupRows / 2][copy_part],
                  source[i] + kb * a.row_stride * 32);
      }
    }
    CpAsyncCommit();
  };
  for (int kb = 0; kb < kHalfStages - 1; ++kb) copy(kb);

  // Panels behind the last one of all outputs are computed as copies of it and not stored.
  int panels = 0;
  for (int i = 0; i < p.output_count; ++i)
    panels += (p.outputs[i].rows + kPanelRows - 1) / kPanelRows;
  const int first_panel = (blockIdx.y * kHalfWarps + warp) * kHalfPanels;
  const auto weight = [&](int i) {
    int panel = min(first_panel + i, panels - 1);
    const ProductOutput& o = p.outputs[OutputOfPanel(p, &panel)];
    return WeightOf(o, block.expert) + panel * p.panel_bytes;
  };
  HalfReader<kType> reader[kHalfPanels] = {{weight(0), p.lead, p.cols},
                                           {weight(1), p.lead, p.cols}};
  static_assert(kHalfPanels == 2);

  float acc[kHalfPanels][kHalfTiles][4] = {};
#pragma unroll
  for (int i = 0; i < kHalfPanels; ++i) reader[i].Load(at);
  for (int kb = 0; kb < blocks; ++kb) {
    CpAsyncWait<kHalfStages - 2>();
    __syncthreads();  // the stage is there for all, and nobody reads the one that is overwritten
                      // next
    copy(kb + kHalfStages - 1);
    HalfFragments weights[kHalfPanels];
#pragma unroll
    for (int i = 0; i < kHalfPanels; ++i) {
      reader[i].Unpack(at, &weights[i]);
      if (kb + 1 < blocks) reader[i].Load(at);
    }
    // Products of one sum are kHalfAtOnce * kHalfPanels apart: an mma waits for the one before it.
#pragma unroll
    for (int first = 0; first < kHalfTiles; first += kHalfAtOnce) {
      uint4 rows[kHalfAtOnce];
#pragma unroll
      for (int k = 0; k < kHalfAtOnce; ++k) {
        rows[k] = stages.row[kb % kHalfStages][8 * (first + k) + at.g][at.t];
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int k = 0; k < kHalfAtOnce; ++k) {
          const uint32_t b[2] = {h == 0 ? rows[k].x : rows[k].z, h == 0 ? rows[k].y : rows[k].w};
#pragma unroll
          for (int i = 0; i < kHalfPanels; ++i) {
            if constexpr (kType == DType::kBF16) {
              MmaBf16(acc[i][first + k], weights[i].a[h], b);
            } else {
              MmaF16(acc[i][first + k], weights[i].a[h], b);
            }
          }
        }
      }
    }
  }

  constexpr bool kFloat = kType == DType::kF16 || kType == DType::kBF16;
#pragma unroll
  for (int tile = 0; tile < kHalfTiles; ++tile) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int entry = 8 * tile + 2 * at.t + c;
      if (entry >= block.count) continue;
      const RowPair row = RowOf(p.rows, block, entry);
      const float scale = a.scale[row.operand] * (kFloat ? 1 : 1 / kHalfWeightScale);
#pragma unroll
      for (int i = 0; i < kHalfPanels; ++i) {
        int panel = first_panel + i;
        if (panel >= panels) continue;
        const ProductOutput& o = p.outputs[OutputOfPanel(p, &panel)];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          StoreOutput(o, block.expert, row.output, panel * kPanelRows + 2 * at.g + r,
                      scale * acc[i][tile][2 * r + c]);
        }
      }
    }
  }
}

// ---- Weights for a library's product

inline constexpr int kUnpackWarps = 8;

// Block (panel, runs of kUnpackWarps groups of 256 columns): the panel's rows as plain f16, times
// kHalfWeightScale. Rows behind `rows` are not written.
template <DType kType>
__global__ void __launch_bounds__(32 * kUnpackWarps)
    UnpackKernel(const uint8_t* weight, int lead, int cols, int64_t panel_bytes, int rows,
                 uint16_t* out) {
  GridWait();
  const TileLane at = ThisTileLane();
  const int group = blockIdx.y * kUnpackWarps + threadIdx.x / 32, end = lead + cols / 32;
  int sub = max(8 * group, lead);
  if (sub >= end) return;
  const uint8_t* panel = weight + blockIdx.x * panel_bytes;
  HalfReader<kType> reader(panel + Packed<kType>::UnitAt(group, lead), sub % 8, cols);
  for (; sub < min(8 * group + 8, end); ++sub) {
    HalfFragments weights;
    reader.Load(at);
    reader.Unpack(at, &weights);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = blockIdx.x * kPanelRows + 2 * at.g + r;
      if (row >= rows) continue;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        *reinterpret_cast<uint2*>(out + int64_t{row} * cols + (sub - lead) * 32 + 16 * h +
                                  4 * at.t) = {weights.a[h][r], weights.a[h][2 + r]};
      }
    }
  }
}

template <DType kType>
void LaunchUnpack(const PackedMatrix& w, int first_panel, int panels, uint16_t* out,
                  Stream stream) {
  const PackedShape& shape = w.shape;
  const int groups = static_cast<int>((shape.lead + shape.cols / 32 + 7) / 8);
  Launch(UnpackKernel<kType>, dim3(panels, (groups + kUnpackWarps - 1) / kUnpackWarps),
         dim3(32 * kUnpackWarps), 0, stream, w.data + first_panel * shape.panel_bytes(), shape.lead,
         static_cast<int>(shape.cols), shape.panel_bytes(),
         static_cast<int>(shape.rows) - first_panel * kPanelRows, out);
}

template <DType kType>
void LaunchHalf(Product p, const HalfRows& a, Stream stream) {
  const int panels = NumberPanels(&p);
  const int blocks = RowBlocks(p.rows, kHalfGroupRows);
  if (panels == 0 || blocks == 0) return;
  const dim3 grid(blocks, (panels + kHalfBlockPanels - 1) / kHalfBlockPanels);
  Launch(HalfKernel<kType>, grid, dim3(32 * kHalfWarps), 0, stream, p, a);
}

}  // namespace shoal::cuda
