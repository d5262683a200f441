// The one weight layout of shoal on CPU: panels of 16 rows, interleaved by 4 bytes of the inner
// dimension.
//
// A weight matrix is [rows = out_features, cols = in_features], y = W x. Rows are grouped in panels
// of 16 (the last one padded with zero rows); a panel holds all its columns, contiguous, block
// after block, so a thread that owns a run of panels reads one run of memory. The same bytes are
// the operand order of AVX2 and AVX-512 VNNI dot products and of an AMX B tile. The per-type
// layouts stand in kernels/README.md
// ("Packed layout"); a packed block has exactly the bytes of 16 GGUF blocks, and unpacking gives
// them back.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/dtype.h"

namespace shoal {

inline constexpr int kPanelRows = 16;

// Shape of a packed matrix and of the slice of a source row it was made from. Plain data.
struct PackedShape {
  DType type = DType::kF32;
  int64_t rows = 0;  // true rows, before padding to 16
  int64_t cols = 0;  // columns held; a multiple of 32 for every quantized type
  // K-quants and IQ4_XS only: how many 32-element sub-blocks of the first super-block lie before
  // the slice (0..7). Both halves of a super-block that is cut keep its header (d, dmin, scales).
  int lead = 0;

  int64_t panels() const { return (rows + kPanelRows - 1) / kPanelRows; }
  int64_t panel_bytes() const;
  int64_t bytes() const { return panels() * panel_bytes(); }
  // Super-blocks that the slice touches; 0 for types without super-blocks.
  int64_t super_blocks() const;

  friend bool operator==(const PackedShape&, const PackedShape&) = default;
};

// The packed shape of columns [col_begin, col_begin + cols) of a source matrix.
// REQUIRES: both are multiples of Info(type).cut_elems, or the slice reaches the end of the row.
PackedShape MakePackedShape(DType type, int64_t rows, int64_t col_begin, int64_t cols);

// A view of packed weights. Does not own; the memory outlives every use. Readable from any thread.
struct PackedMatrix {
  PackedShape shape;
  const uint8_t* data = nullptr;

  const uint8_t* panel(int64_t i) const { return data + i * shape.panel_bytes(); }
};

// The bytes of one source row that a slice needs: [offset, offset + bytes) within the GGUF row.
struct RowSlice {
  int64_t offset;
  int64_t bytes;
};
RowSlice SourceSlice(const PackedShape& shape, int64_t col_begin);

// Packs one panel. src[i] points at the first byte of row i's slice (see SourceSlice), or is null
// for a padding row. dst has panel_bytes() bytes. Exact: no bit of the source is lost.
void PackPanel(const PackedShape& shape, const uint8_t* const src[kPanelRows], uint8_t* dst);

// The inverse for one row of a panel, dequantized: out[0..cols). The oracle of every kernel that
// reads panels, and the embedding lookup. row_in_panel is 0..15.
void DequantizePanelRow(const PackedShape& shape, const uint8_t* panel, int row_in_panel,
                        float* out);

}  // namespace shoal
