#include "launcher/openai_request.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/launcher/serve/tiny_tokenizer.h"

namespace shoal {
namespace {

using ::testing::HasSubstr;

class OpenAiRequestTest : public ::testing::Test {
 protected:
  OpenAiRequestTest() : tokenizer_(MakeTinyTokenizer({})) {
    auto parsed = ChatTemplate::Parse(
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
        "{% if tools %}T{{ tools|length }}{% endif %}");
    EXPECT_TRUE(parsed.ok()) << parsed.status();
    template_ = std::make_unique<ChatTemplate>(*std::move(parsed));
    model_ = {"fish", tokenizer_.get(), template_.get(), nullptr};
  }
  // The field an error names and its message, or "ok".
  std::string Chat(const std::string& fields) {
    const auto r = ParseChatRequest(
        R"({"messages": [{"role": "user", "content": "hi"}])" + fields + "}", model_);
    return r.ok() ? "ok" : ParamOf(r.status()) + ": " + std::string(r.status().message());
  }
  const std::unique_ptr<Tokenizer> tokenizer_;
  std::unique_ptr<ChatTemplate> template_;
  ModelContext model_;
};

TEST_F(OpenAiRequestTest, ChatBecomesAPrompt) {
  const auto r = ParseChatRequest(R"({"model": "fish", "messages": [
      {"role": "developer", "content": "S"},
      {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
      "max_completion_tokens": 5, "temperature": 0, "seed": 7, "stop": "x", "n": 2})",
                                  model_);
  ASSERT_TRUE(r.ok()) << r.status();
  EXPECT_EQ(tokenizer_->Decode(r->prompts.at(0), false), "s:S;u:ab;");
  EXPECT_EQ(r->generate.max_tokens, 5);
  EXPECT_EQ(r->generate.sampling.temperature, 0);
  EXPECT_EQ(r->generate.sampling.seed, 7U);
  EXPECT_EQ(r->generate.stop, std::vector<std::string>{"x"});
  EXPECT_EQ(r->n, 2);
}

TEST_F(OpenAiRequestTest, ValuesOutOfRangeAreNamed) {
  EXPECT_EQ(Chat(""), "ok");
  for (
      const auto& [fields, param] : std::vector<std::pair<std::string, std::string>>{
          {R"("temperature": -1)", "temperature"},
          {R"("temperature": "hot")", "temperature"},
          {R"("temperature": 1e999)", ""},
          {R"("top_p": 1.5)", "top_p"},
          {R"("n": 0)", "n"},
          {R"("n": 1000000000)", "n"},
          {R"("n": 1.5)", "n"},
          {R"("max_tokens": 0)", "max_tokens"},
          {R"("max_tokens": -5)", "max_tokens"},
          {R"("max_tokens": 99999999999999999999)", "max_tokens"},
          {R"("seed": "x")", "seed"},
          {R"("stop": [1])", "stop"},
          {R"("stop": "")", "stop"},
          {R"("logit_bias": {"x": 1})", "logit_bias"},
          {R"("logit_bias": {"99999": 1})", "logit_bias"},
          {R"("logit_bias": {"5": 101})", "logit_bias"},
          {R"("logit_bias": [1])", "logit_bias"},
          {R"("top_logprobs": 3)", "top_logprobs"},
          {R"("logprobs": true, "top_logprobs": 21)", "top_logprobs"},
          {R"("stream": "yes")", "stream"},
          {R"("stream_options": {})", "stream_options"},
          {R"("response_format": {"type": "yaml"})", "response_format"},
          {R"("response_format": {"type": "json_schema"})", "response_format"},
          {R"("response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}})",
           "response_format"},
          {R"("tools": {})", "tools"},
          {R"("tools": [{}])", "tools"},
          {R"("tool_choice": "always", "tools": [{"type": "function", "function": {"name": "f"}}])",
           "tool_choice"},
          {R"("presence_penalty": 3)", "presence_penalty"},
          {R"("model": "cat")", "model"}}) {
    const std::string answer = Chat(", " + fields);
    EXPECT_EQ(answer.substr(0, answer.find(": ")), param) << fields << " -> " << answer;
  }
}

TEST_F(OpenAiRequestTest, BodiesThatAreNoRequest) {
  const auto error = [&](const std::string& body) {
    return std::string(ParseChatRequest(body, model_).status().message());
  };
  EXPECT_THAT(error(""), HasSubstr("not valid JSON"));
  EXPECT_THAT(error("[]"), HasSubstr("object"));
  EXPECT_THAT(error("{\"messages\": NaN}"), HasSubstr("not valid JSON"));
  EXPECT_THAT(error("{\"messages\": [{\"role\": \"user\", \"content\": \"\xFF\"}]}"),
              HasSubstr("not valid JSON"));
  EXPECT_THAT(error(std::string(1 << 20, '[')), HasSubstr("nests deeper"));
  EXPECT_THAT(error(R"({"messages": []})"), HasSubstr("at least one"));
  EXPECT_THAT(error(R"({"messages": [{"role": "king", "content": ""}]})"), HasSubstr("'king'"));
  EXPECT_THAT(error(R"({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]})"),
              HasSubstr("parts"));
}

TEST_F(OpenAiRequestTest, ToolsReachTheTemplateAndARequiredCallIsASchema) {
  const auto r = ParseChatRequest(R"({"messages": [{"role": "user", "content": "hi"}],
      "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object",
        "properties": {"x": {"type": "integer"}, "s": {"type": ["string", "null"]}, "t": {"anyOf": [{"type": "string"}, {"type": "null"}]}, "u": {"anyOf": [{"type": "string"}, {"type": "integer"}]}, "v": true, "w": {}}, "required": ["x"]}}}],
      "tool_choice": {"type": "function", "function": {"name": "f"}}})",
                                  model_);
  ASSERT_TRUE(r.ok()) << r.status();
  EXPECT_EQ(tokenizer_->Decode(r->prompts.at(0), false), "u:hi;T1");
  ASSERT_EQ(r->functions.size(), 1u);
  EXPECT_EQ(r->functions[0].name, "f");
  EXPECT_EQ(r->functions[0].text_parameters, (std::vector<std::string>{"s", "t"}));
  EXPECT_TRUE(r->forced_call);
  EXPECT_THAT(r->generate.json_schema, HasSubstr("\"const\":\"f\""));
}

TEST_F(OpenAiRequestTest, CompletionPrompts) {
  const auto prompts = [&](const std::string& prompt) {
    return ParseCompletionRequest("{\"prompt\": " + prompt + "}", model_);
  };
  EXPECT_EQ(prompts("\"ab\"")->prompts.size(), 1U);
  EXPECT_EQ(prompts("[\"a\", \"b\"]")->prompts.size(), 2U);
  EXPECT_EQ(prompts("[5, 6]")->prompts.at(0), (std::vector<int32_t>{5, 6}));
  EXPECT_EQ(prompts("[[5], [6, 7]]")->prompts.at(1), (std::vector<int32_t>{6, 7}));
  EXPECT_EQ(prompts("\"ab\"")->generate.max_tokens, 16);
  for (const char* bad : {"[]", "{}", "[-1]", "[100000]", "[[1], \"a\", {}]", "[[]]", "7"}) {
    EXPECT_FALSE(prompts(bad).ok()) << bad;
  }
}

TEST_F(OpenAiRequestTest, ModelWithoutTemplateSaysSo) {
  model_.chat_template = nullptr;
  EXPECT_THAT(Chat(""), HasSubstr("/v1/completions"));
}

}  // namespace
}  // namespace shoal
