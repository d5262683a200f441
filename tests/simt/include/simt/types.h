// CUDA's vector types and built-in variables.
#pragma once

#include <cstdint>

#define SIMT_VECTORS(T, name, a2, a4)                                \
  struct name##1 {                                                   \
    T x;                                                             \
  };                                                                 \
  struct alignas(a2) name##2 {                                       \
    T x, y;                                                          \
  };                                                                 \
  struct name##3 {                                                   \
    T x, y, z;                                                       \
  };                                                                 \
  struct alignas(a4) name##4 {                                       \
    T x, y, z, w;                                                    \
  };                                                                 \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }         \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SIMT_VECTORS(int8_t, char, 2, 4)
SIMT_VECTORS(uint8_t, uchar, 2, 4)
SIMT_VECTORS(int16_t, short, 4, 8)
SIMT_VECTORS(uint16_t, ushort, 4, 8)
SIMT_VECTORS(int32_t, int, 8, 16)
SIMT_VECTORS(uint32_t, uint, 8, 16)
SIMT_VECTORS(float, float, 8, 16)
SIMT_VECTORS(double, double, 16, 16)
#undef SIMT_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// The runner sets them at every switch of fibers.
inline constinit thread_local uint3 threadIdx = {};
inline constinit thread_local uint3 blockIdx = {};
inline constinit thread_local dim3 blockDim = {};
inline constinit thread_local dim3 gridDim = {};
inline constexpr int warpSize = 32;
