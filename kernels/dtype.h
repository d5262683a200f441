// Element types of tensors, with the sizes of the quantized block formats.
//
// The block layouts are those of GGUF (docs/gguf.md and ggml-common.h of ggml-org/ggml);
// kernels/README.md restates them. Everything here is stateless and safe to call from any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

namespace shoal {

enum class DType : uint8_t {
  kF32,
  kF16,
  kBF16,
  kQ4_0,
  kQ4_1,
  kQ5_0,
  kQ5_1,
  kQ8_0,
  kQ2_K,
  kQ3_K,
  kQ4_K,
  kQ5_K,
  kQ6_K,
  kIQ4_NL,
  kIQ4_XS,
  kMXFP4,
};
inline constexpr int kNumDTypes = 16;

struct DTypeInfo {
  const char* name;  // as GGUF tools print it, lower case: "q4_k"
  uint32_t ggml_id;  // type id in a GGUF tensor info
  int block_elems;   // elements per block (1, 32 or 256)
  int block_bytes;   // bytes per block
  int cut_elems;     // a row may be cut at multiples of this (1 for floats, else 32)
};

const DTypeInfo& Info(DType type);
std::optional<DType> DTypeFromGgml(uint32_t ggml_id);
std::optional<DType> DTypeFromName(const std::string& name);
// "f32, f16, ..." for messages about unknown types.
std::string KnownDTypes();

// Bytes of a row of `elems` elements. REQUIRES: elems is a multiple of block_elems.
int64_t RowBytes(DType type, int64_t elems);

// The scalar oracle: src holds elems / block_elems blocks, dst elems floats. Exact: every product
// and sum is the one the format's formula names, in float.
void DequantizeRow(DType type, const void* src, float* dst, int64_t elems);

// Round-to-nearest quantizers, for `shoal quantize` and for tests. REQUIRES: elems % block_elems ==
// 0.
void QuantizeRow(DType type, const float* src, void* dst, int64_t elems);

// IEEE half and bfloat16 conversions, round to nearest even.
float HalfToFloat(uint16_t h);
uint16_t FloatToHalf(float f);
inline float BFloat16ToFloat(uint16_t h) {
  union {
    uint32_t u;
    float f;
  } v{static_cast<uint32_t>(h) << 16};
  return v.f;
}
uint16_t FloatToBFloat16(float f);

}  // namespace shoal
