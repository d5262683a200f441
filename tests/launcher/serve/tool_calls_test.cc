#include "launcher/tool_calls.h"

#include "gtest/gtest.h"

namespace shoal {
namespace {

const std::vector<std::string> kNames = {"get_weather", "add"};

TEST(ToolCalls, CommonFormats) {
  for (const char* text : {
           "<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 1}}\n</tool_call>",
           "[TOOL_CALLS] [{\"name\": \"add\", \"arguments\": {\"a\": 1}}]",
           "<|python_tag|>{\"name\": \"add\", \"parameters\": {\"a\": 1}}",
           "{\"name\": \"add\", \"parameters\": {\"a\": 1}}",
           "{\"type\": \"function\", \"name\": \"add\", \"arguments\": \"{\\\"a\\\":1}\"}",
       }) {
    const ParsedAnswer answer = ParseToolCalls(text, kNames);
    ASSERT_EQ(answer.calls.size(), 1U) << text;
    EXPECT_EQ(answer.calls[0].name, "add");
    EXPECT_EQ(answer.calls[0].arguments, "{\"a\":1}");
    EXPECT_EQ(answer.content, "");
  }
}

TEST(ToolCalls, SeveralCallsAndTextAround) {
  const ParsedAnswer answer = ParseToolCalls(
      "Let me see.\n<tool_call>{\"name\":\"add\",\"arguments\":{}}</tool_call>"
      "<tool_call>{\"name\":\"get_weather\"}</tool_call>",
      kNames);
  ASSERT_EQ(answer.calls.size(), 2U);
  EXPECT_EQ(answer.calls[1].name, "get_weather");
  EXPECT_EQ(answer.calls[1].arguments, "{}");
  EXPECT_EQ(answer.content, "Let me see.");
}

TEST(ToolCalls, WhatDoesNotParseStaysText) {
  for (const char* text :
       {"{\"name\": \"unknown\", \"arguments\": {}}", "<tool_call>{\"name\": </tool_call>",
        "{\"answer\": 42}", "[1, 2]", "plain", "[TOOL_CALLS] nothing", ""}) {
    const ParsedAnswer answer = ParseToolCalls(text, kNames);
    EXPECT_TRUE(answer.calls.empty()) << text;
    EXPECT_EQ(answer.content, text);
  }
}

TEST(ToolCalls, StreamShowsOnlyWhatIsCertainlyText) {
  EXPECT_EQ(CertainText("Hello"), 5U);
  EXPECT_EQ(CertainText("Hello <tool"), 6U);
  EXPECT_EQ(CertainText("Hello <tool_call>{"), 6U);
  EXPECT_EQ(CertainText("{\"na"), 0U);
  EXPECT_EQ(CertainText("  "), 0U);
}

}  // namespace
}  // namespace shoal
