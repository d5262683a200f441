// Stand-in for CUDA's header of the same name: every operation rounds once, to nearest even.
#pragma once

#include <cstdint>

#include "cuda_runtime.h"
#include "kernels/dtype.h"

struct __half_raw {
  uint16_t x;
};

struct __half {
  uint16_t bits;
  __half() = default;
  __half(float v) : bits(shoal::FloatToHalf(v)) {}
  __half(const __half_raw& raw) : bits(raw.x) {}
  operator float() const { return shoal::HalfToFloat(bits); }
};
struct alignas(4) __half2 {
  __half x, y;
};
using half = __half;
using half2 = __half2;
static_assert(sizeof(half) == 2 && sizeof(half2) == 4);

inline float __half2float(half v) { return shoal::HalfToFloat(v.bits); }
inline half __float2half(float v) { return half(v); }
inline half __float2half_rn(float v) { return half(v); }
inline half __ushort_as_half(uint16_t v) { return half(__half_raw{v}); }
inline uint16_t __half_as_ushort(half v) { return v.bits; }
inline half2 __halves2half2(half x, half y) { return {x, y}; }
inline half2 make_half2(half x, half y) { return {x, y}; }
inline half2 __half2half2(half v) { return {v, v}; }
inline half2 __floats2half2_rn(float x, float y) { return {half(x), half(y)}; }
inline half2 __float22half2_rn(float2 v) { return {half(v.x), half(v.y)}; }
inline half2 __float2half2_rn(float v) { return {half(v), half(v)}; }
inline float2 __half22float2(half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline half __low2half(half2 v) { return v.x; }
inline half __high2half(half2 v) { return v.y; }
inline float __low2float(half2 v) { return __half2float(v.x); }
inline float __high2float(half2 v) { return __half2float(v.y); }
inline half __hadd(half a, half b) { return half(__half2float(a) + __half2float(b)); }
inline half __hmul(half a, half b) { return half(__half2float(a) * __half2float(b)); }
inline half2 __hadd2(half2 a, half2 b) { return {__hadd(a.x, b.x), __hadd(a.y, b.y)}; }
inline half2 __hsub2(half2 a, half2 b) {
  return __floats2half2_rn(__half2float(a.x) - __half2float(b.x),
                           __half2float(a.y) - __half2float(b.y));
}
inline half2 __hmul2(half2 a, half2 b) { return {__hmul(a.x, b.x), __hmul(a.y, b.y)}; }
inline half __hfma(half a, half b, half c) {
  const double exact = double{__half2float(a)} * double{__half2float(b)} + double{__half2float(c)};
  return half(static_cast<float>(exact));
}
inline half2 __hfma2(half2 a, half2 b, half2 c) {
  return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}
