// Stand-in for CUDA's header of the same name: conversions round to nearest even.
#pragma once

#include <cstdint>

#include "cuda_runtime.h"
#include "kernels/dtype.h"

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(float v) : bits(shoal::FloatToBFloat16(v)) {}
  operator float() const { return shoal::BFloat16ToFloat(bits); }
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
static_assert(sizeof(__nv_bfloat16) == 2 && sizeof(__nv_bfloat162) == 4);

inline float __bfloat162float(__nv_bfloat16 v) { return shoal::BFloat16ToFloat(v.bits); }
inline __nv_bfloat16 __float2bfloat16(float v) { return {v}; }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return {v}; }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 v) { return v.bits; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__nv_bfloat16(x), __nv_bfloat16(y)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 v) {
  return {__bfloat162float(v.x), __bfloat162float(v.y)};
}
