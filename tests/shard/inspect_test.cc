// The report of `shoal inspect`.
#include "shard/inspect.h"

#include <nlohmann/json.hpp>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "shard/gguf.h"
#include "tests/shard/gguf_writer.h"

namespace shoal {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

class InspectTest : public ::testing::Test {
 protected:
  const Checkpoint& Open(const GgufWriter& w) {
    bytes_ = w.Bytes();
    std::vector<std::unique_ptr<ByteSource>> parts;
    parts.push_back(MakeMemorySource(
        "test.gguf",
        absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(bytes_.data()), bytes_.size())));
    auto c = OpenGguf(std::move(parts));
    EXPECT_TRUE(c.ok()) << c.status();
    checkpoint_ = *std::move(c);
    return *checkpoint_;
  }

 private:
  std::string bytes_;
  std::unique_ptr<Checkpoint> checkpoint_;
};

GgufWriter Model() {
  TinyModel m;
  m.dim = 64;
  m.head_dim = 8;
  m.ffn = 96;
  m.layers = 1;
  m.type = DType::kQ8_0;
  return TinyModelGguf(m);
}

TEST_F(InspectTest, TextNamesModelTensorsAndSizes) {
  const std::string text = InspectText(Open(Model()));
  EXPECT_THAT(text, HasSubstr("llama, 1 layers, dim 64, 8 heads of 8, 4 KV heads, FFN 96"));
  EXPECT_THAT(text, HasSubstr("llama.feed_forward_length"));
  EXPECT_THAT(text, HasSubstr("\"<unk>\", \"<s>\", \"</s>\""));
  EXPECT_THAT(text, HasSubstr("(320)"));
  EXPECT_THAT(text, Not(HasSubstr("<0xFF>"))) << "a long array must be shortened";
  EXPECT_THAT(text, HasSubstr("blk.0.ffn_down.weight"));
  EXPECT_THAT(text, HasSubstr("[96, 64]"));
  EXPECT_THAT(text, HasSubstr("8.5000 bits/weight"));
}

TEST_F(InspectTest, JsonCarriesTheSameNumbers) {
  const Checkpoint& c = Open(Model());
  const auto json = nlohmann::json::parse(InspectJson(c));
  EXPECT_EQ(json["model"]["ffn"], 96);
  EXPECT_EQ(json["metadata"]["general.architecture"], "llama");
  EXPECT_EQ(json["metadata"]["tokenizer.ggml.tokens"]["length"], 320);
  EXPECT_EQ(json["metadata"]["tokenizer.ggml.tokens"]["first"].size(), 8u);
  EXPECT_EQ(json["metadata"]["tokenizer.ggml.add_bos_token"], true);
  ASSERT_EQ(json["tensors"].size(), c.tensors().size());
  int64_t bytes = 0;
  for (const auto& t : json["tensors"]) bytes += t["bytes"].get<int64_t>();
  EXPECT_EQ(json["total"]["bytes"], bytes);
  EXPECT_EQ(json["types"]["q8_0"]["bits_per_weight"], 8.5);
  EXPECT_FALSE(json.contains("error"));
}

TEST_F(InspectTest, LayersWithAWindow) {
  TinyModel m;
  m.architecture = "cohere2";
  m.layers = 4;
  m.window = 16;
  GgufWriter every_third = TinyModelGguf(m);
  every_third.U32("cohere2.attention.sliding_window_pattern", 3);
  const Checkpoint& c = Open(every_third);
  EXPECT_THAT(InspectText(c), HasSubstr("sliding window 16 in all but every 3rd layer"));
  const auto json = nlohmann::json::parse(InspectJson(c))["model"];
  EXPECT_EQ(json["window_layers"], (std::vector<int>{0, 1, 3}));
  EXPECT_EQ(json["window_chunked"], false);
  EXPECT_EQ(json["norm"], "layer");
  EXPECT_EQ(json["parallel_ffn"], true);

  GgufWriter listed = TinyModelGguf(m);
  listed.I32s("cohere2.attention.sliding_window_pattern", {0, 1, 1, 0});
  EXPECT_THAT(InspectText(Open(listed)), HasSubstr("sliding window 16 in 2 of the layers"));
}

TEST_F(InspectTest, HostileNamesAreSafe) {
  GgufWriter w;
  w.String("general.architecture", "\x1b[2J\xff");
  w.Tensor("\x1b]0;title\x07\xfe", DType::kF32, {1}, std::string(4, '\0'));
  const Checkpoint& c = Open(w);
  const std::string text = InspectText(c);
  EXPECT_EQ(text.find('\x1b'), std::string::npos);
  EXPECT_THAT(text, HasSubstr("No model that can be run"));
  const auto json = nlohmann::json::parse(InspectJson(c));  // throws on what is no JSON
  EXPECT_TRUE(json.contains("error"));
}

}  // namespace
}  // namespace shoal
