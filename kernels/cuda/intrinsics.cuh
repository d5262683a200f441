// The few instructions that CUDA C++ has no name for. Fragments are laid out as the PTX manual's
// "Matrix Fragments for mma" says: lane 4 g + t holds rows g and g + 8 of a 16-row operand.
//
// Without nvcc the tests' stand-in gives the same functions (tests/simt/include/simt/intrinsics.h).
#pragma once

#if !defined(__CUDACC__)
#include "simt/intrinsics.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace shoal::cuda {

// c[16, 8] += a[16, 16] * b[16, 8], f16 operands, f32 sums. a: rows g, g + 8 with k = 2t, 2t + 1,
// then the same with k + 8; b: column g, k = 2t, 2t + 1, then k + 8; c: row g columns 2t, 2t + 1,
// then row g + 8. sm_75 has only the product of half that depth.
__device__ __forceinline__ void MmaF16(float c[4], const uint32_t a[4], const uint32_t b[2]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[2 * h]), "r"(a[2 * h + 1]), "r"(b[h]));
  }
#endif
}

// The same with bf16 operands. sm_75 has none: there the values go through f16, which holds them
// while they are below 65504.
__device__ __forceinline__ void MmaBf16(float c[4], const uint32_t a[4], const uint32_t b[2]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  const auto to_half = [](uint32_t v) {
    const half2 h = __floats2half2_rn(__uint_as_float(v << 16), __uint_as_float(v & 0xFFFF0000u));
    return *reinterpret_cast<const uint32_t*>(&h);
  };
  const uint32_t ha[4] = {to_half(a[0]), to_half(a[1]), to_half(a[2]), to_half(a[3])};
  const uint32_t hb[2] = {to_half(b[0]), to_half(b[1])};
  MmaF16(c, ha, hb);
#endif
}

// c[16, 8] += a[16, 32] * b[32, 8], signed bytes, exact. a: rows g, g + 8 with k = 4t .. 4t + 3,
// then the same with k + 16; b: column g, k = 4t .. 4t + 3, then k + 16; c as above.
__device__ __forceinline__ void MmaS8K32(int c[4], const uint32_t a[4], const uint32_t b[2]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"
        : "+r"(c[2 * (i % 2)]), "+r"(c[2 * (i % 2) + 1])
        : "r"(a[i]), "r"(b[i / 2]));
  }
#endif
}

// Half the depth: a[2], k = 4t .. 4t + 3 of 16.
__device__ __forceinline__ void MmaS8K16(int c[4], const uint32_t a[2], uint32_t b) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
#else
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"
        : "+r"(c[2 * i]), "+r"(c[2 * i + 1])
        : "r"(a[i]), "r"(b));
  }
#endif
}

// d = init + a * b for every element. The sum starts in registers that stay as they are, where one
// in place would be set anew for each product.
__device__ __forceinline__ void MmaS8K32From(int init, int d[4], const uint32_t a[4],
                                             const uint32_t b[2]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%10,%10,%10,%10};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(init));
#else
  d[0] = d[1] = d[2] = d[3] = init;
  MmaS8K32(d, a, b);
#endif
}
__device__ __forceinline__ void MmaS8K16From(int init, int d[4], const uint32_t a[2], uint32_t b) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
      "{%7,%7,%7,%7};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b), "r"(init));
#else
  d[0] = d[1] = d[2] = d[3] = init;
  MmaS8K16(d, a, b);
#endif
}

// Four 8x8 matrices of 16-bit values from shared memory; lane l points at row l % 8 of matrix l
// / 8. r[i] of lane 4 g + t: row g, columns 2t and 2t + 1 of matrix i (Trans: column g, rows 2t and
// 2t + 1).
__device__ __forceinline__ void LdMatrixX4(uint32_t r[4], const void* shared_row) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}
__device__ __forceinline__ void LdMatrixX4Trans(uint32_t r[4], const void* shared_row) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}

// 16 bytes to shared memory past the registers; zeros when not valid (global is not read then). A
// thread sees its own copies after CpAsyncWait, others' after a barrier behind it. sm_75 copies at
// once.
__device__ __forceinline__ void CpAsync16(void* shared, const void* global, bool valid = true) {
#if __CUDA_ARCH__ >= 800
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(at), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
#else
  *static_cast<uint4*>(shared) =
      valid ? __ldg(static_cast<const uint4*>(global)) : make_uint4(0, 0, 0, 0);
#endif
}
__device__ __forceinline__ void CpAsyncCommit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most kGroupsLeft of the thread's youngest groups are still on their way.
template <int kGroupsLeft>
__device__ __forceinline__ void CpAsyncWait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
#endif
}

// A load of data that is read once: weights pass by the L1 cache and leave it to the activations.
// T has 1, 2, 4, 8 or 16 bytes; p is aligned to it.
template <typename T>
__device__ __forceinline__ T LoadStream(const void* p) {
  union {
    T value;
    uint32_t word[4];
    uint16_t half;
    uint8_t byte;
  } v;
  if constexpr (sizeof(T) == 16) {
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
        : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
        : "l"(p));
  } else if constexpr (sizeof(T) == 8) {
    asm("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];"
        : "=r"(v.word[0]), "=r"(v.word[1])
        : "l"(p));
  } else if constexpr (sizeof(T) == 4) {
    asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v.word[0]) : "l"(p));
  } else if constexpr (sizeof(T) == 2) {
    asm("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(v.half) : "l"(p));
  } else {
    static_assert(sizeof(T) == 1);
    uint32_t wide;
    asm("ld.global.nc.L1::no_allocate.u8 %0, [%1];" : "=r"(wide) : "l"(p));
    v.byte = static_cast<uint8_t>(wide);
  }
  return v.value;
}

// Asks for the line of memory at p to be in the L2 cache.
__device__ __forceinline__ void PrefetchL2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// Launches overlap on sm_90 and up (launch.cuh): a kernel begins while the one before it in the
// stream still runs, as soon as all blocks of that one have called GridTrigger. What that one wrote
// is there after GridWait, which every kernel calls before it reads or writes anything but weights.
__device__ __forceinline__ void GridTrigger() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void GridWait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n\tgriddepcontrol.wait;" ::: "memory");
#endif
}

// Words that other GPUs and the host read and write while the kernel runs. What a thread did before
// a release, and what others of the block did before a barrier ahead of it, is seen by whoever sees
// the word with an acquire, and by its block behind a barrier.
__device__ __forceinline__ uint32_t LoadAcquireSystem(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.acquire.sys.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void StoreReleaseSystem(uint32_t* p, uint32_t v) {
  asm volatile("st.release.sys.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
// Without an order; never from an L1 cache, which does not see what others write.
__device__ __forceinline__ uint32_t LoadSystem(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.relaxed.sys.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ float LoadSystem(const float* p) {
  float v;
  asm volatile("ld.relaxed.sys.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ float4 LoadSystem4(const float* p) {
  float4 v;
  asm volatile("ld.relaxed.sys.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
__device__ __forceinline__ void StoreSystem(uint32_t* p, uint32_t v) {
  asm volatile("st.relaxed.sys.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// Between two looks at such a word.
__device__ __forceinline__ void SpinPause() {}

// Of the GPU's clock of real time, which moves on by a microsecond or so.
__device__ __forceinline__ uint64_t ClockNs() {
  uint64_t ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
  return ns;
}

// 2^x, to about 2 ulp.
__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace shoal::cuda

#endif
