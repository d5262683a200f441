// Prompt lookup against a search through the whole text, and the record of how drafts held.
#include "parallel/drafter.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

namespace shoal {
namespace {

// The latest place where the last n tokens stood before; 0: none.
size_t LatestMatch(const std::vector<int32_t>& t, size_t n) {
  for (size_t p = t.size() - 1; p >= n; --p) {
    if (std::equal(t.end() - n, t.end(), t.begin() + p - n)) return p;
  }
  return 0;
}

std::vector<int32_t> GoOn(std::vector<int32_t> t, size_t from, int n) {
  const size_t length = t.size();
  for (int i = 0; i < n; ++i) t.push_back(t[from + i]);
  return {t.begin() + length, t.end()};
}

TEST(NgramDrafter, FindsTheLatestOfTheLongest) {
  std::mt19937 random(1);
  for (const int letters : {2, 5, 40}) {
    NgramDrafter drafter;
    std::vector<int32_t> text;
    int matches = 0, same = 0;
    for (int i = 0; i < 120; ++i) {  // few, so that a slot is seldom taken twice
      text.push_back(static_cast<int32_t>(random() % letters));
      if (text.size() < 6) continue;
      size_t at = 0;
      for (const int n : NgramIndex::kSizes) {
        if (at == 0) at = LatestMatch(text, n);
      }
      const Draft draft = drafter.Propose(1, text, 4);
      if (at == 0) {
        EXPECT_TRUE(draft.tokens.empty());
        continue;
      }
      ++matches;
      same += draft.tokens == GoOn(text, at, 4) ? 1 : 0;
      if (draft.tokens.empty()) continue;
      EXPECT_GE(draft.evidence, 2);
      EXPECT_LE(draft.evidence, NgramIndex::kLongestMatch);
    }
    EXPECT_GT(matches, 0);
    EXPECT_GE(same, matches * 3 / 4) << letters << " letters";
  }
}

TEST(NgramDrafter, GoesOnAsBefore) {
  NgramDrafter drafter;
  const std::vector<int32_t> text = {9, 1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3};
  const Draft draft = drafter.Propose(1, text, 5);
  EXPECT_EQ(draft.tokens, (std::vector<int32_t>{4, 5, 6, 7, 8}));
  EXPECT_EQ(draft.evidence, 3);
  EXPECT_TRUE(drafter.Propose(2, {{1, 2, 3, 4}}, 5).tokens.empty());
  EXPECT_TRUE(drafter.Propose(3, std::vector<int32_t>{1}, 5).tokens.empty());
  // The same sequence, longer.
  std::vector<int32_t> longer = text;
  longer.insert(longer.end(), {4, 5, 100, 3, 4});
  EXPECT_EQ(drafter.Propose(1, longer, 2).tokens, (std::vector<int32_t>{5, 100}));
}

TEST(NgramDrafter, ALoopGoesOnWithinTheDraft) {
  NgramDrafter drafter;
  EXPECT_EQ(drafter.Propose(1, {{5, 7, 7, 7, 7}}, 6).tokens, std::vector<int32_t>(6, 7));
  EXPECT_EQ(drafter.Propose(2, {{1, 2, 3, 1, 2, 3, 1, 2}}, 7).tokens,
            (std::vector<int32_t>{3, 1, 2, 3, 1, 2, 3}));
}

// A text that is larger than the tables, piece by piece: matches stay matches.
TEST(NgramDrafter, LongTexts) {
  NgramDrafter drafter;
  std::mt19937 random(3);
  std::vector<int32_t> text;
  int found = 0;
  for (int i = 0; i < 60'000; ++i) {
    // Pieces of what was before, and new ones.
    if (random() % 20 == 0 && text.size() > 100) {
      const size_t from = random() % (text.size() - 50);
      for (int j = 0; j < 30; ++j) text.push_back(text[from + j]);
    }
    text.push_back(static_cast<int32_t>(random() % 1000));
    const Draft draft = drafter.Propose(1, text, 3);
    if (draft.tokens.empty()) continue;
    ++found;
    // It did follow the same tokens somewhere.
    std::vector<int32_t> whole(text.end() - std::min<size_t>(draft.evidence, text.size()),
                               text.end());
    whole.push_back(draft.tokens[0]);
    if (found % 50 == 0) {
      EXPECT_NE(std::search(text.begin(), text.end(), whole.begin(), whole.end()), text.end());
    }
  }
  EXPECT_GT(found, 100);
}

TEST(DraftRecord, WorthFollowsWhatHeld) {
  DraftRecord record;
  const Draft draft{{1, 2, 3, 4, 5, 6, 7}, 2};
  EXPECT_EQ(record.Worth(draft, 0), 7);
  EXPECT_EQ(record.Worth(draft, 1), 0);
  const int at_first = record.Worth(draft, 0.1);
  for (int i = 0; i < 50; ++i) record.Learn(draft, 7);
  EXPECT_EQ(record.Worth(draft, 0.9), 7);
  EXPECT_GT(7, at_first);
  for (int i = 0; i < 50; ++i) record.Learn(draft, 0);
  EXPECT_EQ(record.Worth(draft, 0.1), 0);
  // After a while it is tried again, where that is cheap.
  int passes = 0;
  while (record.Worth(draft, 0.1) == 0 && passes < 1000) {
    record.Pass(draft);
    ++passes;
  }
  EXPECT_GT(passes, 5);
  EXPECT_LT(passes, 100);
  for (int i = 0; i < 1000; ++i) record.Pass(draft);
  EXPECT_EQ(record.Worth(draft, 0.6), 0) << "but not where it is dear";
}

}  // namespace
}  // namespace shoal
