// Decode: int8 rows times quantized panels. A block owns one panel, its warps split the columns,
// and a tile of 8 rows costs a warp one int8 mma for each 32 columns. Sums within 32 columns are
// exact integers, the rest is f32 in an order that depends on the weight's shape alone.
#pragma once

#include "kernels/cuda/packed_formats.cuh"
#include "kernels/cuda/product.cuh"

namespace shoal::cuda {

inline constexpr int kInt8Warps = 8;
inline constexpr int kInt8Step = 4;  // column blocks that a warp loads at once

// Blocks that shall fit on an SM. Two keep 128 registers for a thread; where that spills, the
// compiler is left alone.
template <DType kType, int kTiles>
inline constexpr int kInt8Blocks = kTiles == 1 && kType != DType::kQ6_K ? 2 : 1;

// Integer sums start at these bits of a float, 1.5 * 2^23: as a float the sum then is that plus the
// integer (below 2^22), and subtracting converts it in one instruction at full rate.
inline constexpr int kMagicBits = 0x4B400000;
inline constexpr float kMagic = 12582912.0f;

// A lane's share of the int8 rows: for tile i the operand row of its B column g, and those of its C
// columns 2 t and 2 t + 1.
template <int kTiles>
struct TileRows {
  int b[kTiles], c[kTiles][2];
};

// 32 columns of a panel, as loaded.
template <DType kType>
struct Int8Steps {
  typename Packed<kType>::Raw raw[kInt8Step];
};

// Adds column block kb. valid: false at a slice's edges, where the block stands in for one not
// held.
template <DType kType, int kTiles>
__device__ __forceinline__ void AddBlock(const typename Packed<kType>::Head& head,
                                         const typename Packed<kType>::Raw& raw, int s, bool valid,
                                         int64_t kb, const TileLane& at, const Int8Rows& a,
                                         const TileRows<kTiles>& rows, int count,
                                         float acc[kTiles][4]) {
  using Format = Packed<kType>;
  uint32_t level[4];
  Format::Levels(raw, at, level);
  TileScales w = Format::Scales(head, raw, s, at);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (!valid) w.scale[i / 2][i % 2] = w.bias[i / 2][i % 2] = 0;
  }
  const int64_t base = kb * a.row_stride;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    if (kTiles > 1 && 8 * tile >= count) break;
    const uint2 b = *reinterpret_cast<const uint2*>(a.q + (base + rows.b[tile]) * 32 + 8 * at.t);
    const uint32_t fragment[2] = {b.x, b.y};
    float dot[2][4];
    if constexpr (Format::kHalves) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        int c[4] = {kMagicBits, kMagicBits, kMagicBits, kMagicBits};
        MmaS8K16(c, level + 2 * h, fragment[h]);
        for (int i = 0; i < 4; ++i) dot[h][i] = __int_as_float(c[i]) - kMagic;
      }
    } else {
      int c[4] = {kMagicBits, kMagicBits, kMagicBits, kMagicBits};
      MmaS8K32(c, level, fragment);
      for (int i = 0; i < 4; ++i) dot[0][i] = __int_as_float(c[i]) - kMagic;
    }
#pragma unroll
    for (int col = 0; col < 2; ++col) {
      const int64_t row = base + rows.c[tile][col];
      const float scale = a.scale[row];
      float2 sums = {0, 0};
      if constexpr (Format::kBias) sums = *reinterpret_cast<const float2*>(a.half_sums + 2 * row);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int i = 2 * r + col;
        if constexpr (Format::kHalves) {
          acc[tile][i] += scale * (w.scale[r][0] * dot[0][i] + w.scale[r][1] * dot[1][i]);
          if constexpr (Format::kBias) {
            acc[tile][i] += w.bias[r][0] * sums.x + w.bias[r][1] * sums.y;
          }
        } else {
          acc[tile][i] += scale * (w.scale[r][0] * dot[0][i]);
          if constexpr (Format::kBias) acc[tile][i] += w.bias[r][0] * (sums.x + sums.y);
        }
      }
    }
  }
}

// The columns of a panel in steps of kInt8Step blocks, two to a super-block (or to eight blocks).
template <DType kType>
struct StepReader {
  using Format = Packed<kType>;
  const uint8_t* panel;
  int lead,
      end;  // sub-blocks lead .. end - 1, counted from the first super-block's start, are held

  __device__ __forceinline__ int Held(int sub) const { return max(lead, min(sub, end - 1)); }
  __device__ __forceinline__ const uint8_t* Unit(int step) const {
    return panel + Format::UnitAt(step / 2, lead);
  }
  __device__ __forceinline__ void Load(int step, const TileLane& at, Int8Steps<kType>* out) const {
    const uint8_t* unit = Unit(step);
    const int first = step < 2 ? lead : 8 * (step / 2);
#pragma unroll
    for (int k = 0; k < kInt8Step; ++k) {
      const int sub = Held(kInt8Step * step + k);
      out->raw[k] = Format::LoadRaw(unit + Format::SubAt(max(sub - first, 0)), at);
    }
  }
  __device__ __forceinline__ typename Format::Head LoadHead(int step, const TileLane& at) const {
    return Format::LoadHead(Unit(step), at);
  }
};

// Block (rows, panel): blocks that run at the same time share the panel in the L2 cache.
template <DType kType, int kTiles>
__global__ void __launch_bounds__(32 * kInt8Warps, kInt8Blocks<kType, kTiles>)
    Int8Kernel(const __grid_constant__ Product p, const Int8Rows a) {
  const BlockRows block = RowsOfBlock(p.rows, blockIdx.x, 8 * kTiles);
  if (block.count <= 0) return;
  int panel = blockIdx.y;
  const ProductOutput& o = p.outputs[OutputOfPanel(p, &panel)];
  const TileLane at = ThisTileLane();
  TileRows<kTiles> rows;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    rows.b[i] = RowOf(p.rows, block, 8 * i + at.g).operand;
    for (int c = 0; c < 2; ++c) rows.c[i][c] = RowOf(p.rows, block, 8 * i + 2 * at.t + c).operand;
  }

  const StepReader<kType> reader = {WeightOf(o, block.expert) + panel * p.panel_bytes, p.lead,
                                    p.lead + p.cols / 32};
  const int warp = threadIdx.x / 32;
  const int steps = (reader.end + kInt8Step - 1) / kInt8Step;
  const int begin = steps * warp / kInt8Warps, end = steps * (warp + 1) / kInt8Warps;
  float acc[kTiles][4] = {};
  if (begin < end) {
    Int8Steps<kType> now, next = {};
    reader.Load(begin, at, &now);
    typename Packed<kType>::Head head = reader.LoadHead(begin, at), next_head = head;
    for (int step = begin; step < end; ++step) {
      if (step + 1 < end) {  // the next step's bytes are under way while this one is multiplied
        reader.Load(step + 1, at, &next);
        if (step % 2 == 1) next_head = reader.LoadHead(step + 1, at);
      }
#pragma unroll
      for (int k = 0; k < kInt8Step; ++k) {
        const int sub = kInt8Step * step + k, held = reader.Held(sub);
        AddBlock<kType, kTiles>(head, now.raw[k], sub % 8, sub == held, held - p.lead, at, a, rows,
                                block.count, acc);
      }
      now = next;
      head = next_head;
    }
  }

  auto& sums = StaticShared<float[kInt8Warps][8 * kTiles][kPanelRows]>();
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    for (int i = 0; i < 4; ++i)
      sums[warp][8 * tile + 2 * at.t + i % 2][2 * at.g + i / 2] = acc[tile][i];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < block.count * kPanelRows; i += 32 * kInt8Warps) {
    const int row = i / kPanelRows, lane = i % kPanelRows;
    float v = 0;
    for (int w = 0; w < kInt8Warps; ++w) v += sums[w][row][lane];
    StoreOutput(o, RowOf(p.rows, block, row).output, panel * kPanelRows + lane, v);
  }
}

template <DType kType>
void LaunchInt8(Product p, const Int8Rows& a, Stream stream) {
  const int panels = NumberPanels(&p);
  constexpr int kTiles = kInt8GroupRows / 8;
  // A group of an expert may have up to kInt8GroupRows rows.
  const bool few = p.rows.groups == nullptr && p.rows.count <= 8;
  const int blocks = RowBlocks(p.rows, few ? 8 : kInt8GroupRows);
  if (panels == 0 || blocks == 0) return;
  Launch(few ? Int8Kernel<kType, 1> : Int8Kernel<kType, kTiles>, dim3(blocks, panels),
         dim3(32 * kInt8Warps), 0, stream, p, a);
}

}  // namespace shoal::cuda
