// Tokenizers of real vocabularies, against the ids that the models' own tokenizers give. The files
// lie outside the project, at ../shared/data from its root; without them these tests fail.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include "launcher/tokenizer.h"
#include "launcher/utf8_stream.h"

namespace shoal {
namespace {

const char kData[] = "../shared/data/";

// Fails, with what to do, unless `path` is there. CTest shows a run without the whole folder as
// skipped.
bool Present(const std::string& path) {
  EXPECT_TRUE(std::filesystem::exists(kData))
      << "the folder " << kData << " (from the project's root) is absent: it holds the reference "
      << "vocabularies that this test compares with";
  EXPECT_TRUE(std::filesystem::exists(path)) << path << " is absent";
  return std::filesystem::exists(path);
}

std::string ReadFile(const std::string& path) {
  if (!Present(path)) return {};
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

std::unique_ptr<Tokenizer> Open(const std::string& path) {
  if (!Present(path)) return nullptr;
  auto checkpoint = OpenCheckpoint(path);
  EXPECT_TRUE(checkpoint.ok()) << checkpoint.status();
  if (!checkpoint.ok()) return nullptr;
  auto tokenizer = Tokenizer::FromCheckpoint(**checkpoint);
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  return tokenizer.ok() ? *std::move(tokenizer) : nullptr;
}

std::vector<std::string> Cases(const std::string& inp) {
  const std::string separator = "\n__ggml_vocab_test__\n";
  std::vector<std::string> cases;
  for (size_t at = 0;;) {
    const size_t end = inp.find(separator, at);
    cases.push_back(inp.substr(at, end - at));
    if (end == std::string::npos) break;
    at = end + separator.size();
  }
  if (!cases.empty() && cases.back().empty()) cases.pop_back();
  return cases;
}

class VocabularyTest : public testing::TestWithParam<std::string> {};

TEST_P(VocabularyTest, EveryCaseGivesItsIdsAndComesBack) {
  const std::string path = kData + ("vocab/ggml-vocab-" + GetParam() + ".gguf");
  auto tokenizer = Open(path);
  ASSERT_NE(tokenizer, nullptr);
  const auto cases = Cases(ReadFile(path + ".inp"));
  std::istringstream lines(ReadFile(path + ".out"));
  ASSERT_GT(cases.size(), 40u);
  for (const std::string& text : cases) {
    std::string line;
    ASSERT_TRUE(std::getline(lines, line)) << "fewer lines of ids than cases";
    std::istringstream numbers(line);
    const std::vector<int32_t> expected(std::istream_iterator<int32_t>(numbers), {});
    const auto ids = tokenizer->Encode(text, false, false);
    ASSERT_TRUE(ids.ok()) << ids.status();
    EXPECT_EQ(*ids, expected) << "case '" << text << "'";
    EXPECT_EQ(tokenizer->Decode(*ids, false), text);
    // As it would be streamed: the space prefix stays, and never half a character.
    Utf8Stream stream;
    std::string streamed;
    for (const int32_t id : *ids) {
      const std::string piece = stream.Push(tokenizer->TokenBytes(id, false));
      for (std::string_view rest = piece; !rest.empty();) {
        const size_t n = Utf8CharLength(rest);
        ASSERT_GT(n, 0u) << "half a character in '" << text << "'";
        rest.remove_prefix(n);
      }
      streamed += piece;
    }
    streamed += stream.Finish();
    if (tokenizer->model() == "llama" && !text.empty()) {
      ASSERT_EQ(streamed.substr(0, 1), " ");
      streamed.erase(0, 1);
    }
    EXPECT_EQ(streamed, text);
  }
  std::string line;
  EXPECT_FALSE(std::getline(lines, line)) << "more lines of ids than cases";
}

INSTANTIATE_TEST_SUITE_P(Files, VocabularyTest, testing::Values("gpt-2", "llama-spm", "phi-3"),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::erase(name, '-');
                           return name;
                         });

TEST(Stories260KTest, TheGgufHoldsTheSentencePieceModel) {
  auto tokenizer = Open(std::string(kData) + "stories260K/stories260K-f32.gguf");
  ASSERT_NE(tokenizer, nullptr);
  // ModelProto { repeated SentencePiece pieces = 1 { string piece = 1; float score = 2; ... } }:
  // every piece is 0x0A, its length, 0x0A, the text's length, the text, 0x15, the score, ...
  const std::string proto = ReadFile(std::string(kData) + "stories260K/tok512.model");
  size_t at = 0;
  int32_t id = 0;
  while (at + 4 < proto.size() && proto[at] == 0x0A && static_cast<uint8_t>(proto[at + 1]) < 128) {
    const size_t size = proto[at + 1], text_size = proto[at + 3];
    ASSERT_EQ(proto[at + 2], 0x0A);
    const std::string text = proto.substr(at + 4, text_size);
    EXPECT_EQ(tokenizer->FindToken(text), id) << text;
    at += 2 + size;
    ++id;
  }
  EXPECT_EQ(id, tokenizer->vocab_size());
}

// Ids from the sentencepiece library on tok512.model.
TEST(Stories260KTest, EncodesAsSentencePieceDoes) {
  auto tokenizer = Open(std::string(kData) + "stories260K/stories260K-f32.gguf");
  ASSERT_NE(tokenizer, nullptr);
  const std::pair<const char*, std::vector<int32_t>> cases[] = {
      {"Once upon a time, there was a little girl named Lily.",
       {403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 421, 395, 317, 426}},
      {"hello", {281, 306, 414}},
      {"She said, \"No!\" and ran 42 miles.",
       {338, 336, 432, 313, 458, 414, 443, 436, 269, 352, 303, 410, 484, 479, 284, 290, 406, 426}},
      {"café 中文 🦙",
       {280, 412, 431, 485, 410, 231, 187, 176, 233, 153, 138, 410, 243, 162, 169, 156}},
      {"Zigzag-Quokka\nnew line", {410, 469, 333, 451, 412, 428, 464, 473, 425, 414,
                                   433, 433, 412, 13,  416, 411, 424, 278, 271, 411}},
  };
  for (const auto& [text, ids] : cases) {
    EXPECT_EQ(*tokenizer->Encode(text, false, false), ids) << text;
  }
}

}  // namespace
}  // namespace shoal
