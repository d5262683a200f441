#include "kernels/packed_matrix.h"

#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "tests/kernels/random_matrix.h"

namespace shoal {
namespace {

struct Case {
  int64_t rows, source_cols, begin, cols;
};

void ExpectExact(DType type, const Case& c) {
  SCOPED_TRACE(testing::Message() << Info(type).name << " rows " << c.rows << " columns " << c.begin
                                  << "+" << c.cols << " of " << c.source_cols);
  const auto source =
      RandomRows(type, c.rows, c.source_cols, static_cast<uint32_t>(c.begin + c.cols));
  const int64_t row_bytes = RowBytes(type, c.source_cols);
  const PackedShape shape = MakePackedShape(type, c.rows, c.begin, c.cols);
  const RowSlice slice = SourceSlice(shape, c.begin);
  ASSERT_LE(slice.offset + slice.bytes, row_bytes);
  // Guard bytes after the panel: packing must not write more than it says.
  std::vector<uint8_t> panel(shape.panel_bytes() + 64, 0xee);
  std::vector<float> expected(c.source_cols), got(c.cols);
  for (int64_t p = 0; p < shape.panels(); ++p) {
    const uint8_t* rows[kPanelRows] = {};
    std::vector<std::vector<uint8_t>> exact(
        kPanelRows);  // own allocations: reads past a slice are caught
    for (int r = 0; r < kPanelRows && p * kPanelRows + r < c.rows; ++r) {
      const uint8_t* at = source.data() + (p * kPanelRows + r) * row_bytes + slice.offset;
      exact[r].assign(at, at + slice.bytes);
      rows[r] = exact[r].data();
    }
    PackPanel(shape, rows, panel.data());
    for (int i = 0; i < 64; ++i) ASSERT_EQ(panel[shape.panel_bytes() + i], 0xee);
    for (int r = 0; r < kPanelRows; ++r) {
      DequantizePanelRow(shape, panel.data(), r, got.data());
      if (rows[r] == nullptr) {
        for (float v : got) ASSERT_EQ(v, 0.0f);
        continue;
      }
      DequantizeRow(type, source.data() + (p * kPanelRows + r) * row_bytes, expected.data(),
                    c.source_cols);
      for (int64_t i = 0; i < c.cols; ++i)
        ASSERT_EQ(got[i], expected[c.begin + i]) << "column " << i;
    }
  }
}

TEST(PackedMatrix, UnpackingGivesTheSourceBack) {
  for (int t = 0; t < kNumDTypes; ++t) {
    const DType type = static_cast<DType>(t);
    const int64_t block = Info(type).block_elems;
    for (int64_t rows : {1, 15, 16, 17, 40}) {
      ExpectExact(type, {rows, 256, 0, 256});
      ExpectExact(type, {rows, block, 0, block});
    }
    if (block == 1) {
      for (int64_t cols : {1, 2, 3, 31, 172}) ExpectExact(type, {5, cols, 0, cols});
      ExpectExact(type, {16, 10, 3, 5});
    }
  }
}

TEST(PackedMatrix, EveryCutAtMultiplesOf32) {
  for (int t = 0; t < kNumDTypes; ++t) {
    const DType type = static_cast<DType>(t);
    for (int64_t begin = 0; begin < 768; begin += 32) {
      for (int64_t end = begin + 32; end <= 768; end += 32) {
        ExpectExact(type, {3, 768, begin, end - begin});
      }
    }
  }
}

TEST(PackedMatrix, BytesAreThoseOfTheFile) {
  for (int t = 0; t < kNumDTypes; ++t) {
    const DType type = static_cast<DType>(t);
    EXPECT_EQ(MakePackedShape(type, 32, 0, 512).bytes(), 32 * RowBytes(type, 512))
        << Info(type).name;
  }
  // A cut inside a super-block repeats its header only: 2 + 2 + 12 bytes for each of 16 rows.
  EXPECT_EQ(MakePackedShape(DType::kQ4_K, 16, 0, 96).bytes() +
                MakePackedShape(DType::kQ4_K, 16, 96, 160).bytes(),
            16 * (144 + 16));
}

TEST(PackedMatrix, LayoutIsTheDocumentedOne) {
  // Q4_0, one block: d of row r is 2^-r, row r holds bytes 16r .. 16r + 15.
  std::vector<uint8_t> source(16 * 18);
  const uint8_t* rows[kPanelRows];
  for (int r = 0; r < 16; ++r) {
    const uint16_t d = static_cast<uint16_t>((15 - r) << 10);
    std::memcpy(&source[18 * r], &d, 2);
    for (int i = 0; i < 16; ++i) source[18 * r + 2 + i] = static_cast<uint8_t>(16 * r + i);
    rows[r] = &source[18 * r];
  }
  std::vector<uint8_t> panel(16 * 18);
  PackPanel(MakePackedShape(DType::kQ4_0, 16, 0, 32), rows, panel.data());
  for (int r = 0; r < 16; ++r) {
    EXPECT_EQ(panel[2 * r + 1], (15 - r) << 2);
    for (int j = 0; j < 4; ++j) {
      for (int b = 0; b < 4; ++b) EXPECT_EQ(panel[32 + 64 * j + 4 * r + b], 16 * r + 4 * j + b);
    }
  }
}

}  // namespace
}  // namespace shoal
