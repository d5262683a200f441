// The one-shot sum: parameters of its kernel, which the host fills in. See one_shot.cuh.
#pragma once

#include <cstdint>

#include "kernels/peer_sums.h"

struct CUstream_st;

namespace shoal::cuda {

inline constexpr int kOneShotThreads = 256;
inline constexpr int kOneShotBlocks = 16;  // of the largest sum: an SM or two of any chip hold them
inline constexpr int kOneShotBlockFloats = 4096;
inline constexpr int kOneShotSlots = 2;
inline constexpr int kOneShotFlagWords = 32;  // 128 bytes apart: no two writers share a line
static_assert(int64_t{kOneShotBlocks} * kOneShotBlockFloats == PeerSums::kMostNumbers);

// What a rank gives its peers: terms [kOneShotSlots][kOneShotBlocks][kOneShotBlockFloats], then
// flags [kOneShotBlocks][kOneShotFlagWords], then up to whole pages.
inline constexpr int64_t kOneShotTermBytes =
    int64_t{4} * kOneShotSlots * kOneShotBlocks * kOneShotBlockFloats;
inline constexpr int64_t kOneShotPartBytes = kOneShotTermBytes + 4096;
static_assert(kOneShotBlocks * kOneShotFlagWords * 4 <= 4096);

// Pinned host memory of a rank: how the host and the kernels tell each other of trouble.
struct OneShotControl {
  alignas(64) uint32_t abort;    // not 0: whoever waits gives up
  uint32_t vouched;              // counts Vouch()
  alignas(64) uint32_t missing;  // of the kernel: 1 + the rank that did not come
};

// Device memory of a rank, one for each block: how many sums the block has done, so that nothing of
// it is baked into a recorded launch.
struct OneShotBlock {
  uint32_t epoch;
  uint32_t broken;  // it gave up: it writes to nobody any more
};

struct OneShotParams {
  float* data;
  int32_t count;
  int32_t rank, ranks;
  int32_t targets;  // parts that this rank's terms are written to
  float* write_to[PeerSums::kMostRanks];
  uint32_t* flag_to[PeerSums::kMostRanks];
  const float* read_from[PeerSums::kMostRanks];  // by rank; its own is not read
  const uint32_t* flag_from[PeerSums::kMostRanks];
  OneShotBlock* blocks;
  OneShotControl* control;
  uint64_t silence_ns, stall_ns;
};

// Enqueues the sum of params.data over the ranks.
void OneShotSum(const OneShotParams& params, CUstream_st* stream);

}  // namespace shoal::cuda
