#include "kernels/packed_matrix.h"

#include <cstring>

#include "kernels/row_planes.h"
#include "kernels/row_planes_inline.h"

namespace shoal {
namespace {

bool IsQuantized(DType type) { return Info(type).block_elems > 1; }

// Byte offset of each header field of a packed block, lane 0. Fields are [field byte or f16][16
// lanes].
struct HeaderLayout {
  int d, m, scales;
};
HeaderLayout Layout(const PlaneInfo& p) {
  const int m = p.d ? 32 : 0;
  return {0, m, m + (p.m ? 32 : 0)};
}

void WriteHeader(const PlaneInfo& p, const RowHeader& h, int lane, uint8_t* dst) {
  const HeaderLayout at = Layout(p);
  if (p.d) std::memcpy(dst + at.d + 2 * lane, &h.d, 2);
  if (p.m) std::memcpy(dst + at.m + 2 * lane, &h.m, 2);
  const int bytes = p.scale_bytes + p.e;
  for (int i = 0; i < bytes; ++i) dst[at.scales + 16 * i + lane] = h.scales[i];
}

RowHeader ReadPackedHeader(const PlaneInfo& p, const uint8_t* src, int lane) {
  const HeaderLayout at = Layout(p);
  RowHeader h;
  if (p.d) std::memcpy(&h.d, src + at.d + 2 * lane, 2);
  if (p.m) std::memcpy(&h.m, src + at.m + 2 * lane, 2);
  const int bytes = p.scale_bytes + p.e;
  for (int i = 0; i < bytes; ++i) h.scales[i] = src[at.scales + 16 * i + lane];
  return h;
}

// Copies a row's plane of `lines` x 4 bytes to or from its lane.
void ScatterLines(const uint8_t* row, int lines, int lane, uint8_t* dst) {
  for (int j = 0; j < lines; ++j) std::memcpy(dst + 64 * j + 4 * lane, row + 4 * j, 4);
}
void GatherLines(const uint8_t* src, int lines, int lane, uint8_t* row) {
  for (int j = 0; j < lines; ++j) std::memcpy(row + 4 * j, src + 64 * j + 4 * lane, 4);
}

void ReadPackedPlanes(const PlaneInfo& p, const uint8_t* src, int lane, RowPlanes* row) {
  if (p.nib) {
    GatherLines(src, 4, lane, row->nib);
    src += 256;
  }
  if (p.two) {
    GatherLines(src, 2, lane, row->two);
    src += 128;
  }
  if (p.hi) {
    row->hi = 0;
    for (int g = 0; g < 8; ++g) {
      const uint32_t bits = (src[8 * g + lane / 2] >> (4 * (lane % 2))) & 15;
      row->hi |= bits << (4 * g);
    }
    src += 64;
  }
  if (p.i8) GatherLines(src, 8, lane, row->i8);
}

// Eight words of 64 bits: bit 4r + b of word g is the high bit of element 4g + b of row r.
void WriteHi(const uint32_t hi[kPanelRows], uint8_t* dst) {
  for (int g = 0; g < 8; ++g) {
    uint64_t word = 0;
    for (int lane = 0; lane < kPanelRows; ++lane) {
      word |= uint64_t{(hi[lane] >> (4 * g)) & 15} << (4 * lane);
    }
    std::memcpy(dst + 8 * g, &word, 8);
  }
}

// The types without blocks: line k of a panel holds 4 bytes of every row.
void PackFloats(const PackedShape& shape, const uint8_t* const src[kPanelRows], uint8_t* dst) {
  const int64_t row_bytes = shape.cols * Info(shape.type).block_bytes;
  const int64_t whole = row_bytes / 4 * 4;  // an odd f16 column is paired with zero
  constexpr int64_t kStep = 256;            // bytes of a row at a time: 16 rows of it stay in L1
  for (int64_t begin = 0; begin < whole; begin += kStep) {
    const int64_t end = begin + kStep < whole ? begin + kStep : whole;
    for (int lane = 0; lane < kPanelRows; ++lane) {
      for (int64_t at = begin; at < end; at += 4) {
        uint32_t word = 0;
        if (src[lane] != nullptr) std::memcpy(&word, src[lane] + at, 4);
        std::memcpy(dst + 16 * at + 4 * lane, &word, 4);
      }
    }
  }
  for (int lane = 0; lane < kPanelRows && whole < row_bytes; ++lane) {
    uint32_t word = 0;
    if (src[lane] != nullptr) std::memcpy(&word, src[lane] + whole, 2);
    std::memcpy(dst + 16 * whole + 4 * lane, &word, 4);
  }
}

// Calls fn(packed header, packed planes, super-block or block index, sub-block) for each 32 columns
// held.
template <typename Fn>
void ForEachSubBlock(const PackedShape& shape, Fn fn) {
  const PlaneInfo& p = Planes(shape.type);
  const int64_t subs = shape.cols / 32;
  int64_t at = 0, header = 0;
  for (int64_t i = 0; i < subs; ++i) {
    const int64_t index = p.super ? (shape.lead + i) / 8 : i;
    const int s = p.super ? static_cast<int>((shape.lead + i) % 8) : 0;
    const bool first = i == 0 || s == 0;
    if (first) {
      header = at;
      at += p.header_bytes() * kPanelRows;
    }
    fn(header, at, index, s, first);
    at += p.sub_bytes() * kPanelRows;
  }
}

}  // namespace

int64_t PackedShape::super_blocks() const {
  if (!IsQuantized(type) || !Planes(type).super) return 0;
  return (lead + cols / 32 + 7) / 8;
}

int64_t PackedShape::panel_bytes() const {
  if (!IsQuantized(type)) return (cols * Info(type).block_bytes + 3) / 4 * 64;
  const PlaneInfo& p = Planes(type);
  const int64_t headers = p.super ? super_blocks() : cols / 32;
  return kPanelRows * (headers * p.header_bytes() + cols / 32 * p.sub_bytes());
}

PackedShape MakePackedShape(DType type, int64_t rows, int64_t col_begin, int64_t cols) {
  const bool super = IsQuantized(type) && Planes(type).super;
  return {type, rows, cols, super ? static_cast<int>(col_begin / 32 % 8) : 0};
}

RowSlice SourceSlice(const PackedShape& shape, int64_t col_begin) {
  const DTypeInfo& info = Info(shape.type);
  const int64_t blocks =
      shape.super_blocks() > 0 ? shape.super_blocks() : shape.cols / info.block_elems;
  return {col_begin / info.block_elems * info.block_bytes, blocks * info.block_bytes};
}

namespace {

// One function for each type, so that its bit layout is a constant in the inner loop.
template <DType kType>
void PackBlocks(const PackedShape& shape, const uint8_t* const src[kPanelRows], uint8_t* dst) {
  constexpr PlaneInfo p = row_planes::PlanesOf(kType);
  // What a padding row reads; no block is larger. Zeros pack to zeros.
  static constexpr uint8_t kZeroBlock[256] = {};
  const uint8_t* rows[kPanelRows];
  int64_t stride[kPanelRows];
  for (int lane = 0; lane < kPanelRows; ++lane) {
    rows[lane] = src[lane] != nullptr ? src[lane] : kZeroBlock;
    stride[lane] = src[lane] != nullptr ? Info(kType).block_bytes : 0;
  }
  ForEachSubBlock(shape, [&](int64_t header, int64_t at, int64_t index, int s, bool first) {
    uint32_t hi[kPanelRows];
    for (int lane = 0; lane < kPanelRows; ++lane) {
      const uint8_t* block = rows[lane] + index * stride[lane];
      if (first) WriteHeader(p, row_planes::Header(kType, block), lane, dst + header);
      RowPlanes planes;
      row_planes::Read(kType, block, s, &planes);
      uint8_t* to = dst + at;
      if (p.nib) {
        ScatterLines(planes.nib, 4, lane, to);
        to += 256;
      }
      if (p.two) ScatterLines(planes.two, 2, lane, to);
      if (p.i8) ScatterLines(planes.i8, 8, lane, to);
      if (p.hi) hi[lane] = planes.hi;
    }
    if (p.hi) WriteHi(hi, dst + at + 256 * p.nib + 128 * p.two);
  });
}

}  // namespace

void PackPanel(const PackedShape& shape, const uint8_t* const src[kPanelRows], uint8_t* dst) {
  switch (shape.type) {
    case DType::kF32:
    case DType::kF16:
    case DType::kBF16:
      return PackFloats(shape, src, dst);
    case DType::kQ4_0:
      return PackBlocks<DType::kQ4_0>(shape, src, dst);
    case DType::kQ4_1:
      return PackBlocks<DType::kQ4_1>(shape, src, dst);
    case DType::kQ5_0:
      return PackBlocks<DType::kQ5_0>(shape, src, dst);
    case DType::kQ5_1:
      return PackBlocks<DType::kQ5_1>(shape, src, dst);
    case DType::kQ8_0:
      return PackBlocks<DType::kQ8_0>(shape, src, dst);
    case DType::kQ2_K:
      return PackBlocks<DType::kQ2_K>(shape, src, dst);
    case DType::kQ3_K:
      return PackBlocks<DType::kQ3_K>(shape, src, dst);
    case DType::kQ4_K:
      return PackBlocks<DType::kQ4_K>(shape, src, dst);
    case DType::kQ5_K:
      return PackBlocks<DType::kQ5_K>(shape, src, dst);
    case DType::kQ6_K:
      return PackBlocks<DType::kQ6_K>(shape, src, dst);
    case DType::kIQ4_NL:
      return PackBlocks<DType::kIQ4_NL>(shape, src, dst);
    case DType::kIQ4_XS:
      return PackBlocks<DType::kIQ4_XS>(shape, src, dst);
    case DType::kMXFP4:
      return PackBlocks<DType::kMXFP4>(shape, src, dst);
  }
}

void DequantizePanelRow(const PackedShape& shape, const uint8_t* panel, int lane, float* out) {
  if (!IsQuantized(shape.type)) {
    const int bytes = Info(shape.type).block_bytes;
    for (int64_t i = 0; i < shape.cols; ++i) {
      const int64_t at = i * bytes;
      DequantizeRow(shape.type, panel + at / 4 * 64 + 4 * lane + at % 4, out + i, 1);
    }
    return;
  }
  SubBlockValues v;
  ForEachSubBlock(shape, [&](int64_t header, int64_t at, int64_t, int s, bool) {
    DecodePackedSubBlock(shape.type, panel + header, panel + at, lane, s, &v);
    for (int i = 0; i < 32; ++i) {
      *out++ = v.scale[i / 16] * static_cast<float>(v.level[i]) + v.bias[i / 16];
    }
  });
}

void DecodePackedSubBlock(DType type, const uint8_t* header, const uint8_t* planes, int lane, int s,
                          SubBlockValues* values) {
  const PlaneInfo& p = Planes(type);
  RowPlanes row;
  ReadPackedPlanes(p, planes, lane, &row);
  DecodeSubBlock(type, ReadPackedHeader(p, header, lane), row, s, values);
}

}  // namespace shoal
