#include "offload/byte_ring.h"

#include <deque>
#include <random>

#include "gtest/gtest.h"

namespace shoal {
namespace {

TEST(ByteRing, StartsOverWhereTheEndIsTooShort) {
  ByteRing ring(10);
  EXPECT_EQ(ring.Push(4), 0);
  EXPECT_EQ(ring.Push(4), 4);
  EXPECT_EQ(ring.Push(3), std::nullopt);  // neither the 2 behind nor anything before is free
  ring.Pop();
  EXPECT_EQ(ring.Push(3), 0);
  EXPECT_EQ(ring.Push(1), 3);
  EXPECT_EQ(ring.Push(1), std::nullopt);
  ring.Pop();
  EXPECT_EQ(ring.Push(1), 4);
}

TEST(ByteRing, PartsNeverOverlapAndAnEmptyRingTakesAll) {
  std::mt19937 rng(3);
  for (int round = 0; round < 200; ++round) {
    const int64_t capacity = 1 + static_cast<int64_t>(rng() % 100);
    ByteRing ring(capacity);
    std::deque<std::pair<int64_t, int64_t>> parts;
    for (int step = 0; step < 300; ++step) {
      const int64_t bytes = 1 + static_cast<int64_t>(rng() % capacity);
      const auto at = ring.Push(bytes);
      if (!at.has_value()) {
        ASSERT_FALSE(parts.empty());
        ring.Pop();
        parts.pop_front();
        continue;
      }
      ASSERT_LE(*at + bytes, capacity);
      for (const auto& [begin, end] : parts) ASSERT_TRUE(*at >= end || *at + bytes <= begin);
      parts.emplace_back(*at, *at + bytes);
    }
    EXPECT_EQ(ring.empty(), parts.empty());
  }
}

}  // namespace
}  // namespace shoal
