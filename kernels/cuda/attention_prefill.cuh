// Attention of a prompt's rows on tensor cores, after FlashAttention-2: a block of threads holds a
// tile of query vectors in registers, walks over the K and V that they see, and rescales its sums
// as larger scores turn up.
//
// A tile is consecutive (row, head) pairs of one segment and one KV head, heads fastest, so that
// the heads of a group share every K and V that is loaded, however short the chunk of the prompt
// is.
//
// The context is cut into runs of a fixed number of positions. Within one the softmax is
// FlashAttention's; at its end the tile's open softmax is joined to that of the runs before. A
// block that walks over all of them keeps what is joined in the output's rows, which it alone
// writes, and {largest score, sum of p} in registers; where a block has one run (a short chunk over
// a long context, planner.h), its open softmax goes to the workspace and MergeRuns joins them, in
// the same order with the same roundings. So the bits are the same.
//
// Precision. Scores are exponents: an error of e in a score is a factor exp(e), so rounding where
// keys are large (Qwen2 has them) would be off by percents. K enters as it is: f16 values are
// operands, the int8 of q8_0 too, and their scales multiply the sums of 32 dims in f32. A query is
// two f16 numbers, high and low part, after a power of 2 has brought it near 2^10, so it is good to
// 2^-22. p and V only average: one f16 each, good to 2^-11. p carries a factor 2^14, so that p down
// to 2^-28 keeps all its bits.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/kv_block.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/prefill_params.cuh"
#include "kernels/cuda/warp.cuh"

namespace shoal::cuda {

inline constexpr float kHidden = -1e30f;  // the score of what is not seen; finite, see kNoScore
inline constexpr float kProbExponent = 14;

// kHeadDim: dims that the tile has room for; the head's own may be fewer, the others are zeros.
template <bool kIsQ8, int kHeadDim, int kWarpCount, int kTileTokens>
struct PrefillTraits {
  static constexpr bool kQ8 = kIsQ8;
  static constexpr int kDims = kHeadDim;
  static constexpr int kWarps = kWarpCount;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kVectors = 16 * kWarps;  // query vectors of a block
  static constexpr int kTokens = kTileTokens;   // of K and V at a time
  static constexpr int kSteps = kDims / 16;     // depth of an mma
  static constexpr int kParts = kDims / kPartDims;
  // Rows of an odd number of 16 bytes: eight of them, as ldmatrix reads, lie in different banks.
  static constexpr int kKStride = kTokens + 8;
  static constexpr int kVStride = kDims + 8;
  // More would not leave registers for the sums.
  static constexpr bool kQueryInRegisters = kDims <= 128;

  static constexpr int64_t kKBytes = 2 * kDims * kKStride;
  static constexpr int64_t kVBytes = 2 * kTokens * kVStride;
  static constexpr int64_t kScaleBytes = kQ8 ? 4 * kParts * kTokens : 0;
  static constexpr int64_t kQueryBytes =
      kQueryInRegisters ? 0 : int64_t{2 * 16} * kSteps * kThreads;
  static constexpr int64_t kSharedBytes = kKBytes + kVBytes + kScaleBytes + kQueryBytes;
};

// The block's shared memory.
template <typename T>
struct TileMemory {
  half* k;         // [kDims][kKStride]: tokens side by side, as in the cache
  half* v;         // [kTokens][kVStride]
  float* k_scale;  // [kParts][kTokens]
  uint4* q;        // [kSteps][2][kThreads], where the registers do not hold it

  __device__ explicit TileMemory(unsigned char* shared)
      : k(reinterpret_cast<half*>(shared)),
        v(reinterpret_cast<half*>(shared + T::kKBytes)),
        k_scale(reinterpret_cast<float*>(shared + T::kKBytes + T::kVBytes)),
        q(reinterpret_cast<uint4*>(shared + T::kKBytes + T::kVBytes + T::kScaleBytes)) {}
};

// What a block works on.
struct PrefillView {
  const int32_t* table;
  int kv_head;
  int begin, end;  // positions that any of its vectors sees
  int dims;
};

__device__ inline uint32_t PackHalves(float low, float high) {
  const half2 both = __floats2half2_rn(low, high);
  return static_cast<uint32_t>(__half_as_ushort(__low2half(both))) |
         static_cast<uint32_t>(__half_as_ushort(__high2half(both))) << 16;
}

__device__ inline half2 AsHalf2(uint32_t bits) {
  return __halves2half2(__ushort_as_half(static_cast<uint16_t>(bits & 0xffff)),
                        __ushort_as_half(static_cast<uint16_t>(bits >> 16)));
}

__device__ inline uint32_t Bits(half2 v) {
  return static_cast<uint32_t>(__half_as_ushort(__low2half(v))) |
         static_cast<uint32_t>(__half_as_ushort(__high2half(v))) << 16;
}

// Four int8 as four halves, exactly: byte x + 128 below the exponent of 1024 reads 1152 + x.
__device__ inline uint2 BytesToHalves(uint32_t bytes) {
  const uint32_t biased = bytes ^ 0x80808080u;
  const half2 offset = AsHalf2(0x64806480u);  // 1152
  return make_uint2(Bits(__hsub2(AsHalf2(__byte_perm(biased, 0x64646464u, 0x5150)), offset)),
                    Bits(__hsub2(AsHalf2(__byte_perm(biased, 0x64646464u, 0x5352)), offset)));
}

// ---- K and V of tokens [first, first + kTokens) to shared memory. Sums and queries hold nearly
// all registers meanwhile, so loops that load into registers are not unrolled: a thread has one or
// two turns of them for each KV block. Blocks that nobody sees are not read: what K holds there is
// hidden by the mask, V gets zeros, for p = 0 times garbage is not 0.

template <typename T>
__device__ void LoadKeys(const KvView& kv, const PrefillView& view, int first,
                         const TileMemory<T>& tile) {
#pragma unroll 1
  for (int b = 0; b < T::kTokens / kBlockTokens; ++b) {
    const int pos = first + b * kBlockTokens;
    if (pos + kBlockTokens <= view.begin || pos >= view.end) continue;
    const uint8_t* k = kv.K(view.table[pos / kBlockTokens], view.kv_head);
    half* to = tile.k + b * kBlockTokens;
    if constexpr (T::kQ8) {
      const int parts = (view.dims + kPartDims - 1) / kPartDims;
#pragma unroll 1
      for (int i = threadIdx.x; i < parts * kBlockTokens; i += T::kThreads) {
        tile.k_scale[i / kBlockTokens * T::kTokens + b * kBlockTokens + i % kBlockTokens] =
            HalfBits(LoadAs<uint16_t>(k + 2 * i));
      }
      k += Q8Kv::ScaleBytes(view.dims);
#pragma unroll 1
      for (int d = threadIdx.x; d < view.dims; d += T::kThreads) {
        const uint4 bytes = LoadAs<uint4>(k + d * kBlockTokens);
        const uint2 x = BytesToHalves(bytes.x), y = BytesToHalves(bytes.y);
        const uint2 z = BytesToHalves(bytes.z), w = BytesToHalves(bytes.w);
        uint4* row = reinterpret_cast<uint4*>(to + d * T::kKStride);
        row[0] = make_uint4(x.x, x.y, y.x, y.y);
        row[1] = make_uint4(z.x, z.y, w.x, w.y);
      }
    } else {
      for (int i = threadIdx.x; i < 2 * view.dims; i += T::kThreads) {
        CpAsync16(to + i / 2 * T::kKStride + i % 2 * 8, k + 16 * i);
      }
    }
  }
}

// Any even number of dims, two at a time.
template <typename T>
__device__ void LoadValuePairs(const uint8_t* v, int dims, int tokens, half* to) {
  const int pairs = dims / 2;
#pragma unroll 1
  for (int i = threadIdx.x; i < kBlockTokens * pairs; i += T::kThreads) {
    const int token = i / pairs, dim = i % pairs * 2;
    float2 x = make_float2(0, 0);
    if (token < tokens) {
      if constexpr (T::kQ8) {
        x = Q8Kv::LoadPair(v, dims, token, dim);
      } else {
        x = F16Kv::LoadPair(v, dims, token, dim);
      }
    }
    *reinterpret_cast<uint32_t*>(to + token * T::kVStride + dim) =
        PackHalves(fminf(fmaxf(x.x, -65504.0f), 65504.0f), fminf(fmaxf(x.y, -65504.0f), 65504.0f));
  }
}

// 16 bytes of ints at a time, when dims is a multiple of 16.
template <typename T>
__device__ void LoadValuesQ8(const uint8_t* v, int dims, int tokens, half* to) {
  const int pieces = dims / 16;
#pragma unroll 1
  for (int i = threadIdx.x; i < kBlockTokens * pieces; i += T::kThreads) {
    const int token = i / pieces, dim = i % pieces * 16;
    uint4* row = reinterpret_cast<uint4*>(to + token * T::kVStride + dim);
    if (token >= tokens) {
      row[0] = row[1] = make_uint4(0, 0, 0, 0);
      continue;
    }
    // A scale beyond what 127 of it may be in f16 saturates, as the f16 cache does.
    const half2 scale = __float2half2_rn(fminf(Q8Kv::Scale(v, dim, token), 65504.0f / 127));
    const uint4 bytes = LoadAs<uint4>(v + Q8Kv::ScaleBytes(dims) + token * dims + dim);
    const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
    uint32_t out[8];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint2 ints = BytesToHalves(words[j]);
      out[2 * j] = Bits(__hmul2(AsHalf2(ints.x), scale));
      out[2 * j + 1] = Bits(__hmul2(AsHalf2(ints.y), scale));
    }
    row[0] = make_uint4(out[0], out[1], out[2], out[3]);
    row[1] = make_uint4(out[4], out[5], out[6], out[7]);
  }
}

template <typename T>
__device__ void LoadValues(const KvView& kv, const PrefillView& view, int first,
                           const TileMemory<T>& tile) {
  const int dims = view.dims;
#pragma unroll 1
  for (int b = 0; b < T::kTokens / kBlockTokens; ++b) {
    const int pos = first + b * kBlockTokens;
    const bool seen = pos + kBlockTokens > view.begin && pos < view.end;
    const int tokens = seen ? min(view.end - pos, kBlockTokens) : 0;
    // A block outside is not looked up; its address is not read either.
    const uint8_t* v = seen ? kv.V(view.table[pos / kBlockTokens], view.kv_head) : kv.base;
    half* to = tile.v + b * kBlockTokens * T::kVStride;
    if (T::kQ8 ? dims % 16 != 0 : dims % 8 != 0) {
      LoadValuePairs<T>(v, dims, tokens, to);
    } else if constexpr (T::kQ8) {
      LoadValuesQ8<T>(v, dims, tokens, to);
    } else {
      const int pieces = dims / 8;
      for (int i = threadIdx.x; i < kBlockTokens * pieces; i += T::kThreads) {
        const int token = i / pieces, piece = i % pieces;
        CpAsync16(to + token * T::kVStride + piece * 8, v + 16 * (token < tokens ? i : 0),
                  token < tokens);
      }
    }
  }
}

// ---- One warp: 16 query vectors. A lane 4 g + t holds of rows g and g + 8 the columns 2t, 2t + 1
// of every 8.

// The queries as operands of an mma: [step][high, low][register].
template <typename T>
struct QueryOperand {
  uint32_t in_registers[T::kQueryInRegisters ? T::kSteps : 1][2][4];
  uint4* shared;  // this thread's

  __device__ void Put(int step, int part, const uint32_t (&r)[4]) {
    if constexpr (T::kQueryInRegisters) {
#pragma unroll
      for (int i = 0; i < 4; ++i) in_registers[step][part][i] = r[i];
    } else {
      shared[(step * 2 + part) * T::kThreads] = make_uint4(r[0], r[1], r[2], r[3]);
    }
  }
  __device__ void Get(int step, int part, uint32_t (&r)[4]) const {
    if constexpr (T::kQueryInRegisters) {
#pragma unroll
      for (int i = 0; i < 4; ++i) r[i] = in_registers[step][part][i];
    } else {
      const uint4 v = shared[(step * 2 + part) * T::kThreads];
      r[0] = v.x, r[1] = v.y, r[2] = v.z, r[3] = v.w;
    }
  }
};

// Two rows of a lane.
struct RowPair {
  const float* q[2];
  float scale[2];  // of the sums of products with the operand, to exponents of 2
  float sink[2];   // an exponent of 2
  int pos[2];
};

// The power of 2 that brings x (the largest magnitude) to 2^10 .. 2^11, so that the low part of a
// value stays clear of f16's smallest numbers.
__device__ inline float NearThousand(float x) {
  const int exponent = min(max(static_cast<int>(__float_as_uint(x) >> 23), 30), 230);
  return __uint_as_float(static_cast<uint32_t>(264 - exponent) << 23);
}

template <typename T>
__device__ void LoadQueryOperand(RowPair& rows, int dims, float scale_log2,
                                 QueryOperand<T>& operand) {
  const int column = threadIdx.x % 4 * 2;
  float factor[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float largest = 0;
    for (int d = column; d < dims; d += 8) {
      largest = fmaxf(largest, fmaxf(fabsf(rows.q[r][d]), fabsf(rows.q[r][d + 1])));
    }
    largest = fmaxf(largest, __shfl_xor_sync(kWholeWarp, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(kWholeWarp, largest, 2));
    factor[r] = NearThousand(largest);
    rows.scale[r] = scale_log2 / factor[r];
  }
#pragma unroll
  for (int step = 0; step < T::kSteps; ++step) {
    uint32_t high[4], low[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // rows g, g + 8, then the same 8 columns on
      const int r = i % 2, d = step * 16 + i / 2 * 8 + column;
      const float x = d < dims ? rows.q[r][d] * factor[r] : 0;
      const float y = d < dims ? rows.q[r][d + 1] * factor[r] : 0;
      high[i] = PackHalves(x, y);
      low[i] = PackHalves(x - HalfBits(high[i] & 0xffff), y - HalfBits(high[i] >> 16));
    }
    operand.Put(step, 0, high);
    operand.Put(step, 1, low);
  }
}

// s[n][..]: scores of columns 8n .. 8n + 7, before the scale of their row.
template <typename T>
__device__ void Scores(const QueryOperand<T>& q, const TileMemory<T>& tile,
                       float (&s)[T::kTokens / 8][4]) {
  const int lane = threadIdx.x % 32;
  // Lane l points ldmatrix at row l % 16 and, from lane 16 on, 8 columns further.
  const half* k = tile.k + lane % 16 * T::kKStride + lane / 16 * 8;
#pragma unroll
  for (int n = 0; n < T::kTokens / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[n][i] = 0;
  }
  constexpr int kStepsAtOnce = T::kQ8 ? kPartDims / 16 : 1;
  [[maybe_unused]] constexpr int kUnrolled = T::kQueryInRegisters ? T::kSteps : 1;
#pragma unroll kUnrolled
  for (int step = 0; step < T::kSteps; step += kStepsAtOnce) {
    uint32_t high[kStepsAtOnce][4], low[kStepsAtOnce][4];
#pragma unroll
    for (int i = 0; i < kStepsAtOnce; ++i) {
      q.Get(step + i, 0, high[i]);
      q.Get(step + i, 1, low[i]);
    }
#pragma unroll
    for (int n = 0; n < T::kTokens / 8; n += 2) {
      float part[2][4] = {};
#pragma unroll
      for (int i = 0; i < kStepsAtOnce; ++i) {
        uint32_t b[4];
        LdMatrixX4Trans(b, k + (step + i) * 16 * T::kKStride + n * 8);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float* const c = T::kQ8 ? part[h] : s[n + h];
          MmaF16(c, high[i], b + 2 * h);
          MmaF16(c, low[i], b + 2 * h);
        }
      }
      if constexpr (T::kQ8) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float2 d = *reinterpret_cast<const float2*>(tile.k_scale + step / 2 * T::kTokens +
                                                            (n + h) * 8 + lane % 4 * 2);
#pragma unroll
          for (int i = 0; i < 4; ++i) s[n + h][i] += part[h][i] * (i % 2 == 0 ? d.x : d.y);
        }
      }
    }
  }
}

// The running softmax of a lane's two rows.
template <typename T>
struct RowState {
  float largest[2] = {kHidden, kHidden};
  float sum[2] = {0, 0};  // of this lane's columns
  float acc[T::kDims / 8][4] = {};
};

// s becomes p; what the rows have gathered so far is rescaled. `first`: position of the first
// column.
template <typename T>
__device__ void Softmax(const RowPair& rows, const HeadMap& heads, int first,
                        float (&s)[T::kTokens / 8][4], RowState<T>& state) {
  const int column = first + static_cast<int>(threadIdx.x) % 4 * 2;
  float keep[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int last_seen = rows.pos[r];
    const int first_seen = heads.FirstVisible(last_seen);
    const bool all_seen = first >= first_seen && first + T::kTokens - 1 <= last_seen;
    float largest = kHidden;
#pragma unroll
    for (int n = 0; n < T::kTokens / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int pos = column + n * 8 + i;
        const bool seen = all_seen || (pos >= first_seen && pos <= last_seen);
        float& x = s[n][2 * r + i];
        x = seen ? x * rows.scale[r] : kHidden;
        largest = fmaxf(largest, x);
      }
    }
    largest = fmaxf(largest, __shfl_xor_sync(kWholeWarp, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(kWholeWarp, largest, 2));
    largest = fmaxf(largest, state.largest[r]);
    // Rows that have seen nothing yet keep sums of 0: hidden columns weigh nothing against any
    // score.
    keep[r] = Exp2(state.largest[r] - largest);
    state.largest[r] = largest;
    const float base = largest <= kHidden ? 0 : largest - kProbExponent;
    float sum = 0;
#pragma unroll
    for (int n = 0; n < T::kTokens / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& x = s[n][2 * r + i];
        x = Exp2(x - base);
        sum += x;
      }
    }
    state.sum[r] = state.sum[r] * keep[r] + sum;
  }
#pragma unroll
  for (int n = 0; n < T::kDims / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) state.acc[n][i] *= keep[i / 2];
  }
}

// acc += p * V
template <typename T>
__device__ void AddValues(const float (&p)[T::kTokens / 8][4], const TileMemory<T>& tile,
                          RowState<T>& state) {
  const int lane = threadIdx.x % 32;
  const half* v = tile.v + lane % 16 * T::kVStride + lane / 16 * 8;
#pragma unroll
  for (int step = 0; step < T::kTokens / 16; ++step) {
    // Two neighbouring 16 x 8 results are, as they lie, the 16 x 16 operand of the next product.
    uint32_t a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i] = PackHalves(p[2 * step + i / 2][i % 2 * 2], p[2 * step + i / 2][i % 2 * 2 + 1]);
    }
#pragma unroll
    for (int n = 0; n < T::kDims / 8; n += 2) {
      uint32_t b[4];
      LdMatrixX4Trans(b, v + step * 16 * T::kVStride + n * 8);
      MmaF16(state.acc[n], a, b);
      MmaF16(state.acc[n + 1], a, b + 2);
    }
  }
}

// A softmax that is still open: the largest score, as an exponent of 2, and the sum of p, which
// with the sum of p * v carries a factor 2^kProbExponent.
struct OpenSoftmax {
  float largest = kHidden;
  float sum = 0;
  __device__ bool saw_nothing() const { return largest <= kHidden; }
};
struct JoinWeights {
  float keep, add;
};

// `whole` goes on with `run`, which saw something. Each rounding is written out: two kernels do
// this and the next, and must give the same bits.
__device__ inline JoinWeights Join(OpenSoftmax& whole, const OpenSoftmax& run) {
  const float largest = fmaxf(whole.largest, run.largest);
  const JoinWeights w = {Exp2(__fsub_rn(whole.largest, largest)),
                         Exp2(__fsub_rn(run.largest, largest))};
  whole = {largest, __fmaf_rn(run.sum, w.add, __fmul_rn(whole.sum, w.keep))};
  return w;
}
// Of a sum of p * v; what saw nothing yet has sums of 0.
__device__ inline float Joined(float whole, float run, const JoinWeights& w) {
  return __fmaf_rn(run, w.add, __fmul_rn(whole, w.keep));
}
// What the sums of p * v are multiplied by at the end. A token sees itself: at least
// 2^kProbExponent.
__device__ inline float LastFactor(const OpenSoftmax& whole, float sink) {
  return __frcp_rn(
      __fadd_rn(whole.sum, Exp2(__fadd_rn(__fsub_rn(sink, whole.largest), kProbExponent))));
}

// What a lane's two rows have seen in the run that ends here.
template <typename T>
__device__ OpenSoftmax RunOf(const RowState<T>& state, int r) {
  float sum = state.sum[r];
  sum += __shfl_xor_sync(kWholeWarp, sum, 1);
  sum += __shfl_xor_sync(kWholeWarp, sum, 2);
  return {state.largest[r], sum};
}

// A run joins what the rows have gathered, in the output; `last`: which is then finished.
template <typename T>
__device__ void JoinRows(const RowState<T>& state, const RowPair& rows, float* const (&out)[2],
                         int dims, bool last, OpenSoftmax (&whole)[2]) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const OpenSoftmax run = RunOf(state, r);
    const bool begun = !whole[r].saw_nothing(), joins = !run.saw_nothing();
    if (out[r] == nullptr || !(joins || last)) continue;
    JoinWeights weights = {1, 0};
    if (joins) weights = Join(whole[r], run);
    const float factor = last ? LastFactor(whole[r], rows.sink[r]) : 1;
#pragma unroll
    for (int n = 0; n < T::kDims / 8; ++n) {
      const int d = n * 8 + column;
      if (d >= dims) break;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float x = begun ? out[r][d + i] : 0;
        if (joins) x = Joined(x, state.acc[n][2 * r + i], weights);
        out[r][d + i] = __fmul_rn(x, factor);
      }
    }
  }
}

// A run by itself, to the workspace: vectors [first, first + 16) of the warp stand at acc and
// state.
template <typename T>
__device__ void WriteRun(const RowState<T>& state, float* const (&out)[2], int dims, int acc_stride,
                         float* acc, float2* open) {
  const int column = threadIdx.x % 4 * 2, row = threadIdx.x % 32 / 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const OpenSoftmax run = RunOf(state, r);
    if (out[r] == nullptr) continue;
    const int vector = row + 8 * r;
    if (threadIdx.x % 4 == 0) open[vector] = make_float2(run.largest, run.sum);
#pragma unroll
    for (int n = 0; n < T::kDims / 8; ++n) {
      const int d = n * 8 + column;
      if (d >= dims) break;
      *reinterpret_cast<float2*>(acc + static_cast<int64_t>(vector) * acc_stride + d) =
          make_float2(state.acc[n][2 * r], state.acc[n][2 * r + 1]);
    }
  }
}

// Grid: items, KV heads. While a product runs, the operand of the next one is on its way: V during
// the scores, the next K during the sums (f16; int8 passes through registers and waits).
template <typename T>
__global__ void __launch_bounds__(T::kThreads) AttendTile(PrefillParams p) {
  GridWait();
  const PrefillItem item = p.items[blockIdx.x];
  const SegmentPlace segment = p.segments[item.segment];
  PrefillView view;
  view.kv_head = static_cast<int>(blockIdx.y);
  const int first_head = p.heads.First(view.kv_head);
  const int heads = p.heads.Last(view.kv_head) - first_head;
  const int count = segment.rows * max(heads, 0);  // query vectors of the segment
  const int first_vector = item.tile * T::kVectors;
  if (first_vector >= count) return;
  view.table = p.tables + segment.table;
  view.dims = p.kv.head_dim;
  view.begin = p.heads.FirstVisible(segment.pos + first_vector / heads);
  view.end = segment.pos + (min(first_vector + T::kVectors, count) - 1) / heads + 1;
  if (item.run != kWholeContext) {
    view.begin = max(view.begin, item.run * p.run_tokens);
    view.end = min(view.end, (item.run + 1) * p.run_tokens);
    if (view.begin >= view.end) return;
  }

  RowPair rows;
  float* out[2];
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int vector = first_vector + static_cast<int>(threadIdx.x) / 32 * 16 + lane / 4 + 8 * r;
    const int known = min(vector, count - 1);  // lanes beyond the last one repeat it
    const int row = segment.row + known / heads;
    const int64_t head = static_cast<int64_t>(first_head + known % heads) * view.dims;
    rows.sink[r] = p.heads.SinkLog2(first_head + known % heads);
    rows.q[r] = p.q + row * p.q_stride + head;
    rows.pos[r] = segment.pos + known / heads;
    out[r] = vector < count ? p.out + row * p.out_stride + head : nullptr;
  }
  TileMemory<T> tile(DynamicShared());
  // Dims that the head lacks: no load writes them, and garbage times 0 is not 0.
  for (int i = view.dims * T::kKStride + threadIdx.x; i < T::kDims * T::kKStride;
       i += T::kThreads) {
    tile.k[i] = __float2half(0);
  }
  if constexpr (T::kQ8) {
    for (int i = threadIdx.x; i < T::kParts * T::kTokens; i += T::kThreads) tile.k_scale[i] = 0;
    __syncthreads();  // LoadKeys writes scales too
  }
  int first = view.begin / T::kTokens * T::kTokens;
  LoadKeys(p.kv, view, first, tile);
  CpAsyncCommit();
  QueryOperand<T> q;
  q.shared = tile.q + threadIdx.x;
  LoadQueryOperand(rows, view.dims, p.scale_log2, q);
  OpenSoftmax whole[2];
  int run_end = min(view.end, (view.begin / p.run_tokens + 1) * p.run_tokens);
  RowState<T> state;
  for (; first < view.end; first += T::kTokens) {
    float s[T::kTokens / 8][4];
    LoadValues(p.kv, view, first, tile);
    CpAsyncCommit();
    CpAsyncWait<1>();
    __syncthreads();
    Scores(q, tile, s);
    __syncthreads();  // all have read K
    if (first + T::kTokens < view.end) LoadKeys(p.kv, view, first + T::kTokens, tile);
    CpAsyncCommit();
    Softmax(rows, p.heads, first, s, state);
    CpAsyncWait<1>();
    __syncthreads();
    AddValues(s, tile, state);
    if (item.run == kWholeContext && first + T::kTokens >= run_end) {
      JoinRows(state, rows, out, view.dims, run_end == view.end, whole);
      run_end = min(view.end, run_end + p.run_tokens);
      state = RowState<T>();
    }
    __syncthreads();  // all have read V
  }
  if (item.run == kWholeContext) return;
  const int64_t at =
      ((static_cast<int64_t>(blockIdx.x) - p.whole_tiles) * p.kv.kv_heads + view.kv_head) *
          T::kVectors +
      static_cast<int>(threadIdx.x) / 32 * 16;
  WriteRun(state, out, view.dims, p.acc_stride, p.acc + at * p.acc_stride, p.state + at);
}

inline constexpr int kMergeWarps = 4;

// Grid: merges, KV heads, vectors of a tile by kMergeWarps: a warp has one vector, its lanes the
// dims. Runs that the row does not see were not written.
static __global__ void __launch_bounds__(32 * kMergeWarps) MergeRuns(PrefillMergeParams params) {
  GridWait();
  const PrefillParams& p = params.prefill;
  const PrefillMerge merge = params.merges[blockIdx.x];
  const SegmentPlace segment = p.segments[merge.segment];
  const int kv_head = static_cast<int>(blockIdx.y);
  const int first_head = p.heads.First(kv_head);
  const int heads = p.heads.Last(kv_head) - first_head;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int local = static_cast<int>(blockIdx.z) * kMergeWarps + static_cast<int>(threadIdx.x) / 32;
  const int vector = merge.tile * params.tile + local;
  if (local >= params.tile || vector >= segment.rows * max(heads, 0)) return;
  const int pos = segment.pos + vector / heads, head = first_head + vector % heads;
  const int64_t in_tiles = static_cast<int64_t>(kv_head) * params.tile + local;
  const int64_t stride = static_cast<int64_t>(p.kv.kv_heads) * params.tile;  // between runs
  const int begin = max(merge.run_begin, p.heads.FirstVisible(pos) / p.run_tokens);
  const int end = min(merge.run_end, pos / p.run_tokens + 1);
  OpenSoftmax before;
  if (merge.run_begin > 0) {
    const float2 carried = params.carried[in_tiles];
    before = {carried.x, carried.y};
  }
  float* out = p.out + (segment.row + vector / heads) * p.out_stride +
               static_cast<int64_t>(head) * p.kv.head_dim;
  const int64_t first = (merge.first_item + begin - merge.run_begin) * stride + in_tiles;
  OpenSoftmax whole = before;
  for (int dim = 4 * lane; dim < p.kv.head_dim; dim += 128) {
    const int dims = min(p.kv.head_dim - dim, 4);
    whole = before;
    float acc[4] = {};
    for (int i = 0; i < dims && !before.saw_nothing(); ++i) acc[i] = out[dim + i];
#pragma unroll 4
    for (int i = 0; i < end - begin; ++i) {
      const int64_t at = first + i * stride;
      const float2 open = p.state[at];
      const float4 v = *reinterpret_cast<const float4*>(p.acc + at * p.acc_stride + dim);
      const OpenSoftmax run = {open.x, open.y};
      if (run.saw_nothing()) continue;
      const JoinWeights w = Join(whole, run);
      acc[0] = Joined(acc[0], v.x, w);
      acc[1] = Joined(acc[1], v.y, w);
      acc[2] = Joined(acc[2], v.z, w);
      acc[3] = Joined(acc[3], v.w, w);
    }
    const float factor = merge.last != 0 ? LastFactor(whole, p.heads.SinkLog2(head)) : 1;
    for (int i = 0; i < dims; ++i) out[dim + i] = __fmul_rn(acc[i], factor);
  }
  if (merge.last == 0 && lane == 0) params.carry[in_tiles] = make_float2(whole.largest, whole.sum);
}

}  // namespace shoal::cuda
