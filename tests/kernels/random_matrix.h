// Random weights of every type for the kernels' tests.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "kernels/packed_matrix.h"

namespace shoal {

// Rows of random bits in the file's layout, with scales kept small and finite so that values can be
// compared.
inline std::vector<uint8_t> RandomRows(DType type, int64_t rows, int64_t cols, uint32_t seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> gauss;
  const int64_t row_bytes = RowBytes(type, cols);
  std::vector<uint8_t> bytes(rows * row_bytes);
  for (uint8_t& b : bytes) b = static_cast<uint8_t>(rng());
  if (Info(type).block_elems == 1) {
    std::vector<float> row(cols);
    for (int64_t r = 0; r < rows; ++r) {
      for (float& v : row) v = gauss(rng);
      QuantizeRow(type, row.data(), bytes.data() + r * row_bytes, cols);
    }
    return bytes;
  }
  const int block_bytes = Info(type).block_bytes;
  std::vector<int> halves = {0};  // where the block's f16 fields stand
  if (type == DType::kQ4_1 || type == DType::kQ5_1 || type == DType::kQ4_K ||
      type == DType::kQ5_K) {
    halves = {0, 2};
  }
  if (type == DType::kQ2_K) halves = {80, 82};
  if (type == DType::kQ3_K) halves = {108};
  if (type == DType::kQ6_K) halves = {208};
  if (type == DType::kMXFP4) halves.clear();
  for (size_t at = 0; at < bytes.size(); at += block_bytes) {
    // Exponents 8 to 11: scales between 2^-7 and 2^-3, of either sign.
    for (int h : halves)
      bytes[at + h + 1] = static_cast<uint8_t>((bytes[at + h + 1] & 0x8f) | 0x20);
    if (type == DType::kMXFP4) bytes[at] = static_cast<uint8_t>(120 + bytes[at] % 5);
  }
  return bytes;
}

// A slice of columns of such rows, packed, with its values.
struct RandomMatrix {
  PackedMatrix packed;
  std::vector<float> values;  // [rows, cols]
  std::vector<uint8_t> storage;

  RandomMatrix(DType type, int64_t rows, int64_t cols, int64_t col_begin, uint32_t seed,
               int misalign = 0) {
    const int64_t block = Info(type).block_elems;
    const int64_t source_cols = (col_begin + cols + block - 1) / block * block;
    const std::vector<uint8_t> source = RandomRows(type, rows, source_cols, seed);
    const int64_t row_bytes = RowBytes(type, source_cols);
    packed.shape = MakePackedShape(type, rows, col_begin, cols);
    const RowSlice slice = SourceSlice(packed.shape, col_begin);
    storage.resize(packed.shape.bytes() + misalign);
    packed.data = storage.data() + misalign;
    std::vector<float> row(source_cols);
    for (int64_t p = 0; p < packed.shape.panels(); ++p) {
      const uint8_t* src[kPanelRows] = {};
      for (int64_t r = 0; r < kPanelRows && p * kPanelRows + r < rows; ++r) {
        const uint8_t* at = source.data() + (p * kPanelRows + r) * row_bytes;
        src[r] = at + slice.offset;
        DequantizeRow(type, at, row.data(), source_cols);
        values.insert(values.end(), row.begin() + col_begin, row.begin() + col_begin + cols);
      }
      PackPanel(packed.shape, src, storage.data() + misalign + p * packed.shape.panel_bytes());
    }
  }
  RandomMatrix(const RandomMatrix&) = delete;
  RandomMatrix& operator=(const RandomMatrix&) = delete;
};

}  // namespace shoal
