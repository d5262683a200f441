// Blocks are never handed out twice; cached prefixes are found until their memory is needed.
#include "parallel/block_allocator.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <iterator>
#include <random>
#include <set>

namespace shoal {
namespace {

PrefixHash HashOf(int n) { return {static_cast<uint64_t>(n), 1}; }

TEST(BlockAllocator, HandsOutEachBlockOnce) {
  BlockAllocator a(3);
  std::set<int> got;
  for (int i = 0; i < 3; ++i) got.insert(*a.Allocate());
  EXPECT_EQ(got.size(), 3u);
  EXPECT_FALSE(a.Allocate().has_value());
  a.Release(1);
  EXPECT_EQ(*a.Allocate(), 1);
}

TEST(BlockAllocator, KeepsReleasedPrefixUntilNeeded) {
  BlockAllocator a(2);
  const int b = *a.Allocate();
  a.Publish(b, HashOf(1));
  a.Release(b);
  EXPECT_EQ(a.available(), 2);
  EXPECT_EQ(a.Lookup(HashOf(1)).value_or(-1), b);
  a.Release(b);
  ASSERT_TRUE(a.Allocate().has_value());  // the other block first
  EXPECT_TRUE(a.Contains(HashOf(1)));
  ASSERT_TRUE(a.Allocate().has_value());  // now its memory is needed
  EXPECT_FALSE(a.Contains(HashOf(1)));
}

TEST(BlockAllocator, EvictsLeastRecentlyUsedFirst) {
  BlockAllocator a(3);
  int blocks[3];
  for (int i = 0; i < 3; ++i) {
    blocks[i] = *a.Allocate();
    a.Publish(blocks[i], HashOf(i));
  }
  a.Release(blocks[1]);
  a.Release(blocks[0]);
  a.Release(blocks[2]);
  EXPECT_EQ(*a.Allocate(), blocks[1]);
  EXPECT_EQ(*a.Allocate(), blocks[0]);
}

TEST(BlockAllocator, SaltAndOrderChangeTheHash) {
  const int32_t x[] = {1, 2}, y[] = {2, 1};
  const PrefixHash none, salt{5, 0};
  EXPECT_FALSE(ExtendPrefix(none, x) == ExtendPrefix(none, y));
  EXPECT_FALSE(ExtendPrefix(none, x) == ExtendPrefix(salt, x));
  EXPECT_FALSE(ExtendPrefix(ExtendPrefix(none, x), y) == ExtendPrefix(ExtendPrefix(none, y), x));
}

TEST(BlockAllocator, RandomUseKeepsCounts) {
  std::mt19937 rng(1);
  BlockAllocator a(17);
  std::multiset<int> held;
  for (int step = 0; step < 100000; ++step) {
    const int what = static_cast<int>(rng() % 4);
    if (what == 0) {
      if (const auto b = a.Allocate()) {
        ASSERT_EQ(held.count(*b), 0u) << "a block in use was handed out again";
        held.insert(*b);
      } else {
        ASSERT_EQ(std::set<int>(held.begin(), held.end()).size(), 17u);
      }
    } else if (what == 1) {
      if (const auto b = a.Lookup(HashOf(static_cast<int>(rng() % 40)))) held.insert(*b);
    } else if (!held.empty()) {
      auto it = std::next(held.begin(), static_cast<long>(rng() % held.size()));
      if (what == 2) {
        a.Publish(*it, HashOf(static_cast<int>(rng() % 40)));
      } else {
        a.Release(*it);
        held.erase(it);
      }
    }
    ASSERT_EQ(a.in_use(), static_cast<int>(std::set<int>(held.begin(), held.end()).size()));
  }
}

TEST(BlockAllocator, ForgottenAndRestored) {
  BlockAllocator a(4);
  const PrefixHash x{1, 1}, y{2, 2};
  const std::vector<std::pair<int, PrefixHash>> held = {{2, x}, {0, y}, {3, x}};
  a.Restore(held);
  EXPECT_EQ(a.available(), 4);
  EXPECT_EQ(a.Lookup(x), 2);
  a.Forget(2);  // while it is used
  EXPECT_FALSE(a.Contains(x));
  EXPECT_EQ(a.in_use(), 1);
  a.Release(2);
  a.Forget(0);  // while it is not
  EXPECT_FALSE(a.Contains(y));
  std::vector<int> all;
  for (int i = 0; i < 4; ++i) all.push_back(*a.Allocate());
  std::sort(all.begin(), all.end());
  EXPECT_EQ(all, (std::vector<int>{0, 1, 2, 3}));
  EXPECT_EQ(a.Allocate(), std::nullopt);
}

}  // namespace
}  // namespace shoal
