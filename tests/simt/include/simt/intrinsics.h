// What kernels/cuda/intrinsics.cuh does with PTX, for the runner: the same names, the fragment
// layouts of the PTX manual ("Matrix Fragments for mma").
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace shoal::cuda {
namespace simt_mma {

struct Slot {
  const uint32_t *a, *b;
  void* c;  // four floats or ints, in and out
};

// c += a * b for m16n8k(32 / kBits * 8). Value i of a register is element i from the low bits up.
// In every shape a lane 4 g + t holds of a: rows g and g + 8 by turns, columns t * n .. t * n + n -
// 1 of each half of k (n values to a register); of b: the same columns for output column g; of c:
// rows g, g, g + 8, g + 8, columns 2 t, 2 t + 1 by turns.
template <typename T, typename Sum, int kRegsA, T (*kA)(uint32_t, int), T (*kB)(uint32_t, int),
          int kValues>
void Multiply(uint32_t mask, void* const* all) {
  if (mask != 0xFFFFFFFFu) simt::Fail("mma needs all lanes of the warp");
  constexpr int kHalves = kRegsA / 2, kDepth = kHalves * 4 * kValues;
  Sum a[16][kDepth], b[8][kDepth];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* slot = static_cast<const Slot*>(all[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int h = 0; h < kHalves; ++h) {
      for (int i = 0; i < kValues; ++i) {
        const int k = (4 * h + t) * kValues + i;
        a[g][k] = kA(slot->a[2 * h], i);
        a[g + 8][k] = kA(slot->a[2 * h + 1], i);
        b[g][k] = kB(slot->b[h], i);
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto* c = static_cast<Sum*>(static_cast<const Slot*>(all[lane])->c);
    for (int i = 0; i < 4; ++i) {
      const Sum* row = a[lane / 4 + i / 2 * 8];
      const Sum* col = b[lane % 4 * 2 + i % 2];
      Sum sum = 0;
      for (int k = 0; k < kDepth; ++k) sum += row[k] * col[k];
      c[i] += sum;
    }
  }
}

inline float HalfOf(uint32_t v, int i) { return HalfToFloat(static_cast<uint16_t>(v >> (16 * i))); }
inline float Bf16Of(uint32_t v, int i) {
  return BFloat16ToFloat(static_cast<uint16_t>(v >> (16 * i)));
}
inline int S8Of(uint32_t v, int i) { return static_cast<int8_t>(v >> (8 * i)); }

}  // namespace simt_mma

inline void MmaF16(float c[4], const uint32_t a[4], const uint32_t b[2], SIMT_SITE) {
  simt_mma::Slot slot{a, b, c};
  simt::Meet(~0u, SIMT_HERE, &slot,
             simt_mma::Multiply<float, float, 4, simt_mma::HalfOf, simt_mma::HalfOf, 2>);
}
inline void MmaBf16(float c[4], const uint32_t a[4], const uint32_t b[2], SIMT_SITE) {
  simt_mma::Slot slot{a, b, c};
  simt::Meet(~0u, SIMT_HERE, &slot,
             simt_mma::Multiply<float, float, 4, simt_mma::Bf16Of, simt_mma::Bf16Of, 2>);
}
inline void MmaS8K32(int c[4], const uint32_t a[4], const uint32_t b[2], SIMT_SITE) {
  simt_mma::Slot slot{a, b, c};
  simt::Meet(~0u, SIMT_HERE, &slot,
             simt_mma::Multiply<int, int, 4, simt_mma::S8Of, simt_mma::S8Of, 4>);
}
inline void MmaS8K16(int c[4], const uint32_t a[2], uint32_t b, SIMT_SITE) {
  simt_mma::Slot slot{a, &b, c};
  simt::Meet(~0u, SIMT_HERE, &slot,
             simt_mma::Multiply<int, int, 2, simt_mma::S8Of, simt_mma::S8Of, 4>);
}
inline void MmaS8K32From(int init, int d[4], const uint32_t a[4], const uint32_t b[2], SIMT_SITE) {
  d[0] = d[1] = d[2] = d[3] = init;
  MmaS8K32(d, a, b, simt_file, simt_line);
}
inline void MmaS8K16From(int init, int d[4], const uint32_t a[2], uint32_t b, SIMT_SITE) {
  d[0] = d[1] = d[2] = d[3] = init;
  MmaS8K16(d, a, b, simt_file, simt_line);
}

namespace simt_mma {

struct LoadSlot {
  const void* row;
  uint32_t* r;
};

// Matrix i has its rows where lanes 8 i .. 8 i + 7 point. Lane 4 g + t gets row g, values 2 t and 2
// t + 1; transposed: column g, rows 2 t and 2 t + 1.
template <bool kTranspose>
void LoadMatrices(uint32_t mask, void* const* all) {
  if (mask != 0xFFFFFFFFu) simt::Fail("ldmatrix needs all lanes of the warp");
  for (int i = 0; i < 4; ++i) {
    uint16_t m[8][8];
    for (int row = 0; row < 8; ++row) {
      const void* from = static_cast<const LoadSlot*>(all[8 * i + row])->row;
      if (reinterpret_cast<uintptr_t>(from) % 16 != 0) simt::Fail("ldmatrix: a row is not aligned");
      std::memcpy(m[row], from, 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = 2 * (lane % 4);
      const uint32_t low = kTranspose ? m[t][g] : m[g][t];
      const uint32_t high = kTranspose ? m[t + 1][g] : m[g][t + 1];
      static_cast<const LoadSlot*>(all[lane])->r[i] = low | high << 16;
    }
  }
}

}  // namespace simt_mma

inline void LdMatrixX4(uint32_t r[4], const void* shared_row, SIMT_SITE) {
  simt_mma::LoadSlot slot{shared_row, r};
  simt::Meet(~0u, SIMT_HERE, &slot, simt_mma::LoadMatrices<false>);
}
inline void LdMatrixX4Trans(uint32_t r[4], const void* shared_row, SIMT_SITE) {
  simt_mma::LoadSlot slot{shared_row, r};
  simt::Meet(~0u, SIMT_HERE, &slot, simt_mma::LoadMatrices<true>);
}

// The copy happens at CpAsyncWait, as late as a GPU may do it, so reading too early shows.
struct CpAsyncQueue {
  struct Copy {
    void* to;
    const void* from;
    bool zero;
    int group;
  };
  static constexpr int kMax = 256;
  Copy copies[kMax];
  int count = 0, group = 0;
};
inline void CpAsync16(void* shared, const void* global, bool valid = true) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    simt::Fail("cp.async: not aligned to 16 bytes");
  }
  auto* queue = simt::PerThread<CpAsyncQueue>();
  if (queue->count == CpAsyncQueue::kMax) simt::Fail("cp.async: too many copies in flight");
  queue->copies[queue->count++] = {shared, global, !valid, queue->group};
}
inline void CpAsyncCommit() { ++simt::PerThread<CpAsyncQueue>()->group; }
template <int kGroupsLeft>
inline void CpAsyncWait() {
  auto* queue = simt::PerThread<CpAsyncQueue>();
  int kept = 0;
  for (int i = 0; i < queue->count; ++i) {
    const CpAsyncQueue::Copy& c = queue->copies[i];
    if (c.group >= queue->group - kGroupsLeft) {
      queue->copies[kept++] = c;
    } else if (c.zero) {
      std::memset(c.to, 0, 16);
    } else {
      std::memcpy(c.to, c.from, 16);
    }
  }
  queue->count = kept;
}

template <typename T>
inline T LoadStream(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0)
    simt::Fail("a load is not aligned to its size");
  T v;
  std::memcpy(&v, p, sizeof(T));
  return v;
}

// Reads a byte, so that the address sanitizer sees what is asked for.
inline void PrefetchL2(const void* p) { *static_cast<const volatile char*>(p); }

// Of kernels that other OS threads run at the same time.
inline uint32_t LoadAcquireSystem(const uint32_t* p) {
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
inline void StoreReleaseSystem(uint32_t* p, uint32_t v) {
  __atomic_store_n(p, v, __ATOMIC_RELEASE);
}
inline uint32_t LoadSystem(const uint32_t* p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
// Data: what has not been acquired is a race, which the race detector is to see.
inline float LoadSystem(const float* p) { return *p; }
inline float4 LoadSystem4(const float* p) { return *reinterpret_cast<const float4*>(p); }
inline void StoreSystem(uint32_t* p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
inline void SpinPause() { simt::Yield(); }
inline uint64_t ClockNs() { return simt::ClockNs(); }

inline float Exp2(float x) { return std::exp2(x); }

// Kernels of a stream run one after the other here.
inline void GridTrigger() {}
inline void GridWait() {}

inline unsigned char* DynamicShared() { return simt::DynamicSharedMemory(); }
template <typename T, int kId = 0>
inline T& StaticShared() {
  static const char tag = 0;
  return *static_cast<T*>(simt::StaticSharedMemory(&tag, sizeof(T)));
}

template <typename... Params, typename... Args>
void Launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t stream, const Args&... args) {
  simt::EnqueueKernel(stream, grid, block, shared_bytes,
                      [kernel, ... copy = static_cast<Params>(args)] { kernel(copy...); });
}
template <typename... Params, typename... Args>
void LaunchWaiting(void (*kernel)(Params...), dim3 grid, dim3 block, cudaStream_t stream,
                   const Args&... args) {
  simt::EnqueueWaitingKernel(stream, grid, block,
                             [kernel, ... copy = static_cast<Params>(args)] { kernel(copy...); });
}

}  // namespace shoal::cuda
