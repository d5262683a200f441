// Rows of activations in the forms that the products read, and their making: norm or SwiGLU fused
// with the conversion.
//
// Internal to kernels/cpu.
#pragma once

#include <cstdint>

#include "kernels/backend.h"
#include "kernels/cpu/linear_kernels.h"

namespace shoal {

// Which form a product reads.
enum class Path { kInt8, kF32, kBf16 };

// Bf16 columns are padded with zeros to 32, f32 rows to 16 floats. The memory belongs to the
// engine.
struct Operand {
  Q8Block* int8 = nullptr;   // [rows][blocks]
  float* f32 = nullptr;      // [rows][f32_stride]
  uint16_t* bf16 = nullptr;  // [blocks][bf16_rows][32]
  int64_t blocks = 0;
  int64_t f32_stride = 0;
  int64_t bf16_rows = 0;
};

// Places the operand's parts behind each other from *at on: the pointers hold offsets until
// MoveOperand. bf16_rows is 0 where there are no tiles.
Operand PlaceOperand(int64_t rows, int64_t bf16_rows, int64_t cols, int64_t* at);
// The same for tiles alone.
Operand PlaceBf16Operand(int64_t rows, int64_t cols, int64_t* at);
Operand MoveOperand(const Operand& offsets, uint8_t* base);

// The forms that some rows are wanted in.
struct Needs {
  bool int8 = false, f32 = false, bf16 = false;

  void Add(Path path);
};

// Rows of input that become rows of an operand.
struct OperandRows {
  const LinearInput& input;
  int64_t cols;
  const Operand& operand;
};

// Every one of `threads` threads calls this. Operand rows [row_begin, row_end) become input rows
// slot_row[row] (or row itself where it is null).
void PrepareRows(const LinearKernels& kernels, const OperandRows& rows, int row_begin, int row_end,
                 const int32_t* slot_row, const Needs& needs, int thread, int threads);

}  // namespace shoal
