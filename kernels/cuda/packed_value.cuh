// Single values of a packed matrix (kernels/README.md, "Packed layout"), for lookups of a few rows.
// A warp that reads 32 neighbouring columns of a row has the same header for all lanes.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/launch.cuh"
#include "kernels/dtype.h"
#include "kernels/row_planes.h"

namespace shoal::cuda {

struct PackedView {
  const uint8_t* data;
  int64_t cols;
  int64_t panel_bytes;
  PlaneInfo planes;      // of a quantized type
  int32_t header_bytes;  // of a packed block (16 rows)
  int32_t sub_bytes;     // of its 32 columns' planes
  DType type;
  int32_t lead;  // 32-column groups of the first super-block that the slice lacks

  __device__ float Value(int64_t row, int64_t col) const;

 private:
  // One row's part of a block: header fields and planes of 32 columns.
  struct Cursor {
    const uint8_t* header;
    const uint8_t* planes;
    int lane;     // row in the panel
    int sub;      // of the super-block
    int element;  // 0 .. 31
  };
  __device__ float FloatValue(const uint8_t* panel, int lane, int64_t col) const;
  __device__ Cursor Find(const uint8_t* panel, int lane, int64_t col) const;
  __device__ int Code(const Cursor& at) const;
  __device__ float Half(const Cursor& at, int offset) const {
    return __half2float(
        __ushort_as_half(*reinterpret_cast<const uint16_t*>(at.header + offset + 2 * at.lane)));
  }
  __device__ int Scale(const Cursor& at, int i) const {
    return at.header[32 * planes.d + 32 * planes.m + 16 * i + at.lane];
  }
  __device__ float Scaled(const Cursor& at, int code) const;
};

__device__ inline float PackedView::FloatValue(const uint8_t* panel, int lane, int64_t col) const {
  if (type == DType::kF32) return *reinterpret_cast<const float*>(panel + col * 64 + 4 * lane);
  const uint16_t bits =
      *reinterpret_cast<const uint16_t*>(panel + col / 2 * 64 + 4 * lane + col % 2 * 2);
  if (type == DType::kF16) return __half2float(__ushort_as_half(bits));
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

__device__ inline PackedView::Cursor PackedView::Find(const uint8_t* panel, int lane,
                                                      int64_t col) const {
  const int64_t header = header_bytes, sub = sub_bytes;
  const int64_t index = col / 32;
  if (!planes.super) {
    const uint8_t* block = panel + index * (header + sub);
    return {block, block + header, lane, 0, static_cast<int>(col % 32)};
  }
  const int64_t super = (lead + index) / 8;
  const int64_t first = super == 0 ? 0 : super * 8 - lead;  // groups held before the super-block
  const uint8_t* block = panel + super * header + first * sub;
  return {block, block + header + (index - first) * sub, lane, static_cast<int>((lead + index) % 8),
          static_cast<int>(col % 32)};
}

__device__ inline int PackedView::Code(const Cursor& at) const {
  const uint8_t* p = at.planes;
  const int i = at.element, group = i / 4, byte = 4 * at.lane + i % 4;
  if (planes.i8) return static_cast<int8_t>(p[64 * group + byte]);
  int code = 0, bits = 0;
  if (planes.nib) {
    code = (p[64 * (group % 4) + byte] >> (i / 16 * 4)) & 15;
    bits = 4;
    p += 256;
  }
  if (planes.two) {
    code |= ((p[64 * (i / 16) + byte] >> (2 * (group % 4))) & 3) << bits;
    bits += 2;
    p += 128;
  }
  if (planes.hi) code |= ((p[8 * group + at.lane / 2] >> (at.lane % 2 * 4 + i % 4)) & 1) << bits;
  return code;
}

// Level 0 .. 15 of IQ4_NL and IQ4_XS; the doubled ones of MXFP4.
__device__ inline int LevelIq4(int code) {
  constexpr uint64_t kLow = 0xf6eaddcfbfad9881u, kHigh = 0x7159453526190d01u;
  return static_cast<int8_t>((code < 8 ? kLow : kHigh) >> (8 * (code % 8)));
}
__device__ inline int LevelMxfp4(int code) {
  const int level = static_cast<int>(0x0c08060403020100u >> (8 * (code % 8))) & 255;
  return code < 8 ? level : -level;
}

__device__ inline float PackedView::Scaled(const Cursor& at, int code) const {
  const int s = at.sub, half = at.element / 16;
  const float d = planes.d ? Half(at, 0) : 0;
  switch (type) {
    case DType::kQ4_0:
      return d * static_cast<float>(code - 8);
    case DType::kQ5_0:
      return d * static_cast<float>(code - 16);
    case DType::kQ4_1:
    case DType::kQ5_1:
      return d * static_cast<float>(code) + Half(at, 32);
    case DType::kQ2_K: {
      const int b = Scale(at, 2 * s + half);
      const float scale = d * static_cast<float>(b & 15);
      return scale * static_cast<float>(code) - Half(at, 32) * static_cast<float>(b >> 4);
    }
    case DType::kQ3_K: {
      const int i = 2 * s + half;
      const int low = i < 8 ? Scale(at, i) & 15 : Scale(at, i - 8) >> 4;
      const int scale = low | ((Scale(at, 8 + i % 4) >> (2 * (i / 4))) & 3) << 4;
      return d * static_cast<float>(scale - 32) * static_cast<float>(code - 4);
    }
    case DType::kQ4_K:
    case DType::kQ5_K: {
      const bool early = s < 4;
      const int scale =
          early ? Scale(at, s) & 63 : (Scale(at, s + 4) & 15) | (Scale(at, s - 4) >> 6) << 4;
      const int min =
          early ? Scale(at, s + 4) & 63 : Scale(at, s + 4) >> 4 | (Scale(at, s) >> 6) << 4;
      return d * static_cast<float>(scale) * static_cast<float>(code) -
             Half(at, 32) * static_cast<float>(min);
    }
    case DType::kQ6_K:
      return d * static_cast<float>(static_cast<int8_t>(Scale(at, 2 * s + half))) *
             static_cast<float>(code - 32);
    case DType::kIQ4_XS: {
      const int high = *reinterpret_cast<const uint16_t*>(at.header + 32 + 2 * at.lane);
      const int scale = ((Scale(at, s / 2) >> (s % 2 * 4)) & 15) | ((high >> (2 * s)) & 3) << 4;
      return d * static_cast<float>(scale - 32) * static_cast<float>(LevelIq4(code));
    }
    case DType::kIQ4_NL:
      return d * static_cast<float>(LevelIq4(code));
    case DType::kMXFP4: {
      const uint32_t e = static_cast<uint32_t>(Scale(at, 0));  // 2^(e - 128)
      const float scale = __uint_as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23);
      return scale * static_cast<float>(LevelMxfp4(code));
    }
    default:
      return d * static_cast<float>(code);
  }
}

__device__ inline float PackedView::Value(int64_t row, int64_t col) const {
  const uint8_t* panel = data + row / 16 * panel_bytes;
  const int lane = static_cast<int>(row % 16);
  if (type == DType::kF32 || type == DType::kF16 || type == DType::kBF16) {
    return FloatValue(panel, lane, col);
  }
  const Cursor at = Find(panel, lane, col);
  return Scaled(at, Code(at));
}

}  // namespace shoal::cuda
