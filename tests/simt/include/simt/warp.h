// Barriers and warp operations. The last, defaulted parameters tell the runner which line waits.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "simt/runner.h"

namespace simt {

template <typename To, typename From>
inline To BitCast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <typename T>
struct ShuffleSlot {
  T value;
  int source;  // a lane of the warp; outside of the mask the result is undefined on a GPU
  T result;
};

template <typename T>
inline T Shuffle(uint32_t mask, T value, int source, Site site) {
  ShuffleSlot<T> mine{value, source, value};
  Meet(mask, site, &mine, [](uint32_t, void* const* all) {
    for (int i = 0; i < 32; ++i) {
      auto* slot = static_cast<ShuffleSlot<T>*>(all[i]);
      if (slot == nullptr) continue;
      const auto* from = static_cast<const ShuffleSlot<T>*>(all[slot->source]);
      if (from == nullptr) Fail("a shuffle reads a lane that its mask leaves out");
      slot->result = from->value;
    }
  });
  return mine.result;
}

// Lane `lane` of segments of `width` lanes, or the caller's own where that lies outside.
inline int SegmentLane(int offset_lane, int width) {
  const int begin = Lane() / width * width;
  return offset_lane < begin || offset_lane >= begin + width ? Lane() : offset_lane;
}

struct VoteSlot {
  uint32_t value;
  uint32_t result;
};
inline uint32_t Vote(uint32_t mask, uint32_t value, Site site, Combine combine) {
  VoteSlot mine{value, 0};
  Meet(mask, site, &mine, combine);
  return mine.result;
}

}  // namespace simt

#define SIMT_SITE const char *simt_file = __builtin_FILE(), int simt_line = __builtin_LINE()
#define SIMT_HERE \
  simt::Site { simt_file, simt_line }

inline void __syncthreads(SIMT_SITE) { simt::BlockBarrier(SIMT_HERE); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, SIMT_SITE) {
  simt::Meet(mask, SIMT_HERE, nullptr, [](uint32_t, void* const*) {});
}
template <typename T>
inline T __shfl_sync(unsigned mask, T v, int lane, int width = 32, SIMT_SITE) {
  return simt::Shuffle(mask, v, simt::Lane() / width * width + (lane & (width - 1)), SIMT_HERE);
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T v, int lanes, int width = 32, SIMT_SITE) {
  return simt::Shuffle(mask, v, simt::SegmentLane(simt::Lane() ^ lanes, width), SIMT_HERE);
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T v, unsigned lanes, int width = 32, SIMT_SITE) {
  return simt::Shuffle(mask, v, simt::SegmentLane(simt::Lane() + static_cast<int>(lanes), width),
                       SIMT_HERE);
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T v, unsigned lanes, int width = 32, SIMT_SITE) {
  return simt::Shuffle(mask, v, simt::SegmentLane(simt::Lane() - static_cast<int>(lanes), width),
                       SIMT_HERE);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_SITE) {
  return simt::Vote(mask, predicate != 0, SIMT_HERE, [](uint32_t, void* const* all) {
    uint32_t bits = 0;
    for (int i = 0; i < 32; ++i) {
      if (all[i] != nullptr) bits |= static_cast<simt::VoteSlot*>(all[i])->value << i;
    }
    for (int i = 0; i < 32; ++i) {
      if (all[i] != nullptr) static_cast<simt::VoteSlot*>(all[i])->result = bits;
    }
  });
}
inline int __any_sync(unsigned mask, int predicate, SIMT_SITE) {
  return __ballot_sync(mask, predicate, simt_file, simt_line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SIMT_SITE) {
  return __ballot_sync(mask, predicate, simt_file, simt_line) == mask;
}
