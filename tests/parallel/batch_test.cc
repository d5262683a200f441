// A batch survives its encoding, and no cut or altered message is read past its end.
#include "parallel/batch.h"

#include <gtest/gtest.h>

#include <thread>

namespace shoal {
namespace {

Batch MakeBatch(int rows) {
  Batch b;
  b.step = 77;
  b.decode_rows = 1;
  for (int i = 0; i < rows; ++i) b.tokens.push_back(i * 3);
  b.runs = {{0, 0, 1, 15, 1}, {2, 1, rows - 1, 0, 0}};
  b.pages.resize(1);
  b.pages[0].record = 8;
  b.pages[0].blocks[15] = 6;
  b.table = {{0, 0, 9}, {2, 0, 4}};
  b.logits = {{0, 40, 1.25f, -1}, {rows - 1, 0, 1, 5}};
  b.fetch = {1};
  return b;
}

TEST(Batch, RoundTrip) {
  const Batch b = MakeBatch(5);
  const auto back = DecodeBatch(EncodeBatch(b));
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(back->step, 77);
  EXPECT_EQ(back->tokens, b.tokens);
  ASSERT_EQ(back->runs.size(), 2u);
  EXPECT_EQ(back->runs[1].slot, 2);
  EXPECT_EQ(back->runs[0].decode, 1);
  EXPECT_EQ(back->table[1].block, 4);
  ASSERT_EQ(back->pages.size(), 1u);
  EXPECT_EQ(back->pages[0].record, 8);
  EXPECT_EQ(back->pages[0].blocks[15], 6);
  EXPECT_FLOAT_EQ(back->logits[0].inv_temperature, 1.25f);
  EXPECT_EQ(back->logits[1].target, 5);
  EXPECT_EQ(back->fetch, b.fetch);
}

TEST(Batch, EveryPrefixIsRefused) {
  const std::vector<uint8_t> bytes = EncodeBatch(MakeBatch(5));
  for (size_t n = 0; n < bytes.size(); ++n) {
    EXPECT_FALSE(DecodeBatch(absl::MakeSpan(bytes).first(n)).ok()) << n;
  }
}

TEST(Batch, HugeCountsReadNothingOutside) {
  const std::vector<uint8_t> bytes = EncodeBatch(MakeBatch(5));
  for (size_t i = 0; i + 4 <= bytes.size(); ++i) {
    std::vector<uint8_t> bad = bytes;
    for (int k = 0; k < 4; ++k) bad[i + k] = 0xff;
    DecodeBatch(bad).status().IgnoreError();  // the address sanitizer watches
  }
}

TEST(Batch, BroadcastShortAndLong) {
  for (const int rows : {2, 5000}) {
    auto worlds = MakeInProcessCommunicators(3);
    std::vector<std::thread> threads;
    std::vector<Batch> got(3);
    got[0] = MakeBatch(rows);
    for (int r = 0; r < 3; ++r) {
      threads.emplace_back([&, r] { EXPECT_TRUE(BroadcastBatch(*worlds[r], got[r]).ok()); });
    }
    for (auto& t : threads) t.join();
    for (int r = 1; r < 3; ++r) {
      EXPECT_EQ(got[r].tokens, got[0].tokens);
      EXPECT_EQ(got[r].logits.size(), 2u);
    }
  }
}

}  // namespace
}  // namespace shoal
