#include "kernels/cpu/operand.h"

#include <algorithm>
#include <cmath>

#include "kernels/cpu/elementwise.h"

namespace shoal {
namespace {

// Columns that one task converts: the row stays in L1 between norm and conversion.
constexpr int kChunkCols = 512;
static_assert(kChunkCols % 32 == 0);

int64_t RoundUp(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Rows between the column blocks of a bf16 operand: an odd multiple of 32, so that the tiles of
// successive column blocks fall into different L1 sets; 32 more, as products read whole tiles.
int64_t Bf16RowStride(int64_t rows) {
  const int64_t units = RoundUp(rows, 32) / 32 + 1;
  return 32 * (units | 1);
}

// x holds columns [col, col + n) of an operand row; n is a multiple of 32 except at the row's end.
void ConvertChunk(const LinearKernels& kernels, const float* x, int64_t row, int64_t col, int64_t n,
                  const Needs& needs, const Operand& operand) {
  if (needs.int8) kernels.quantize(x, n / 32, operand.int8 + row * operand.blocks + col / 32);
  if (needs.f32) {
    float* dst = operand.f32 + row * operand.f32_stride + col;
    std::copy(x, x + n, dst);
    if (n % 2 != 0) dst[n] = 0;
  }
  if (needs.bf16) {
    for (int64_t i = 0; i < n; i += 32) {
      uint16_t* dst = operand.bf16 + ((col + i) / 32 * operand.bf16_rows + row) * 32;
      const int64_t held = std::min<int64_t>(32, n - i);
      kernels.to_bf16(x + i, held, dst);
      std::fill(dst + held, dst + 32, static_cast<uint16_t>(0));
    }
  }
}

}  // namespace

Operand PlaceOperand(int64_t rows, int64_t bf16_rows, int64_t cols, int64_t* at) {
  Operand o;
  o.blocks = RoundUp(cols, 32) / 32;
  o.f32_stride = RoundUp(cols, 16);
  o.bf16_rows = bf16_rows > 0 ? Bf16RowStride(bf16_rows) : 0;
  o.int8 = reinterpret_cast<Q8Block*>(*at);
  *at += rows * o.blocks * static_cast<int64_t>(sizeof(Q8Block));
  o.f32 = reinterpret_cast<float*>(*at);
  *at += RoundUp(rows * o.f32_stride * static_cast<int64_t>(sizeof(float)), 64);
  o.bf16 = reinterpret_cast<uint16_t*>(*at);
  *at += o.blocks * o.bf16_rows * 64;
  return o;
}

Operand PlaceBf16Operand(int64_t rows, int64_t cols, int64_t* at) {
  return PlaceOperand(0, rows, cols, at);
}

Operand MoveOperand(const Operand& offsets, uint8_t* base) {
  Operand o = offsets;
  o.int8 = reinterpret_cast<Q8Block*>(base + reinterpret_cast<int64_t>(offsets.int8));
  o.f32 = reinterpret_cast<float*>(base + reinterpret_cast<int64_t>(offsets.f32));
  o.bf16 = reinterpret_cast<uint16_t*>(base + reinterpret_cast<int64_t>(offsets.bf16));
  return o;
}

void Needs::Add(Path path) {
  if (path == Path::kInt8) int8 = true;
  if (path == Path::kF32) f32 = true;
  if (path == Path::kBf16) bf16 = true;
}

void PrepareRows(const LinearKernels& kernels, const OperandRows& rows, int row_begin, int row_end,
                 const int32_t* slot_row, const Needs& needs, int thread, int threads) {
  const LinearInput& input = rows.input;
  const int64_t chunks = (rows.cols + kChunkCols - 1) / kChunkCols;
  const int64_t tasks = (row_end - row_begin) * chunks;
  const int64_t begin = tasks * thread / threads;
  const int64_t end = tasks * (thread + 1) / threads;
  alignas(64) float local[kChunkCols];
  int64_t norm_row = -1;
  float norm = 0, mean = 0;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row = row_begin + task / chunks;
    const int64_t col = task % chunks * kChunkCols;
    const int64_t n = std::min<int64_t>(kChunkCols, rows.cols - col);
    const int64_t source_row = slot_row != nullptr ? slot_row[row] : row;
    const int64_t source = source_row * input.stride;
    const float* x = input.x + source + col;
    const bool layer_norm = input.kind == LinearInput::Kind::kLayerNorm;
    if (layer_norm || input.kind == LinearInput::Kind::kRmsNorm) {
      // Threads that share a row each add up its squares: cheaper than another barrier.
      if (norm_row != row) {
        const float* whole = input.x + source;
        const Moments m = layer_norm ? MomentsOf(whole, rows.cols)
                                     : Moments{0, kernels.sum_squares(whole, rows.cols)};
        mean = m.mean;
        norm = input.scale / std::sqrt(m.squares / static_cast<float>(rows.cols) + input.eps);
        if (input.row_scale != nullptr) norm *= input.row_scale[source_row];
        norm_row = row;
      }
      if (layer_norm) {
        Normalize(x, input.weight + col, mean, norm, n, local);
      } else {
        kernels.scale(x, input.weight + col, norm, n, local);
      }
      x = local;
    } else if (input.kind == LinearInput::Kind::kGated) {
      kernels.gated[static_cast<int>(input.activation)](x, input.up + source + col, n, local);
      x = local;
    }
    ConvertChunk(kernels, x, row, col, n, needs, rows.operand);
  }
}

}  // namespace shoal
