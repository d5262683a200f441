#include "launcher/utf8_stream.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace shoal {
namespace {

std::string Stream(const std::vector<std::string>& pieces) {
  Utf8Stream stream;
  std::string out;
  for (const auto& piece : pieces) out += stream.Push(piece);
  return out + stream.Finish();
}

bool IsWellFormed(std::string_view text) {
  while (!text.empty()) {
    const size_t n = Utf8CharLength(text);
    if (n == 0) return false;
    text.remove_prefix(n);
  }
  return true;
}

TEST(Utf8CharLengthTest, AcceptsExactlyWellFormedCharacters) {
  EXPECT_EQ(Utf8CharLength("a"), 1u);
  EXPECT_EQ(Utf8CharLength("\xC3\xA9x"), 2u);
  EXPECT_EQ(Utf8CharLength("\xE2\x96\x81"), 3u);
  EXPECT_EQ(Utf8CharLength("\xF0\x9F\xA6\x99"), 4u);
  EXPECT_EQ(Utf8CharLength("\x80"), 0u) << "stray continuation byte";
  EXPECT_EQ(Utf8CharLength("\xC0\x80"), 0u) << "overlong";
  EXPECT_EQ(Utf8CharLength("\xE0\x80\x80"), 0u) << "overlong";
  EXPECT_EQ(Utf8CharLength("\xED\xA0\x80"), 0u) << "surrogate";
  EXPECT_EQ(Utf8CharLength("\xF4\x90\x80\x80"), 0u) << "above U+10FFFF";
  EXPECT_EQ(Utf8CharLength("\xE2\x96"), 0u) << "cut off";
}

TEST(Utf8StreamTest, HoldsBackACharacterUntilItIsWhole) {
  Utf8Stream stream;
  EXPECT_EQ(stream.Push("a\xF0\x9F"), "a");
  EXPECT_EQ(stream.Push("\xA6"), "");
  EXPECT_EQ(stream.Push("\x99z"), "\xF0\x9F\xA6\x99z");
  EXPECT_EQ(stream.Finish(), "");
}

TEST(Utf8StreamTest, UnfinishedCharacterBecomesOneReplacement) {
  EXPECT_EQ(Stream({"ab\xF0\x9F\xA6"}), "ab\xEF\xBF\xBD");
  Utf8Stream stream;
  EXPECT_EQ(stream.Push("\xE2"), "");
  EXPECT_EQ(stream.Finish(), "\xEF\xBF\xBD");
  EXPECT_EQ(stream.Push("ok"), "ok") << "usable after Finish";
}

// Expected values: Python's bytes.decode(errors='replace').
TEST(Utf8StreamTest, BadBytesAreReplacedByLongestPrefix) {
  const std::string r = "\xEF\xBF\xBD";
  EXPECT_EQ(Stream({"\x80\x81"}), r + r);
  EXPECT_EQ(Stream({"\xE2\x96x"}), r + "x");
  EXPECT_EQ(Stream({"\xF0\x9F\xF0\x9F\xA6\x99"}), r + "\xF0\x9F\xA6\x99");
  EXPECT_EQ(Stream({"\xED\xA0\x80"}), r + r + r);
  EXPECT_EQ(Stream({"\xC0\xAF"}), r + r);
}

TEST(Utf8StreamTest, AnyCutOfAnyBytesGivesTheSameWellFormedText) {
  const std::string bytes =
      "h\xC3\xA9 \xE2\x82\xAC\xFF\xF0\x9F\xA6\x99\xF0\x9F\xED\xA0\x80\xE2\x96"
      "end\xC3";
  const std::string whole = Stream({bytes});
  EXPECT_TRUE(IsWellFormed(whole));
  for (size_t cut = 0; cut <= bytes.size(); ++cut) {
    for (size_t cut2 = cut; cut2 <= bytes.size(); ++cut2) {
      Utf8Stream stream;
      std::string out;
      for (const auto& piece :
           {bytes.substr(0, cut), bytes.substr(cut, cut2 - cut), bytes.substr(cut2)}) {
        const std::string text = stream.Push(piece);
        EXPECT_TRUE(IsWellFormed(text)) << "cut at " << cut << " and " << cut2;
        out += text;
      }
      EXPECT_EQ(out + stream.Finish(), whole) << "cut at " << cut << " and " << cut2;
    }
  }
}

}  // namespace
}  // namespace shoal
