// What the CUDA backend calls: each function enqueues kernels on a stream and returns. Plain C++,
// so the backend needs no CUDA compiler. Every pointer is device memory unless said otherwise;
// matrices are row-major with the stride given in elements.
//
// Errors of a launch are left for cudaGetLastError().
#pragma once

#include <cstdint>

struct CUstream_st;

namespace shoal::cuda {

using Stream = CUstream_st*;

// ---- Rows of activations as operands of products (activations.cu)

// Rows of x, or a cheap function of them: LinearInput of kernels/backend.h on the device.
struct InputRows {
  enum class Kind { kPlain, kRmsNorm, kSwiGlu };
  Kind kind = Kind::kPlain;
  const float* x = nullptr;         // [rows, cols], 16-byte aligned; kSwiGlu: the gate
  const float* up = nullptr;        // kSwiGlu: like x; the row is silu(x) * up
  const float* weight = nullptr;    // kRmsNorm: [cols]
  const int32_t* source = nullptr;  // operand row i is made of row source[i] of x; null: of row i
  int64_t stride = 0;               // floats between rows of x and up, a multiple of 4
  float eps = 0;
  int rows = 0, cols = 0;
};

// Rows as int8 with a scale for each 32 columns. Within 32 columns the words of four bytes lie in
// the order 0 4 1 5 2 6 3 7: what a lane of an mma needs is one load of 8 bytes.
struct Int8Rows {
  int8_t* q = nullptr;     // [cols / 32][row_stride][32]; value = scale * q
  float* scale = nullptr;  // [cols / 32][row_stride]
  float* half_sums =
      nullptr;             // [cols / 32][row_stride][2]: scale * sum of columns 0..15, of 16..31
  int64_t row_stride = 0;  // rows between column blocks, even
};

// REQUIRES: cols is a multiple of 32.
void QuantizeRows(const InputRows& in, const Int8Rows& out, Stream stream);

}  // namespace shoal::cuda
