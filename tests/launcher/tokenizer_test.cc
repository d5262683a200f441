// Tokenizers over small vocabularies made here: what the code promises, without any file.
#include "launcher/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "launcher/token_text.h"

namespace shoal {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr char kMark[] = "\xE2\x96\x81";

void Add(TokenizerData& data, const std::string& text, TokenType type, float score = 0) {
  data.tokens.push_back(text);
  data.types.push_back(type);
  data.scores.push_back(score);
}

// <unk> <s> </s>, 256 byte tokens, then a few pieces; "hello" needs a chain of merges.
TokenizerData SentencePieceData(bool bytes = true) {
  TokenizerData data;
  data.model = "llama";
  Add(data, "<unk>", TokenType::kUnknown);
  Add(data, "<s>", TokenType::kControl);
  Add(data, "</s>", TokenType::kControl);
  for (int b = 0; bytes && b < 256; ++b) {
    constexpr char kHex[] = "0123456789ABCDEF";
    Add(data, std::string("<0x") + kHex[b / 16] + kHex[b % 16] + ">", TokenType::kByte);
  }
  float score = 0;
  for (const char* piece : {"he", "ll", "llo", "hello", "_hello", "_", "h", "e", "l", "o", "s", "<",
                            ">", "/", "</", "s>"}) {
    std::string text;
    for (const char c : std::string(piece))
      text += c == '_' ? std::string(kMark) : std::string(1, c);
    Add(data, text, TokenType::kNormal, score--);
  }
  Add(data, "<tool>", TokenType::kUserDefined);
  Add(data, "<tool>x", TokenType::kUserDefined);
  data.unk = 0;
  data.bos = 1;
  data.eos = 2;
  data.add_bos = true;
  data.add_space_prefix = true;
  return data;
}

TokenizerData ByteLevelData(const std::string& pre = "gpt-2") {
  TokenizerData data;
  data.model = "gpt2";
  data.pre = pre;
  for (int b = 0; b < 256; ++b) Add(data, ByteLetter(b), TokenType::kNormal);
  for (const char* merge : {"l l", "h e", "ll o", "he llo", "\xC4\xA0 hello", "a a", "aa aa"}) {
    data.merges.push_back(merge);
    std::string text = merge;
    text.erase(text.find(' '), 1);
    Add(data, text, TokenType::kNormal);
  }
  Add(data, "<|im_end|>", TokenType::kControl);
  data.eos = static_cast<int32_t>(data.tokens.size()) - 1;
  data.scores.clear();
  return data;
}

std::unique_ptr<Tokenizer> Make(TokenizerData data) {
  auto tokenizer = Tokenizer::FromData(std::move(data));
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  return tokenizer.ok() ? *std::move(tokenizer) : nullptr;
}

std::vector<int32_t> Plain(const Tokenizer& t, std::string_view text) {
  auto ids = t.Encode(text, false, false);
  EXPECT_TRUE(ids.ok()) << ids.status();
  return ids.value_or(std::vector<int32_t>{-99});
}

std::vector<std::string> Texts(const Tokenizer& t, const std::vector<int32_t>& ids) {
  std::vector<std::string> out;
  for (const int32_t id : ids) out.emplace_back(t.TokenText(id));
  return out;
}

TEST(SentencePieceTest, MergesTheBestScoreFirstAndPrefixesASpace) {
  auto t = Make(SentencePieceData());
  EXPECT_THAT(Texts(*t, Plain(*t, "hello")), ElementsAre("\xE2\x96\x81hello"));
  EXPECT_THAT(Texts(*t, Plain(*t, "")), ElementsAre());
  EXPECT_THAT(Texts(*t, Plain(*t, "hellol")), ElementsAre("\xE2\x96\x81hello", "l"));
}

TEST(SentencePieceTest, SpacePrefixCanBeSwitchedOff) {
  TokenizerData data = SentencePieceData();
  data.add_space_prefix = false;
  auto t = Make(data);
  EXPECT_THAT(Texts(*t, Plain(*t, "hello")), ElementsAre("hello"));
  EXPECT_EQ(t->Decode(Plain(*t, " hello"), false), " hello");
}

TEST(SentencePieceTest, UnknownCharactersFallBackToBytes) {
  auto t = Make(SentencePieceData());
  EXPECT_THAT(Texts(*t, Plain(*t, "\xC3\xA9")), ElementsAre("\xE2\x96\x81", "<0xC3>", "<0xA9>"));
  const std::string bad = std::string("\xFF\xC3h\0\xED\xA0\x80", 7);
  EXPECT_EQ(t->Decode(Plain(*t, bad), false), bad) << "bytes that are not UTF-8 survive";
}

TEST(SentencePieceTest, WithoutByteTokensARunOfUnknownsIsOneToken) {
  auto t = Make(SentencePieceData(/*bytes=*/false));
  EXPECT_THAT(Texts(*t, Plain(*t,
                              "h\xC3\xA9zz"
                              "h")),
              ElementsAre("\xE2\x96\x81", "h", "<unk>", "h"));
}

TEST(SentencePieceTest, PlainTextCannotSpellControlTokens) {
  auto t = Make(SentencePieceData());
  for (const char* text : {"<s>", "</s>", "<unk>", "<0x41>"}) {
    for (const int32_t id : Plain(*t, text)) {
      EXPECT_NE(t->type(id), TokenType::kControl) << text;
      EXPECT_NE(t->type(id), TokenType::kUnknown) << text;
    }
    EXPECT_EQ(t->Decode(Plain(*t, text), false), text);
  }
  EXPECT_THAT(*t->Encode("</s>", false, true), ElementsAre(2));
}

TEST(SentencePieceTest, UserDefinedTokensAreFoundInAnyTextLongestFirst) {
  auto t = Make(SentencePieceData());
  EXPECT_THAT(Texts(*t, Plain(*t, "<tool>xhello<tool>")),
              ElementsAre("<tool>x", "\xE2\x96\x81hello", "<tool>"));
}

TEST(SentencePieceTest, AddsBosAndEosAsTheModelSays) {
  TokenizerData data = SentencePieceData();
  auto t = Make(data);
  EXPECT_THAT(*t->Encode("", true, false), ElementsAre(1));
  data.add_bos = false;
  data.add_eos = true;
  t = Make(data);
  EXPECT_THAT(*t->Encode("", true, false), ElementsAre(2));
  EXPECT_THAT(*t->Encode("", false, false), ElementsAre());
}

TEST(SentencePieceTest, DecodeUndoesTheSpacePrefixOnce) {
  auto t = Make(SentencePieceData());
  EXPECT_EQ(t->Decode(*t->Encode("hello hello", true, false), false), "hello hello");
  EXPECT_EQ(t->Decode(*t->Encode(" hello", true, false), false), " hello");
  EXPECT_EQ(t->Decode(*t->Encode("hello", true, false), true), "<s>hello");
  const std::vector<int32_t> ids = {-5, 1 << 30, t->FindToken("he")};
  EXPECT_EQ(t->Decode(ids, true), "he") << "ids outside the vocabulary give nothing";
  EXPECT_EQ(t->TokenBytes(t->FindToken("\xE2\x96\x81hello"), false), " hello");
  EXPECT_EQ(t->TokenBytes(1, false), "");
  EXPECT_EQ(t->TokenBytes(1, true), "<s>");
}

TEST(SentencePieceTest, WhiteSpaceAfterSpecialTokensIsEatenWhereTheModelWasTrainedSo) {
  TokenizerData data = SentencePieceData();
  data.add_space_prefix = false;
  data.strip_after_special = true;
  auto t = Make(data);
  EXPECT_THAT(Texts(*t, Plain(*t, "<tool> \n hello")), ElementsAre("<tool>", "hello"));
}

TEST(ByteLevelTest, MergesByRankWithinWords) {
  auto t = Make(ByteLevelData());
  EXPECT_THAT(Texts(*t, Plain(*t, "hello hello")), ElementsAre("hello", "\xC4\xA0hello"));
  EXPECT_THAT(Texts(*t, Plain(*t, "aaaaa")), ElementsAre("aaaa", "a"));
}

TEST(ByteLevelTest, EveryByteStringComesBack) {
  auto t = Make(ByteLevelData());
  std::string all;
  for (int i = 0; i < 256; ++i) all += static_cast<char>(i);
  for (const std::string& text : {all, std::string("\xE2\x82"), std::string("a\0b", 3)}) {
    EXPECT_EQ(t->Decode(Plain(*t, text), false), text);
  }
}

TEST(ByteLevelTest, SpecialTokensOnlyWhenAsked) {
  auto t = Make(ByteLevelData());
  EXPECT_THAT(*t->Encode("<|im_end|>", true, true), ElementsAre(t->eos()));
  const auto plain = Plain(*t, "<|im_end|>");
  EXPECT_GT(plain.size(), 1u);
  EXPECT_EQ(t->Decode(plain, false), "<|im_end|>");
  EXPECT_TRUE(t->IsEndOfGeneration(t->eos()));
  EXPECT_FALSE(t->IsEndOfGeneration(0));
  EXPECT_FALSE(t->IsEndOfGeneration(-1));
}

TEST(ByteLevelTest, AWholeWordTokenWinsOverMergesWhereTheModelSaysSo) {
  TokenizerData data = ByteLevelData("llama-bpe");
  Add(data, "hellollo", TokenType::kNormal);  // no merges lead to it
  data.scores.clear();
  auto t = Make(data);
  EXPECT_THAT(Texts(*t, Plain(*t, "hellollo")), ElementsAre("hellollo"));
  data.pre = "gpt-2";
  t = Make(data);
  EXPECT_THAT(Texts(*t, Plain(*t, "hellollo")), ElementsAre("hello", "llo"));
}

TEST(ByteLevelTest, AByteWithoutATokenIsAnErrorUnlessThereIsAnUnknownToken) {
  TokenizerData data = ByteLevelData();
  const size_t z = 'z';
  data.tokens[z] = "gone";
  auto t = Make(data);
  const auto ids = t->Encode("z", false, false);
  EXPECT_EQ(ids.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(ids.status().message()), HasSubstr("0x7a"));
  data.unk = static_cast<int32_t>(z);
  EXPECT_THAT(Plain(*Make(data), "zz"), ElementsAre(z));
}

// Words cut by each family of patterns; the expected cuts follow from the published expressions.
TEST(PreTokenizerTest, CutsWordsAsTheModelsWereTrained) {
  const std::string text = "I'LL pay 12345 don't\n\n  x_y \xE4\xB8\xAD\xE6\x96\x87 CamelCase";
  const std::map<std::string, std::vector<std::string>> expected = {
      {"gpt-2",
       {"I", "'", "LL", " pay", " 12345", " don", "'t", "\n\n ", " x", "_", "y",
        " \xE4\xB8\xAD\xE6\x96\x87", " CamelCase"}},
      {"llama-bpe",
       {"I", "'LL", " pay", " ", "123", "45", " don", "'t", "\n\n", " ", " x", "_y",
        " \xE4\xB8\xAD\xE6\x96\x87", " CamelCase"}},
      {"qwen2",
       {"I", "'LL", " pay", " ", "1", "2", "3", "4", "5", " don", "'t", "\n\n", " ", " x", "_y",
        " \xE4\xB8\xAD\xE6\x96\x87", " CamelCase"}},
      {"starcoder",
       {"I", "'", "LL", " pay", " ", "1", "2", "3", "4", "5", " don", "'t", "\n\n ", " x", "_", "y",
        " \xE4\xB8\xAD\xE6\x96\x87", " CamelCase"}},
      {"falcon",
       {"I", "'", "LL", " pay", " ", "123", "45", " don", "'", "t", "\n\n ", " x", "_", "y",
        " \xE4\xB8\xAD\xE6\x96\x87", " CamelCase"}},
      {"gpt-4o",
       {"I'LL", " pay", " ", "123", "45", " don't", "\n\n", " ", " x", "_y",
        " \xE4\xB8\xAD\xE6\x96\x87", " Camel", "Case"}},
      {"deepseek-coder", {"I",         "'", "LL", " pay", " ", "1", "2",
                          "3",         "4", "5",  " don", "'", "t", "\n",
                          "\n",        " ", " x", "_",    "y", " ", "\xE4\xB8\xAD\xE6\x96\x87",
                          " CamelCase"}},
  };
  for (const auto& [name, words] : expected) {
    auto pre = PreTokenizer::Create(name);
    ASSERT_TRUE(pre.ok()) << pre.status();
    std::vector<int32_t> ends;
    ASSERT_TRUE((*pre)->Split(text, &ends).ok());
    std::vector<std::string> found;
    int32_t begin = 0;
    for (const int32_t end : ends) {
      found.push_back(text.substr(begin, end - begin));
      begin = end;
    }
    EXPECT_EQ(found, words) << name;
  }
}

TEST(PreTokenizerTest, EveryKnownNameKeepsEveryByte) {
  std::string text = "Mixed \xFF bytes\t\r\n 0123 \xE0\xA4\xA8\xE0\xA4\xAE ?!";
  std::string names = KnownPreTokenizers();
  for (size_t at = 0; at < names.size();) {
    const size_t comma = std::min(names.find(", ", at), names.size());
    const std::string name = names.substr(at, comma - at);
    at = comma + 2;
    auto t = Make(ByteLevelData(name));
    ASSERT_NE(t, nullptr) << name;
    EXPECT_EQ(t->Decode(Plain(*t, text), false), text) << name;
  }
}

TEST(PreTokenizerTest, UnknownNameIsRefusedWithTheKnownOnes) {
  auto t = Tokenizer::FromData(ByteLevelData("klingon"));
  EXPECT_EQ(t.status().code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(std::string(t.status().message()), HasSubstr("klingon"));
  EXPECT_THAT(std::string(t.status().message()), HasSubstr("qwen2"));
}

// Quadratic code would need hours here; the test's own time limit is the assertion.
TEST(TokenizerTest, AMegabyteOfOneLetter) {
  const std::string text(1 << 20, 'a');
  std::vector<std::unique_ptr<Tokenizer>> tokenizers;
  tokenizers.push_back(Make(SentencePieceData()));
  for (const char* pre : {"default", "gpt-2", "llama-bpe", "qwen2", "deepseek-llm",
                          "deepseek-coder", "falcon", "starcoder", "refact", "gpt-4o"}) {
    tokenizers.push_back(Make(ByteLevelData(pre)));
  }
  for (const auto& t : tokenizers) {
    const auto ids = Plain(*t, text);
    EXPECT_EQ(ids.size(), t->model() == "gpt2" ? text.size() / 4 : text.size() + 1) << t->pre();
    EXPECT_EQ(t->Decode(ids, false), text) << t->pre();
  }
  for (const char* run : {" ", "\n", "A", "1", ".", "\xE4\xB8\xAD"}) {
    std::string long_run;
    while (long_run.size() < 50000) long_run += run;
    for (const auto& t : tokenizers) EXPECT_EQ(t->Decode(Plain(*t, long_run), false), long_run);
  }
}

TEST(TokenizerTest, ThreadsShareOne) {
  auto t = Make(ByteLevelData("gpt-4o"));
  const auto expected = Plain(*t, "hello Hello 123");
  std::vector<std::thread> threads;
  std::vector<std::vector<int32_t>> found(4);
  for (auto& f : found) {
    threads.emplace_back([&f, &t] { f = *t->Encode("hello Hello 123", false, false); });
  }
  for (auto& thread : threads) thread.join();
  for (const auto& f : found) EXPECT_EQ(f, expected);
}

TEST(TokenizerTest, EndOfGenerationKnowsTheUsualNames) {
  TokenizerData data = SentencePieceData();
  Add(data, "<end_of_turn>", TokenType::kControl);
  Add(data, "<|end|>", TokenType::kControl);
  const int32_t end = static_cast<int32_t>(data.tokens.size()) - 1;
  auto t = Make(data);
  EXPECT_THAT(t->end_of_generation_ids(), ElementsAre(2, end - 1, end));
  // In the harmony format a message's end is not the turn's.
  Add(data, "<|return|>", TokenType::kControl);
  Add(data, "<|call|>", TokenType::kControl);
  t = Make(data);
  EXPECT_FALSE(t->IsEndOfGeneration(end));
  EXPECT_TRUE(t->IsEndOfGeneration(end + 1));
}

struct Hostile {
  const char* what;
  void (*spoil)(TokenizerData&);
  const char* message;
};

TEST(TokenizerTest, MalformedVocabulariesAreRefusedByName) {
  const Hostile cases[] = {
      {"no tokens", [](TokenizerData& d) { d.tokens.clear(); }, "0 tokens"},
      {"model", [](TokenizerData& d) { d.model = "wordpiece"; }, "wordpiece"},
      {"types", [](TokenizerData& d) { d.types.pop_back(); }, "token types"},
      {"scores",
       [](TokenizerData& d) {
         d.scores = {1, 2};
       },
       "2 scores"},
      {"nan", [](TokenizerData& d) { d.scores.assign(d.tokens.size(), NAN); }, "score"},
      {"bos", [](TokenizerData& d) { d.bos = 100000; }, "100000"},
      {"eos", [](TokenizerData& d) { d.eos = -2; }, "-2"},
      {"byte", [](TokenizerData& d) { d.types[7] = TokenType::kByte; }, "token 7"},
      {"twice", [](TokenizerData& d) { d.tokens[9] = d.tokens[8]; }, "token 9 repeats"},
      {"long", [](TokenizerData& d) { d.tokens[9].assign(1 << 20, 'x'); }, "1048576 bytes"},
      {"merge", [](TokenizerData& d) { d.merges[2] = "q zz"; }, "merge 2 is 'q zz'"},
      {"merge of one", [](TokenizerData& d) { d.merges[2] = "ll"; }, "merge 2 is 'll'"},
      {"merge to control", [](TokenizerData& d) { d.types[256] = TokenType::kControl; }, "merge 0"},
  };
  for (const Hostile& c : cases) {
    TokenizerData data = ByteLevelData();
    c.spoil(data);
    auto t = Tokenizer::FromData(data);
    EXPECT_FALSE(t.ok()) << c.what;
    EXPECT_THAT(std::string(t.status().message()), HasSubstr(c.message)) << c.what;
  }
}

// A checkpoint that is only metadata.
class FakeCheckpoint : public Checkpoint {
 public:
  std::map<std::string, MetadataValue> values;

  const std::vector<TensorInfo>& tensors() const override { return tensors_; }
  const TensorInfo* FindTensor(const std::string&) const override { return nullptr; }
  const MetadataValue* FindMetadata(const std::string& key) const override {
    const auto found = values.find(key);
    return found == values.end() ? nullptr : &found->second;
  }
  std::vector<std::string> MetadataKeys() const override { return {}; }
  absl::Status Read(const TensorInfo&, int64_t, int64_t, uint8_t*) const override {
    return absl::UnimplementedError("no tensors");
  }
  std::vector<std::string> Files() const override { return {}; }
  int64_t TotalBytes() const override { return 0; }

 private:
  std::vector<TensorInfo> tensors_;
};

FakeCheckpoint SmallCheckpoint() {
  FakeCheckpoint c;
  c.values["tokenizer.ggml.model"] = std::string("llama");
  c.values["tokenizer.ggml.tokens"] = std::vector<std::string>{"<unk>", "<s>", "</s>", "a"};
  c.values["tokenizer.ggml.scores"] = std::vector<double>{0, 0, 0, -1};
  c.values["tokenizer.ggml.token_type"] = std::vector<int64_t>{2, 3, 3, 1};
  return c;
}

TEST(TokenizerFromCheckpointTest, DefaultsOfTheLlamaModel) {
  auto t = Tokenizer::FromCheckpoint(SmallCheckpoint());
  ASSERT_TRUE(t.ok()) << t.status();
  EXPECT_EQ((*t)->bos(), 1);
  EXPECT_EQ((*t)->eos(), 2);
  EXPECT_EQ((*t)->unk(), 0);
  EXPECT_THAT(*(*t)->Encode("", true, false), ElementsAre(1));
  EXPECT_EQ((*t)->chat_template(), "");
}

TEST(TokenizerFromCheckpointTest, SettingsOverrideDefaults) {
  FakeCheckpoint c = SmallCheckpoint();
  c.values["tokenizer.ggml.eos_token_id"] = uint64_t{3};
  c.values["tokenizer.ggml.add_bos_token"] = false;
  c.values["tokenizer.ggml.add_space_prefix"] = false;
  c.values["tokenizer.chat_template"] = std::string("{{ messages }}");
  auto t = Tokenizer::FromCheckpoint(c);
  ASSERT_TRUE(t.ok()) << t.status();
  EXPECT_EQ((*t)->eos(), 3);
  EXPECT_THAT(*(*t)->Encode("a", true, false), ElementsAre(3));
  EXPECT_EQ((*t)->chat_template(), "{{ messages }}");
}

TEST(TokenizerFromCheckpointTest, BadMetadataIsNamed) {
  const std::pair<std::string, MetadataValue> cases[] = {
      {"tokenizer.ggml.bos_token_id", uint64_t{4}},
      {"tokenizer.ggml.eos_token_id", int64_t{-1}},
      {"tokenizer.ggml.eos_token_id", ~uint64_t{0}},
      {"tokenizer.ggml.bos_token_id", std::string("1")},
      {"tokenizer.ggml.add_bos_token", uint64_t{1}},
      {"tokenizer.ggml.token_type", std::vector<int64_t>{2, 3, 3, 9}},
      {"tokenizer.ggml.token_type", std::vector<double>{2, 3, 3, 1}},
      {"tokenizer.ggml.scores", std::string("x")},
      {"tokenizer.ggml.tokens", std::vector<int64_t>{1}},
      {"tokenizer.chat_template", uint64_t{1}},
  };
  for (const auto& [key, value] : cases) {
    FakeCheckpoint c = SmallCheckpoint();
    c.values[key] = value;
    auto t = Tokenizer::FromCheckpoint(c);
    EXPECT_EQ(t.status().code(), absl::StatusCode::kInvalidArgument) << key;
    EXPECT_THAT(std::string(t.status().message()), HasSubstr(key));
  }
  FakeCheckpoint c = SmallCheckpoint();
  c.values["tokenizer.ggml.model"] = std::string("bert");
  EXPECT_EQ(Tokenizer::FromCheckpoint(c).status().code(), absl::StatusCode::kUnimplemented);
  EXPECT_EQ(Tokenizer::FromCheckpoint(FakeCheckpoint()).status().code(),
            absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace shoal
