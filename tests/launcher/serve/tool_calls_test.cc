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
           "[TOOL_CALLS]add[ARGS]{\"a\": 1}",
           "[TOOL_CALLS]add{\"a\": 1}",
           "<function=add>{\"a\": 1}</function>",
           "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
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

TEST(ToolCalls, NamedCallsAndParameters) {
  const ParsedAnswer named = ParseToolCalls(
      "Sure. [TOOL_CALLS]add[ARGS]{\"a\": 1}[TOOL_CALLS]get_weather[ARGS]{\"city\": \"Oslo\"}",
      kNames);
  ASSERT_EQ(named.calls.size(), 2U);
  EXPECT_EQ(named.calls[1].arguments, "{\"city\":\"Oslo\"}");
  EXPECT_EQ(named.content, "Sure.");
  const ParsedAnswer elements = ParseToolCalls(
      "<tool_call><function=get_weather><parameter=city>New York</parameter>"
      "<parameter=days>[1, 2]</parameter></function></tool_call>",
      kNames);
  ASSERT_EQ(elements.calls.size(), 1U);
  EXPECT_EQ(elements.calls[0].arguments, "{\"city\":\"New York\",\"days\":[1,2]}");
}

TEST(ToolCalls, WhatDoesNotParseStaysText) {
  for (const char* text :
       {"{\"name\": \"unknown\", \"arguments\": {}}", "<tool_call>{\"name\": </tool_call>",
        "<function=unknown>{}</function>", "<function=add>{", "[TOOL_CALLS]add[ARGS]",
        "[TOOL_CALLS]", "<tool_call><function=add><parameter=a></function></tool_call>",
        "<function=add", "{\"answer\": 42}", "[1, 2]", "plain", "[TOOL_CALLS] nothing", ""}) {
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
