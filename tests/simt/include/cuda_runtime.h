// Stand-in for CUDA's header of the same name: kernels compile for the host and run under
// simt/runner.h; the runtime's calls work on host memory, in the order in which they are made.
//
// Shared memory is had through launch.cuh only (`__shared__` is not known here).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "simt/api.h"
#include "simt/runner.h"
#include "simt/types.h"
#include "simt/warp.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__

// ---- Arithmetic

inline float __int_as_float(int v) { return simt::BitCast<float>(v); }
inline int __float_as_int(float v) { return simt::BitCast<int>(v); }
inline float __uint_as_float(unsigned v) { return simt::BitCast<float>(v); }
inline unsigned __float_as_uint(float v) { return simt::BitCast<unsigned>(v); }
inline int __float2int_rn(float v) {  // NaN gives 0, what does not fit the nearest that does
  if (!(v > -2147483648.0f)) return v != v ? 0 : INT32_MIN;
  return v >= 2147483648.0f ? INT32_MAX : static_cast<int>(std::nearbyint(v));
}
inline float __int2float_rn(int v) { return static_cast<float>(v); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1 / a; }
inline float __expf(float a) { return std::exp(a); }
inline float rsqrtf(float a) { return 1 / std::sqrt(a); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// Four products of bytes, summed.
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 32; i += 8) {
    c += static_cast<int8_t>(static_cast<uint32_t>(a) >> i) *
         static_cast<int8_t>(static_cast<uint32_t>(b) >> i);
  }
  return c;
}

// Bytes of {high, low} by the nibbles of the selector; bit 3 of a nibble repeats the byte's sign.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t both = uint64_t{high} << 32 | low;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned s = selector >> (4 * i);
    uint8_t byte = static_cast<uint8_t>(both >> (8 * (s & 7)));
    if ((s & 8) != 0) byte = (byte & 0x80) != 0 ? 0xFF : 0;
    out |= unsigned{byte} << (8 * i);
  }
  return out;
}

template <typename T>
inline T __ldg(const T* p) {
  return *p;
}
template <typename T>
inline T __ldcs(const T* p) {
  return *p;
}

// ---- Atomics. Blocks of one launch never overlap; launches of other OS threads may.

inline int atomicAdd(int* p, int v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
inline unsigned atomicAdd(unsigned* p, unsigned v) {
  return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}
inline float atomicAdd(float* p, float v) {
  auto* bits = reinterpret_cast<uint32_t*>(p);
  uint32_t old = __atomic_load_n(bits, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(bits, &old,
                                      simt::BitCast<uint32_t>(simt::BitCast<float>(old) + v), true,
                                      __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return simt::BitCast<float>(old);
}
inline int atomicMax(int* p, int v) {
  int old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (old < v &&
         !__atomic_compare_exchange_n(p, &old, v, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
inline unsigned atomicInc(unsigned* p, unsigned limit) {
  unsigned old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(p, &old, old >= limit ? 0 : old + 1, true, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED)) {
  }
  return old;
}
inline unsigned atomicCAS(unsigned* p, unsigned expected, unsigned v) {
  __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
  return expected;
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() {}
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
