// Blocks that leave a device's memory and come back, in any order that the fences allow.
#include "offload/kv_transfers.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "tests/offload/late_device.h"

namespace shoal {
namespace {

constexpr int kBytes = 64;
constexpr int kBuffers = 2;

struct Rig {
  explicit Rig(int seed) : device(seed), backend(device) {
    transfers = *KvTransfers::Create(backend);
    EXPECT_TRUE(transfers->UseBuffers(kBuffers).ok());
  }
  // Ops, at some time: one writes a value to the block, one sees that it is there.
  void Write(uint8_t value) {
    device.Op([this, value] { std::fill(block.begin(), block.end(), value); });
  }
  void Expect(const std::vector<uint8_t>& where, uint8_t value) {
    device.Op([&where, value] { ASSERT_THAT(where, testing::Each(value)); });
  }

  LateDevice device;
  LateBackend backend;
  std::unique_ptr<KvTransfers> transfers;
  std::vector<uint8_t> block = std::vector<uint8_t>(kBytes);
  std::vector<uint8_t> staging[kBuffers] = {std::vector<uint8_t>(kBytes),
                                            std::vector<uint8_t>(kBytes)};
};

template <typename F>
void WithManySeeds(const F& f) {
  for (int seed = 0; seed < 60; ++seed) {
    Rig rig(seed);
    f(rig);
    rig.device.Finish();
    if (testing::Test::HasFailure()) FAIL() << "seed " << seed;
  }
}

TEST(KvTransfers, WhatGoesOutIsWhatOpsBeforeHaveWritten) {
  WithManySeeds([](Rig& rig) {
    for (int i = 0; i < 6; ++i) {
      const int buffer = i % kBuffers;
      const auto value = static_cast<uint8_t>(10 + i);
      rig.Write(value);
      rig.transfers->Out(rig.staging[buffer].data(), rig.block.data(), kBytes / 2);
      rig.transfers->Out(rig.staging[buffer].data() + kBytes / 2, rig.block.data(), kBytes / 2);
      ASSERT_TRUE(rig.transfers->EndOut(buffer).ok());
      rig.Write(99);  // the block is another sequence's now
      ASSERT_TRUE(rig.transfers->AwaitOut(buffer).ok());
      ASSERT_THAT(rig.staging[buffer], testing::Each(value));
    }
  });
}

TEST(KvTransfers, BuffersAreOneThingEach) {
  WithManySeeds([](Rig& rig) {
    for (int buffer = 0; buffer < kBuffers; ++buffer) {
      rig.Write(static_cast<uint8_t>(buffer + 1));
      rig.transfers->Out(rig.staging[buffer].data(), rig.block.data(), kBytes);
      ASSERT_TRUE(rig.transfers->EndOut(buffer).ok());
    }
    for (const int buffer : {1, 0}) {
      ASSERT_TRUE(rig.transfers->AwaitOut(buffer).ok());
      ASSERT_THAT(rig.staging[buffer], testing::Each(buffer + 1));
    }
  });
}

TEST(KvTransfers, WhatComesInIsBehindTheBlocksEarlierUsesAndItsCopiesOut) {
  WithManySeeds([](Rig& rig) {
    for (int i = 0; i < 6; ++i) {
      const auto value = static_cast<uint8_t>(10 + i);
      rig.Write(value);
      rig.transfers->Out(rig.staging[0].data(), rig.block.data(), kBytes);
      ASSERT_TRUE(rig.transfers->EndOut(0).ok());
      rig.Expect(rig.block, value);
      ASSERT_TRUE(rig.transfers->BeginIn().ok());
      std::fill(rig.staging[1].begin(), rig.staging[1].end(), 200 + i);
      ASSERT_TRUE(rig.transfers->In({{rig.block.data(), rig.staging[1].data(), kBytes}}).ok());
      std::fill(rig.staging[1].begin(), rig.staging[1].end(), 7);  // the buffer is free
      rig.Expect(rig.block, static_cast<uint8_t>(200 + i));
      ASSERT_TRUE(rig.transfers->AwaitOut(0).ok());
      ASSERT_THAT(rig.staging[0], testing::Each(value));
    }
  });
}

TEST(KvTransfers, AttentionSeesThePagesOfItsLayerInTheWindow) {
  WithManySeeds([](Rig& rig) {
    for (int layer = 0; layer < 6; ++layer) {
      const auto value = static_cast<uint8_t>(layer + 1);
      for (int half = 0; half < 2; ++half) {
        std::fill(rig.staging[0].begin(), rig.staging[0].end(), value);
        ASSERT_TRUE(
            rig.transfers
                ->ToWindow(rig.block.data() + half * kBytes / 2, rig.staging[0].data(), kBytes / 2)
                .ok());
        std::fill(rig.staging[0].begin(), rig.staging[0].end(), 99);  // the next page
      }
      rig.Expect(rig.block, value);
      ASSERT_TRUE(rig.transfers->WindowIsRead().ok());
    }
  });
}

}  // namespace
}  // namespace shoal
