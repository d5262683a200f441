// A sum over GPUs of one host in one kernel: terms are written to where the peers read them, a flag
// says that they are there, and everybody adds all terms in the order of the ranks.
//
// Blocks with the same number on the ranks work together and know nothing of the other blocks: each
// has its slice of the numbers, its part of a slot, its flags and its count of sums (the epoch). So
// blocks need not be there at the same time, and there is no barrier over the grid. Epoch e uses
// slot e % kSlots.
//
// Two slots are enough. Block b of rank A writes a slot in epoch e + 2 that was last written in
// epoch e, and rank B read it in its epoch e. A begins e + 2 after it ended e + 1, in which it saw
// B's flag e + 1; B set that in its kernel of epoch e + 1, which began (GridWait) after its kernel
// of epoch e, with all its reads, had ended. With one slot this does not hold: B sets flag e before
// it reads the terms of e. A flag may be one epoch ahead of what is waited for, never two.
//
// A block that gave up has not seen a flag, so the above says nothing of what its peers still read:
// it writes no more (OneShotBlock::broken), and the host knows (OneShotControl::missing, or from
// whoever set abort).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/one_shot.h"

namespace shoal::cuda {

// The host's words lie behind PCIe: a wait asks for them after so many looks at its flag.
inline constexpr uint32_t kOneShotLooks = 64;

// Until the flag is at `epoch`. False: the host says so, or nothing came for too long.
__device__ inline bool WaitForPeer(const OneShotParams& p, int peer, uint32_t epoch) {
  const uint32_t* const flag = p.flag_from[peer] + blockIdx.x * kOneShotFlagWords;
  uint64_t begin = 0, silent_since = 0;
  uint32_t vouched = 0;
  for (uint32_t looks = 1;; ++looks) {
    if (static_cast<int32_t>(LoadAcquireSystem(flag) - epoch) >= 0) return true;
    SpinPause();
    if (looks % kOneShotLooks != 0) continue;
    if (LoadSystem(&p.control->abort) != 0) return false;
    const uint64_t now = ClockNs();
    if (begin == 0) {
      begin = silent_since = now;
      vouched = LoadSystem(&p.control->vouched);
    }
    if (now - silent_since <= p.silence_ns) continue;
    const uint32_t said = LoadSystem(&p.control->vouched);
    if (said == vouched || now - begin > p.stall_ns) {
      StoreSystem(&p.control->missing, static_cast<uint32_t>(peer) + 1);
      StoreSystem(&p.control->abort, 1);
      return false;
    }
    vouched = said;
    silent_since = now;
  }
}

// This rank's terms [n] to all that read them, `at` floats into the slots.
__device__ inline void WriteTerms(const OneShotParams& p, const float* data, int n, int wide,
                                  int64_t at) {
  for (int i = static_cast<int>(threadIdx.x); i < wide; i += kOneShotThreads) {
    const float4 v = reinterpret_cast<const float4*>(data)[i];
    for (int t = 0; t < p.targets; ++t) reinterpret_cast<float4*>(p.write_to[t] + at)[i] = v;
  }
  for (int i = 4 * wide + static_cast<int>(threadIdx.x); i < n; i += kOneShotThreads) {
    for (int t = 0; t < p.targets; ++t) p.write_to[t][at + i] = data[i];
  }
}

// data[n] becomes the sum. All loads of a thread are under way before the first is added.
__device__ inline void AddTerms(const OneShotParams& p, float* data, int n, int wide, int64_t at) {
  constexpr int kMost = PeerSums::kMostRanks;
  for (int i = static_cast<int>(threadIdx.x); i < wide; i += kOneShotThreads) {
    float4 term[kMost] = {};
#pragma unroll
    for (int r = 0; r < kMost; ++r) {
      if (r >= p.ranks) continue;
      term[r] = r == p.rank ? reinterpret_cast<const float4*>(data)[i]
                            : LoadSystem4(p.read_from[r] + at + 4 * i);
    }
    float4 sum = term[0];
#pragma unroll
    for (int r = 1; r < kMost; ++r) {
      if (r >= p.ranks) continue;
      sum.x += term[r].x;
      sum.y += term[r].y;
      sum.z += term[r].z;
      sum.w += term[r].w;
    }
    reinterpret_cast<float4*>(data)[i] = sum;
  }
  for (int i = 4 * wide + static_cast<int>(threadIdx.x); i < n; i += kOneShotThreads) {
    float sum = 0;
    for (int r = 0; r < p.ranks; ++r) {
      const float term = r == p.rank ? data[i] : LoadSystem(p.read_from[r] + at + i);
      sum = r == 0 ? term : sum + term;
    }
    data[i] = sum;
  }
}

template <int kSlots>
static __global__ void __launch_bounds__(kOneShotThreads) OneShotKernel(OneShotParams p) {
  GridWait();
  const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  const OneShotBlock state = p.blocks[block];
  if (state.broken != 0) return;
  const uint32_t epoch = state.epoch + 1;
  const int64_t at =
      (static_cast<int64_t>(epoch % kSlots) * kOneShotBlocks + block) * kOneShotBlockFloats;
  // Slices begin at multiples of four numbers.
  const int blocks = static_cast<int>(gridDim.x);
  const int slice = ((p.count + blocks - 1) / blocks + 3) / 4 * 4;
  const int begin = min(block * slice, p.count), n = min(slice, p.count - begin);
  float* const data = p.data + begin;
  const int wide = reinterpret_cast<uintptr_t>(data) % 16 == 0 ? n / 4 : 0;

  WriteTerms(p, data, n, wide, at);
  int& gave_up = StaticShared<int>();
  if (thread == 0) gave_up = 0;
  __syncthreads();
  // Released at the system's scope, behind the barrier: with the flag, the terms of all threads.
  if (thread < p.targets) StoreReleaseSystem(p.flag_to[thread] + block * kOneShotFlagWords, epoch);
  if (thread < p.ranks && thread != p.rank && !WaitForPeer(p, thread, epoch)) gave_up = 1;
  __syncthreads();
  if (gave_up != 0) {
    if (thread == 0) p.blocks[block].broken = 1;
    return;
  }
  AddTerms(p, data, n, wide, at);
  if (thread == 0) p.blocks[block].epoch = epoch;
}

}  // namespace shoal::cuda
