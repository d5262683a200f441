// Decode: int8 rows times quantized panels. A block owns one panel, and its
// warps split the columns, 256 at a time: a group. Two kernels give the same
// bits:
//
//   Int8RowKernel   one row. Column j of the mma's B holds the row's columns 32
//   j .. 32 j + 31 of
//                   the group and zeros elsewhere, so eight mma leave the eight
//                   blocks' sums beside each other, and scales meet them once
//                   for each group.
//   Int8Kernel      tiles of eight rows, up to four: an mma for each tile and 32
//                   columns.
//
// Sums within 32 columns are exact integers. The rest is f32 in an order that
// depends on the weight's shape alone: blocks 0 and 1, 2 and 3 of each half
// group are added as pairs, the pairs to each other, these to the sum of all
// first or of all second halves; then both, then the warps.
#pragma once

#include <algorithm>

#include "kernels/cuda/packed_formats.cuh"
#include "kernels/cuda/product.cuh"

namespace shoal::cuda {

inline constexpr int kInt8Warps = 8;
inline constexpr int kGroupSubs = 8;  // blocks of 32 columns in a group
inline constexpr int kHalfSubs = 4;   // that a warp loads at once

// Integer sums start at these bits of a float, 1.5 * 2^23: as a float the sum
// then is that plus the integer (below 2^22), and subtracting converts it in
// one instruction at full rate.
inline constexpr int kMagicBits = 0x4B400000;
inline constexpr float kMagic = 12582912.0f;

// The columns of a panel in groups.
template <DType kType>
struct GroupReader {
  using Format = Packed<kType>;
  using Raw = typename Format::Raw;
  const uint8_t* panel;
  int lead, end;  // blocks lead .. end - 1, counted from the first group's
                  // start, are held

  __device__ __forceinline__ int Groups() const { return (end + kGroupSubs - 1) / kGroupSubs; }
  __device__ __forceinline__ bool Holds(int sub) const { return sub >= lead && sub < end; }
  __device__ __forceinline__ int Held(int sub) const { return max(lead, min(sub, end - 1)); }
  __device__ __forceinline__ const uint8_t* Unit(int group) const {
    return panel + Format::UnitAt(group, lead);
  }
  // Block `sub` of the panel, or the nearest one held.
  __device__ __forceinline__ const uint8_t* Sub(int group, const uint8_t* unit, int sub) const {
    const int first = group == 0 ? lead : kGroupSubs * group;
    return unit + Format::SubAt(max(Held(sub) - first, 0));
  }
  // Planes (and scales with kScales) of blocks kHalfSubs * half .. of a group.
  template <bool kScales>
  __device__ __forceinline__ void Load(int group, int half, const TileLane& at,
                                       Raw raw[kHalfSubs]) const {
    const uint8_t* unit = Unit(group);
    const int first = kGroupSubs * group + kHalfSubs * half;
    const uint8_t* p[kHalfSubs];
    if (kGroupSubs * group >= lead && first + kHalfSubs <= end) {
      unit += Format::SubAt(kHalfSubs * half);
#pragma unroll
      for (int k = 0; k < kHalfSubs; ++k) p[k] = unit + (Format::SubAt(k) - Format::SubAt(0));
    } else {
#pragma unroll
      for (int k = 0; k < kHalfSubs; ++k) p[k] = Sub(group, unit, first + k);
    }
#pragma unroll
    for (int k = 0; k < kHalfSubs; ++k) {
      Format::LoadPlanes(p[k], at, &raw[k]);
      if constexpr (kScales) Format::LoadScales(p[k], at, &raw[k]);
    }
  }
};

// carry + the block's share of an output: r is 0 or 1 of the lane's panel rows, `share` the
// weights' scale times the integer sum (of both halves of the columns where the type has two
// scales), `scale` and `sums` the row's. Every rounding is written out, so that both kernels make
// the same ones.
template <DType kType>
__device__ __forceinline__ float AddTerm(const TileScales& w, int r, float share, float scale,
                                         const float2& sums, float carry) {
  using Format = Packed<kType>;
  if constexpr (Format::kBias && Format::kHalves) {
    carry = __fmaf_rn(w.bias[r][0], sums.x, carry);
    carry = __fmaf_rn(w.bias[r][1], sums.y, carry);
  } else if constexpr (Format::kBias) {
    carry = __fmaf_rn(w.bias[r][0], __fadd_rn(sums.x, sums.y), carry);
  }
  return __fmaf_rn(scale, share, carry);
}

// The outputs of a block from what its warps hold: kCols sums of each warp for
// every panel row.
template <int kCols>
using WarpSums = float[kInt8Warps][kCols][kPanelRows];
template <int kCols>
__device__ __forceinline__ void StoreSums(const WarpSums<kCols>& sums, const Product& p,
                                          const ProductOutput& o, const BlockRows& block,
                                          int panel) {
  __syncthreads();
  for (int i = threadIdx.x; i < block.count * kPanelRows; i += 32 * kInt8Warps) {
    const int row = i / kPanelRows, lane = i % kPanelRows;
    float v = 0;
#pragma unroll
    for (int w = 0; w < kInt8Warps; ++w) v += sums[w][row][lane];
    StoreOutput(o, block.expert, RowOf(p.rows, block, row).output, panel * kPanelRows + lane, v);
  }
}

// ---- One row

// Blocks that shall fit on an SM: what leaves two groups in registers.
template <DType kType>
inline constexpr int kInt8RowBlocks = Packed<kType>::kHalves                               ? 1
                                      : Packed<kType>::kInfo.hi || Packed<kType>::kInfo.i8 ? 2
                                                                                           : 3;

// A group as a lane of Int8RowKernel has it. While one is multiplied the next
// is under way.
template <DType kType>
struct RowGroupData {
  typename Packed<kType>::Raw planes[2][kHalfSubs];
  typename Packed<kType>::Head head;
  typename Packed<kType>::Raw scales[2];  // of types without super-blocks: blocks 2 t and 2 t + 1
  uint2 b;                                // of the row: the block whose number is g
  float scale[2];                         // of the row: blocks 2 t and 2 t + 1
  float2 sums[2];
};

template <DType kType>
__device__ __forceinline__ void LoadWeights(const GroupReader<kType>& reader, int group,
                                            const TileLane& at, RowGroupData<kType>* out) {
  using Format = Packed<kType>;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    reader.template Load<false>(group, half, at, out->planes[half]);
  }
  const uint8_t* unit = reader.Unit(group);
  out->head = Format::LoadHead(unit, at);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int sub = kGroupSubs * group + 2 * at.t + i;
    Format::LoadScales(reader.Sub(group, unit, sub), at, &out->scales[i]);
  }
}

template <DType kType>
__device__ __forceinline__ void LoadRow(const GroupReader<kType>& reader, int group,
                                        const TileLane& at, const Int8Rows& a, int row,
                                        RowGroupData<kType>* out) {
  const int first = kGroupSubs * group;
  const auto act = [&](int sub) { return (reader.Held(sub) - reader.lead) * a.row_stride + row; };
  out->b = make_uint2(0, 0);
  if (reader.Holds(first + at.g)) {
    out->b = *reinterpret_cast<const uint2*>(a.q + act(first + at.g) * 32 + 8 * at.t);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int sub = first + 2 * at.t + i;
    out->scale[i] = a.scale[act(sub)];
    if constexpr (Packed<kType>::kBias) {
      out->sums[i] = *reinterpret_cast<const float2*>(a.half_sums + 2 * act(sub));
      if (!reader.Holds(sub)) out->sums[i] = {0, 0};
    }
  }
}

// Adds the group to acc: lanes 0, 1 of a g have the sums of its first half, 2,
// 3 of its second.
template <DType kType>
__device__ __forceinline__ void AddGroup(const RowGroupData<kType>& data, const TileLane& at,
                                         float acc[2]) {
  using Format = Packed<kType>;
  int c[2][4];  // the sums of block j are column j
#pragma unroll
  for (int i = 0; i < 8; ++i) c[i / 4][i % 4] = kMagicBits;
#pragma unroll
  for (int j = 0; j < kGroupSubs; ++j) {
    uint32_t level[4];
    Format::Levels(data.planes[j / kHalfSubs][j % kHalfSubs], at, level);
    const uint32_t fragment[2] = {at.g == j ? data.b.x : 0, at.g == j ? data.b.y : 0};
    if constexpr (Format::kHalves) {
#pragma unroll
      for (int h = 0; h < 2; ++h) MmaS8K16(c[h], level + 2 * h, fragment[h]);
    } else {
      MmaS8K32(c[0], level, fragment);
    }
  }
  const TileScales w[2] = {Format::Scales(data.head, data.scales[0], 2 * at.t, at),
                           Format::Scales(data.head, data.scales[1], 2 * at.t + 1, at)};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float pair = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float share = __fmul_rn(w[i].scale[r][0], __int_as_float(c[0][2 * r + i]) - kMagic);
      if constexpr (Format::kHalves) {
        share = __fmaf_rn(w[i].scale[r][1], __int_as_float(c[1][2 * r + i]) - kMagic, share);
      }
      pair = AddTerm<kType>(w[i], r, share, data.scale[i], data.sums[i], pair);
    }
    acc[r] = __fadd_rn(acc[r], __fadd_rn(pair, __shfl_xor_sync(0xFFFFFFFFu, pair, 1)));
  }
}

template <DType kType>
__global__ void __launch_bounds__(32 * kInt8Warps, kInt8RowBlocks<kType>)
    Int8RowKernel(const __grid_constant__ Product p, const Int8Rows a) {
  const BlockRows block = {0, static_cast<int>(blockIdx.x), 1};
  int panel = blockIdx.y;
  const ProductOutput& o = p.outputs[OutputOfPanel(p, &panel)];
  const TileLane at = ThisTileLane();
  const GroupReader<kType> reader = {o.weight + panel * p.panel_bytes, p.lead,
                                     p.lead + p.cols / 32};
  const int warp = threadIdx.x / 32, groups = reader.Groups();
  const int begin = groups * warp / kInt8Warps, end = groups * (warp + 1) / kInt8Warps;
  float acc[2] = {};
  RowGroupData<kType> even = {}, odd = {};
  GridTrigger();
  if (begin < end) LoadWeights(reader, begin, at, &even);
  GridWait();  // weights do not depend on the kernels before
  if (begin < end) LoadRow(reader, begin, at, a, block.begin, &even);
  for (int group = begin; group < end; group += 2) {
    if (group + 1 < end) {
      LoadWeights(reader, group + 1, at, &odd);
      LoadRow(reader, group + 1, at, a, block.begin, &odd);
    }
    AddGroup(even, at, acc);
    if (group + 1 == end) break;
    if (group + 2 < end) {
      LoadWeights(reader, group + 2, at, &even);
      LoadRow(reader, group + 2, at, a, block.begin, &even);
    }
    AddGroup(odd, at, acc);
  }
  auto& sums = StaticShared<WarpSums<1>>();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float v = __fadd_rn(acc[r], __shfl_xor_sync(0xFFFFFFFFu, acc[r], 2));
    if (at.t == 0) sums[warp][0][2 * at.g + r] = v;
  }
  StoreSums<1>(sums, p, o, block, panel);
}

// ---- Tiles of eight rows

// Two blocks on an SM keep 128 registers for a thread; where that spills, the
// compiler is left alone.
template <DType kType, int kTiles>
inline constexpr int kInt8Blocks = Packed<kType>::kHalves || kTiles > 2 ? 1 : 2;

// A lane's share of the int8 rows: for tile i the operand row of its B column
// g, and those of its C columns 2 t and 2 t + 1. Rows that are not those of
// groups stand side by side: c is an even number, and both are read at once.
template <int kTiles>
struct TileRows {
  uint32_t b[kTiles], c[kTiles][2];
};

// The scales of a block's activations for a lane's two columns of C.
struct ColumnScales {
  float scale[2];
  float2 sums[2];
};
template <bool kGrouped, bool kBias>
__device__ __forceinline__ ColumnScales LoadColumnScales(const Int8Rows& a, uint32_t base,
                                                         const uint32_t c[2]) {
  ColumnScales out = {};
  if constexpr (kGrouped) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      out.scale[i] = a.scale[base + c[i]];
      if constexpr (kBias) {
        out.sums[i] = *reinterpret_cast<const float2*>(a.half_sums + 2 * (base + c[i]));
      }
    }
  } else {
    const float2 scale = *reinterpret_cast<const float2*>(a.scale + (base + c[0]));
    out.scale[0] = scale.x;
    out.scale[1] = scale.y;
    if constexpr (kBias) {
      const float4 sums = *reinterpret_cast<const float4*>(a.half_sums + 2 * (base + c[0]));
      out.sums[0] = {sums.x, sums.y};
      out.sums[1] = {sums.z, sums.w};
    }
  }
  return out;
}

// Adds half a group's sums to acc: blocks 8 group + 4 kHalf .. of the panel.
//
// Scale times integer sum is one multiply-add: scale * (magic + sum) - scale *
// magic, exact before its one rounding, as scales have at most 19 significant
// bits and so scale * magic is a float.
template <DType kType, int kTiles, int kHalf, bool kGrouped>
__device__ __forceinline__ void AddHalf(const GroupReader<kType>& reader,
                                        const typename Packed<kType>::Head& head,
                                        const typename Packed<kType>::Raw raw[kHalfSubs], int group,
                                        const TileLane& at, const Int8Rows& a,
                                        const TileRows<kTiles>& rows, int count,
                                        float acc[kTiles][4]) {
  using Format = Packed<kType>;
  uint32_t level[kHalfSubs][4];
  TileScales w[kHalfSubs];
  float less[kHalfSubs][2];
  uint32_t base[kHalfSubs];
#pragma unroll
  for (int k = 0; k < kHalfSubs; ++k) {
    const int sub = kGroupSubs * group + kHalfSubs * kHalf + k;
    Format::Levels(raw[k], at, level[k]);
    w[k] = Format::Scales(head, raw[k], kHalfSubs * kHalf + k, at);
    if (!reader.Holds(sub)) w[k] = {};
#pragma unroll
    for (int r = 0; r < 2; ++r) less[k][r] = __fmul_rn(w[k].scale[r][0], -kMagic);
    base[k] =
        static_cast<uint32_t>(reader.Held(sub) - reader.lead) * static_cast<uint32_t>(a.row_stride);
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    if (kTiles > 1 && 8 * tile >= count) break;
    float part[kHalfSubs / 2][4] = {};
#pragma unroll
    for (int k = 0; k < kHalfSubs; ++k) {
      const uint2 b =
          *reinterpret_cast<const uint2*>(a.q + ((base[k] + rows.b[tile]) * 32 + 8 * at.t));
      const uint32_t fragment[2] = {b.x, b.y};
      int c[2][4];
      if constexpr (Format::kHalves) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          MmaS8K16From(kMagicBits, c[h], level[k] + 2 * h, fragment[h]);
        }
      } else {
        MmaS8K32From(kMagicBits, c[0], level[k], fragment);
      }
      const ColumnScales of = LoadColumnScales<kGrouped, Format::kBias>(a, base[k], rows.c[tile]);
#pragma unroll
      for (int col = 0; col < 2; ++col) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int i = 2 * r + col;
          float share = __fmaf_rn(w[k].scale[r][0], __int_as_float(c[0][i]), less[k][r]);
          if constexpr (Format::kHalves) {
            share = __fmaf_rn(w[k].scale[r][1], __int_as_float(c[1][i]) - kMagic, share);
          }
          part[k / 2][i] =
              AddTerm<kType>(w[k], r, share, of.scale[col], of.sums[col], part[k / 2][i]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      acc[tile][i] = __fadd_rn(acc[tile][i], __fadd_rn(part[0][i], part[1][i]));
    }
  }
}

// Block (rows, panel): blocks that run at the same time share the panel in the
// L2 cache. kGrouped: the rows are those of experts.
template <DType kType, int kTiles, bool kGrouped>
__global__ void __launch_bounds__(32 * kInt8Warps, kInt8Blocks<kType, kTiles>)
    Int8Kernel(const __grid_constant__ Product p, const Int8Rows a) {
  using Format = Packed<kType>;
  if constexpr (kGrouped) GridWait();  // groups come from a kernel too
  const BlockRows block = RowsOfBlock(p.rows, blockIdx.x, 8 * kTiles);
  if (block.count <= 0) return;
  int panel = blockIdx.y;
  const ProductOutput& o = p.outputs[OutputOfPanel(p, &panel)];
  const TileLane at = ThisTileLane();
  const GroupReader<kType> reader = {WeightOf(o, block.expert) + panel * p.panel_bytes, p.lead,
                                     p.lead + p.cols / 32};
  const int warp = threadIdx.x / 32, groups = reader.Groups();
  const int begin = groups * warp / kInt8Warps, end = groups * (warp + 1) / kInt8Warps;
  typename Format::Raw first[kHalfSubs] = {}, second[kHalfSubs] = {};
  typename Format::Head next_head = {};
  if (begin < end) {
    reader.template Load<true>(begin, 0, at, first);
    next_head = Format::LoadHead(reader.Unit(begin), at);
  }
  if constexpr (!kGrouped) GridWait();  // weights do not depend on the kernels before
  TileRows<kTiles> rows;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    rows.b[i] = RowOf(p.rows, block, 8 * i + at.g).operand;
    for (int c = 0; c < 2; ++c) {
      rows.c[i][c] = kGrouped ? RowOf(p.rows, block, 8 * i + 2 * at.t + c).operand
                              : block.begin + min(8 * i + 2 * at.t, (block.count - 1) & ~1) + c;
    }
  }
  float acc[2][kTiles][4] = {};  // of first halves and of second ones
  for (int group = begin; group < end; ++group) {
    reader.template Load<true>(group, 1, at, second);
    const typename Format::Head head = next_head;
    AddHalf<kType, kTiles, 0, kGrouped>(reader, head, first, group, at, a, rows, block.count,
                                        acc[0]);
    if (group + 1 < end) {
      reader.template Load<true>(group + 1, 0, at, first);
      next_head = Format::LoadHead(reader.Unit(group + 1), at);
    }
    AddHalf<kType, kTiles, 1, kGrouped>(reader, head, second, group, at, a, rows, block.count,
                                        acc[1]);
  }
  auto& sums = StaticShared<WarpSums<8 * kTiles>>();
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[warp][8 * tile + 2 * at.t + i % 2][2 * at.g + i / 2] =
          __fadd_rn(acc[0][tile][i], acc[1][tile][i]);
    }
  }
  StoreSums<8 * kTiles>(sums, p, o, block, panel);
}

template <DType kType>
void LaunchInt8(Product p, const Int8Rows& a, Stream stream) {
  const int panels = NumberPanels(&p);
  const bool grouped = p.rows.groups != nullptr;
  int tiles = grouped ? kInt8GroupRows / 8 : p.rows.count <= 8 ? 1 : p.rows.count <= 16 ? 2 : 4;
  tiles = std::min(tiles, p.pass_rows / 8);
  const int blocks = RowBlocks(p.rows, 8 * tiles);
  if (panels == 0 || blocks == 0) return;
  const auto kernel = grouped             ? Int8Kernel<kType, kInt8GroupRows / 8, true>
                      : p.rows.count == 1 ? Int8RowKernel<kType>
                      : tiles == 1        ? Int8Kernel<kType, 1, false>
                      : tiles == 2        ? Int8Kernel<kType, 2, false>
                                          : Int8Kernel<kType, 4, false>;
  Launch(kernel, dim3(blocks, panels), dim3(32 * kInt8Warps), 0, stream, p, a);
}

}  // namespace shoal::cuda
