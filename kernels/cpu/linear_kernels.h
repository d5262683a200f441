// The tables of functions that multiply packed panels with rows of activations, one table per
// instruction set.
//
// Internal to kernels/cpu. Every function is plain, keeps no state and may run on any number of
// threads at once. A "tile" is the result for one panel: float [m][16], row i in tile[16 i .. 16 i
// + 15], overwritten.
#pragma once

#include <cstdint>

#include "kernels/activation.h"
#include "kernels/packed_matrix.h"

namespace shoal {

enum class CpuLevel;  // features.h, whose library code is not for files of one instruction set

// 32 columns of an activation row as int8: one cache line, so a block costs one miss at most.
struct alignas(64) Q8Block {
  int8_t q[32];  // value = scale * q, |q| <= 127
  float scale;
  float sum;          // scale * sum of q
  float half_sum[2];  // scale * sum of q[0..16), of q[16..32)
  int32_t neg_sum;    // -(sum of q); start values of dot products whose weights carry an offset
  int32_t neg_half_sum[2];  // -(sum of q[0..16)), -(sum of q[16..32))
  int32_t unused;
};
static_assert(sizeof(Q8Block) == 64);

// The range of a weight code, which decides how many products fit in 16 bits where that matters.
enum class CodeKind { kU2, kU3, kU4, kU5, kU6, kS8 };

inline constexpr int kMaxTileRows = 64;  // most activation rows of one call
inline constexpr int kFewRows = 8;       // that many are multiplied while a panel is read once

// rows[i]: [cols / 32] blocks, 1 <= m <= kMaxTileRows.
using Int8Product = void (*)(const PackedShape& shape, const uint8_t* panel,
                             const Q8Block* const* rows, int m, float* tile);
// rows[i]: [cols] floats, zero up to a multiple of 2. Plain f32 sums in column order (F16: even and
// odd columns apart).
using F32Product = void (*)(const PackedShape& shape, const uint8_t* panel,
                            const float* const* rows, int m, float* tile);

// Prefill with bf16 tiles. The operand of R rows is [cols / 32 rounded up][row_stride][32] bf16:
// rows r .. r + 15 of one column block are one A tile, from any r.
struct Bf16Operand {
  const uint16_t* data = nullptr;  // at the first row to multiply
  int64_t row_stride = 0;          // rows between column blocks
};
// Most panels of one call. Their unpacked block (128 KiB) and sums (512 KiB for all rows) stay in
// L2; the activations come from further away, and 16 panels make 256 products of each that is read.
inline constexpr int kBf16Panels = 16;
inline constexpr int kBf16Rows = 512;       // most rows of one call
inline constexpr int kBf16BlockCols = 256;  // columns unpacked at a time
// Bytes of scratch one thread needs: unpacked weights.
inline constexpr int64_t kBf16ScratchBytes =
    int64_t{kBf16Panels} * kPanelRows * kBf16BlockCols * sizeof(uint16_t);
// Where a product goes: element (i, j) gets bias[j], is multiplied by scale[i], gets what is there
// already when it accumulates, and becomes out[row[i] * stride + j].
struct Bf16Result {
  float* out = nullptr;
  int64_t stride = 0;
  int64_t cols = 0;              // j < cols, at most 16 for each panel
  const int32_t* row = nullptr;  // [m] or null: i
  const float* scale = nullptr;  // [m] or null: 1
  const float* bias = nullptr;   // [cols] or null: 0
  bool accumulate = false;
};
// Reads rows up to a multiple of 32. `sums` is scratch of Bf16SumsBytes(m), aligned to 64 bytes.
inline constexpr int64_t Bf16SumsBytes(int64_t m) {
  return (m + 31) / 32 * 32 * kBf16Panels * kPanelRows * static_cast<int64_t>(sizeof(float));
}
using Bf16Product = void (*)(const PackedShape& shape, const uint8_t* panels_data, int panels,
                             const Bf16Operand& a, int m, uint8_t* scratch, float* sums,
                             const Bf16Result& result);

// Gate and up of an FFN: element (i, j) = activation(gate + gate_bias[j], up + up_bias[j]) becomes
// column j of row i of a bf16 operand, which is zero behind its last column up to a multiple of 32.
struct Bf16Gated {
  uint16_t* out = nullptr;           // the operand at the first row
  int64_t row_stride = 0;            // of the operand
  int64_t begin = 0;                 // column of the first panel
  int64_t cols = 0;                  // j < cols, all columns of the operand
  const float* gate_bias = nullptr;  // [cols] or null: 0
  const float* up_bias = nullptr;
  Activation activation = Activation::kSwiGlu;
};
inline constexpr int kBf16GatedPanels = kBf16Panels / 2;  // of either matrix in one call
struct Bf16Matrix {
  const PackedShape& shape;
  const uint8_t* panels;
};
using Bf16GatedProduct = void (*)(const Bf16Matrix& gate, const Bf16Matrix& up, int panels,
                                  const Bf16Operand& a, int m, uint8_t* scratch, float* sums,
                                  const Bf16Gated& result);

struct LinearKernels {
  Int8Product int8[kNumDTypes];  // null for the float types
  int int8_rows;                 // kFewRows, or more that share what a call unpacks
  F32Product f32[kNumDTypes];    // null for the quantized types
  Bf16Product bf16;              // null: no such unit here; int8 (f32 for BF16 weights) serves
  Bf16GatedProduct bf16_gated;   // null where bf16 is

  void (*quantize)(const float* x, int64_t blocks, Q8Block* out);  // x [blocks * 32]
  void (*to_bf16)(const float* x, int64_t n, uint16_t* out);
  float (*sum_squares)(const float* x, int64_t n);
  void (*scale)(const float* x, const float* weight, float factor, int64_t n, float* out);
  // Of each Activation: out = activation(gate, up).
  void (*gated[kNumActivations])(const float* gate, const float* up, int64_t n, float* out);

  // For measuring: `loops` rounds of independent products in registers; return the operations done
  // (multiplications and additions counted apart). Null where the level has no such unit.
  int64_t (*int8_peak)(int64_t loops);
  int64_t (*f32_peak)(int64_t loops);
  int64_t (*bf16_peak)(int64_t loops);
};

// The table of a level that this machine has.
LinearKernels LinearKernelsOf(CpuLevel level);

const LinearKernels& ScalarLinearKernels();
#if defined(__x86_64__)
const LinearKernels& Avx2LinearKernels();
const LinearKernels& AvxVnniLinearKernels();
const LinearKernels& Avx512LinearKernels();
// Puts the tile product into a copy of the Avx512 table.
void AddAmx(LinearKernels* table);
#elif defined(__aarch64__)
const LinearKernels& NeonLinearKernels();
const LinearKernels& I8mmLinearKernels();
#endif

}  // namespace shoal
