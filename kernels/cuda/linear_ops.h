// Products of packed weights with rows of activations: what linear.cc enqueues.
// As ops.h, plain C++ over device pointers.
#pragma once

#include <cstdint>

#include "kernels/activation.h"
#include "kernels/packed_matrix.h"

struct CUstream_st;

namespace shoal::cuda {

using Stream = CUstream_st*;

// ---- Rows of activations as operands (activations.cu)

// Rows of x, or a cheap function of them: LinearInput of kernels/backend.h on
// the device.
struct InputRows {
  enum class Kind { kPlain, kRmsNorm, kLayerNorm, kGated };
  Kind kind = Kind::kPlain;
  const float* x = nullptr;       // [rows, cols]; kGated: the gate
  const float* up = nullptr;      // kGated: like x
  const float* weight = nullptr;  // of the norms: [cols]
  int64_t stride = 0;             // floats between rows of x and up
  float eps = 0;
  int rows = 0, cols = 0;
  float scale = 1;                   // of the norms, as row_scale
  const float* row_scale = nullptr;  // [rows] or null
  Activation activation = Activation::kSwiGlu;
};

// Rows as int8 with a scale for each 32 columns. Within 32 columns the words of
// four bytes lie in the order 0 4 1 5 2 6 3 7: what a lane of an mma needs is
// one load of 8 bytes.
struct Int8Rows {
  int8_t* q = nullptr;         // [cols / 32][row_stride][32]; value = scale * q
  float* scale = nullptr;      // [cols / 32][row_stride]
  float* half_sums = nullptr;  // [cols / 32][row_stride][2]: scale * sum of
                               // columns 0..15, of 16..31
  int64_t row_stride = 0;      // rows between column blocks, even
};
// Addresses are multiples of 16. REQUIRES: cols is a multiple of 32.
void QuantizeRows(const InputRows& in, const Int8Rows& out, Stream stream);

// Rows as f16 or bf16, [cols / 32 rounded up][row_stride][32], zeros behind the
// last column. The 32 columns lie in the order 0..3 16..19 4..7 20..23 ..: what
// a lane of an mma needs is one load of 16 bytes. f16 rows are scaled by a
// power of two so that the largest value lies between 512 and 1024: f16 ends at
// 65504, and activations of large models go beyond it.
struct HalfRows {
  uint16_t* data = nullptr;
  float* scale = nullptr;  // [rows]: value = scale * data
  int64_t row_stride = 0;
};
void HalveRows(const InputRows& in, bool bf16, const HalfRows& out, Stream stream);

// Rows as plain f16, [rows, cols], with one scale for all of them. extremes:
// [rows] of workspace.
struct PlainHalves {
  uint16_t* data = nullptr;
  float* factor = nullptr;  // [1]: value = factor * kHalfWeightScale * data
};
void HalveAll(const InputRows& in, float* extremes, const PlainHalves& out, Stream stream);

// Rows as they are, f32, [rows, stride], zeros up to a multiple of 4 columns.
struct FloatRows {
  float* data = nullptr;
  int64_t stride = 0;  // a multiple of 4
};
void CopyRows(const InputRows& in, const FloatRows& out, Stream stream);

// Weights are multiplied with this on their way to f16: they are small, and f16
// loses bits below 2^-14.
inline constexpr float kHalfWeightScale = 16;

// Panels first .. first + panels - 1 of quantized weights as plain f16 times
// kHalfWeightScale, [rows, cols].
void UnpackHalves(const PackedMatrix& w, int first, int panels, uint16_t* out, Stream stream);

// ---- Products

// out[row, 0..rows) (+)= weight * operand row + bias
struct ProductOutput {
  const uint8_t* weight = nullptr;            // packed panels, aligned to 16
  const uint8_t* const* experts = nullptr;    // grouped products: such a pointer for each expert
  const float* bias = nullptr;                // [rows] or null
  const float* const* expert_bias = nullptr;  // grouped products: one for each expert, or null
  float* out = nullptr;
  int64_t stride = 0;
  int rows = 0;  // of the weight
  bool accumulate = false;
  int panel_begin = 0;  // for the launch functions
};
inline constexpr int kMaxOutputs = 4;  // of one launch
// Rows that meet weights read once.
inline constexpr int kInt8PassRows = 32;

// Rows of one expert: slots[begin .. begin + count).
struct RowGroup {
  int32_t expert, begin, count;
};

// Which operand row meets which weights and becomes which output row.
struct ProductRows {
  int count = 0;  // rows 0 .. count - 1 of operand and output
  // Grouped products: made by GroupByExpert. Output row = slot, operand row =
  // slot / slots_per_row.
  const RowGroup* groups = nullptr;
  const int32_t* group_count = nullptr;
  const int32_t* slots = nullptr;
  int groups_max = 0;
  int slots_per_row = 1;
};

struct Product {
  DType type = DType::kF32;
  int cols = 0;
  int lead = 0;  // PackedShape::lead
  int64_t panel_bytes = 0;
  ProductOutput outputs[kMaxOutputs];
  int output_count = 0;
  ProductRows rows;
  int pass_rows = kInt8PassRows;  // of Int8Product without groups: 8, 16 or 32
};

// Quantized types. A row's result does not depend on the rows beside it. Reads
// the weights once for each pass_rows rows (grouped products: 16).
void Int8Product(const Product& product, const Int8Rows& a, Stream stream);
// F32, F16, BF16: f32 multiply-adds, eight rows at a time, each as if it were
// alone.
void FloatProduct(const Product& product, const FloatRows& a, Stream stream);
// Tensor cores, f32 sums: every type but F32. BF16 weights take bf16 rows, the
// others f16 rows.
void HalfProduct(const Product& product, const HalfRows& a, Stream stream);

// Rows of a group that each product takes at most.
inline constexpr int kInt8GroupRows = 16;
inline constexpr int kFloatGroupRows = 8;
inline constexpr int kHalfGroupRows = 64;

// ---- Mixture of experts (experts.cu)

// Sorts the slots 0 .. count - 1 (slot = row * used + k, expert ids[slot],
// negative: none here) by expert, in order of slots, and cuts each expert's run
// into groups of at most group_rows.
struct Grouping {
  RowGroup* groups = nullptr;      // [GroupsMax]
  int32_t* group_count = nullptr;  // [1]
  int32_t* slots = nullptr;        // [count]
};
inline int GroupsMax(int slots, int experts, int group_rows) {
  return slots / group_rows + (slots < experts ? slots : experts);
}
void GroupByExpert(const int32_t* ids, int count, int experts, int group_rows, const Grouping& out,
                   Stream stream);

// Writes pointers to device memory as arguments of a kernel: in stream order,
// without a staging buffer.
void WritePointers(const uint8_t* const* host, int count, const uint8_t** device, Stream stream);

// out[row] = sum over k of weights[row * used + k] * slots[row * used + k], in
// order of k, without those whose id is negative.
void WeightedSum(const float* slots, int64_t slot_stride, const int32_t* ids, const float* weights,
                 int used, int rows, int cols, float* out, int64_t out_stride, Stream stream);

}  // namespace shoal::cuda
