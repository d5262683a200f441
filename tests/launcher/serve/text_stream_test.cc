#include "launcher/text_stream.h"

#include "gtest/gtest.h"
#include "tests/launcher/serve/tiny_tokenizer.h"

namespace shoal {
namespace {

std::string PushAll(TextStream& stream, const std::string& bytes) {
  std::string shown;
  for (unsigned char b : bytes) shown += stream.Push(TinyByte(b));
  return shown;
}

TEST(TextStream, HoldsACharacterBackUntilItIsWhole) {
  const auto tokenizer = MakeTinyTokenizer({});
  TextStream stream(*tokenizer, {}, false);
  EXPECT_EQ(stream.Push(TinyByte(0xC3)), "");
  EXPECT_EQ(stream.Push(TinyByte(0xA9)), "é");
  EXPECT_EQ(stream.Push(TinyByte(0xE2)), "");
  EXPECT_EQ(stream.Finish(), "\xEF\xBF\xBD");
}

TEST(TextStream, StopStringAcrossTokensIsNeverShown) {
  const auto tokenizer = MakeTinyTokenizer({});
  TextStream stream(*tokenizer, {"END"}, false);
  EXPECT_EQ(PushAll(stream, "fish E"), "fish ");
  EXPECT_EQ(PushAll(stream, "N"), "");
  EXPECT_FALSE(stream.stopped());
  EXPECT_EQ(PushAll(stream, "D of text"), "");
  EXPECT_TRUE(stream.stopped());
  EXPECT_EQ(stream.Finish(), "");
}

TEST(TextStream, WhatOnlyLookedLikeAStopStringIsShownLater) {
  const auto tokenizer = MakeTinyTokenizer({});
  TextStream stream(*tokenizer, {"aab"}, false);
  EXPECT_EQ(PushAll(stream, "aaa"), "a");  // "aa" may still become "aab"
  EXPECT_EQ(PushAll(stream, "c"), "aac");
  EXPECT_EQ(PushAll(stream, "xa"), "x");
  EXPECT_EQ(stream.Finish(), "a");
}

TEST(TextStream, TheEarliestOfSeveralStopStringsCounts) {
  const auto tokenizer = MakeTinyTokenizer({"one two three"});
  TextStream stream(*tokenizer, {"three", "two"}, false);
  EXPECT_EQ(stream.Push(kTinyWords), "one ");
  EXPECT_TRUE(stream.stopped());
}

TEST(TextStream, EndTokensAreNoText) {
  const auto tokenizer = MakeTinyTokenizer({});
  TextStream stream(*tokenizer, {}, /*render_special=*/true);
  EXPECT_EQ(stream.Push(kTinyEos), "");
  EXPECT_EQ(stream.Push(1), "<s>");
}

}  // namespace
}  // namespace shoal
