#include "launcher/tool_calls.h"

#include "gtest/gtest.h"

namespace shoal {
namespace {

const std::vector<ToolFunction> kFunctions = {{"get_weather", {"city"}}, {"add", {}}};

// Of a text that is one call and nothing else.
std::string Call(const std::string& text) {
  const ParsedAnswer answer = ParseToolCalls(text, kFunctions);
  if (answer.calls.size() != 1 || !answer.content.empty()) return "no call: " + text;
  return answer.calls[0].name + answer.calls[0].arguments;
}

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
           "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>",
           "\n<minimax:tool_call>\n<invoke name=\"add\">\n<parameter name=\"a\">1</parameter>\n"
           "</invoke>\n</minimax:tool_call>",
           "<|START_ACTION|>[\n {\"tool_call_id\": \"0\", \"tool_name\": \"add\", \"parameters\": "
           "{\"a\": 1}}\n]<|END_ACTION|>",
           "Action:\n```json\n[{\"tool_name\": \"add\", \"parameters\": {\"a\": 1}}]\n```",
           "[add(a=1)]",
           "<|python_start|>[add(a=1)]<|python_end|>",
           "<seed:tool_call>\n<function=add>\n<parameter=a>1</parameter>\n</function>\n</"
           "seed:tool_call>",
       }) {
    const ParsedAnswer answer = ParseToolCalls(text, kFunctions);
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
      kFunctions);
  ASSERT_EQ(answer.calls.size(), 2U);
  EXPECT_EQ(answer.calls[1].name, "get_weather");
  EXPECT_EQ(answer.calls[1].arguments, "{}");
  EXPECT_EQ(answer.content, "Let me see.");
}

TEST(ToolCalls, NamedCallsAndParameters) {
  const ParsedAnswer named = ParseToolCalls(
      "Sure. [TOOL_CALLS]add[ARGS]{\"a\": 1}[TOOL_CALLS]get_weather[ARGS]{\"city\": \"Oslo\"}",
      kFunctions);
  ASSERT_EQ(named.calls.size(), 2U);
  EXPECT_EQ(named.calls[1].arguments, "{\"city\":\"Oslo\"}");
  EXPECT_EQ(named.content, "Sure.");
  const ParsedAnswer elements = ParseToolCalls(
      "<tool_call><function=get_weather><parameter=city>New York</parameter>"
      "<parameter=days>[1, 2]</parameter></function></tool_call>",
      kFunctions);
  ASSERT_EQ(elements.calls.size(), 1U);
  EXPECT_EQ(elements.calls[0].arguments, "{\"city\":\"New York\",\"days\":[1,2]}");
}

TEST(ToolCalls, ValuesAreTextsWhereTheFunctionSaysSo) {
  for (const char* text : {
           "<tool_call>get_weather<arg_key>city</arg_key><arg_value>12</arg_value>"
           "<arg_key>days</arg_key><arg_value>12</arg_value></tool_call>",
           "<tool_call><function=get_weather><parameter=city>\n12\n</parameter>"
           "<parameter=days>\n12\n</parameter></function></tool_call>",
           "<minimax:tool_call><invoke name=\"get_weather\"><parameter name=\"city\">12</parameter>"
           "<parameter name=\"days\">12</parameter></invoke></minimax:tool_call>",
       }) {
    EXPECT_EQ(Call(text), "get_weather{\"city\":\"12\",\"days\":12}");
  }
  // Nothing of a text gets lost, and marks may stand in it.
  EXPECT_EQ(Call("<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>  {\n<arg_key> "
                 "</arg_value>\n</tool_call>"),
            "get_weather{\"city\":\"  {\\n<arg_key> \"}");
}

TEST(ToolCalls, SeveralElementsInOneEnvelope) {
  const ParsedAnswer answer = ParseToolCalls(
      "I look.\n<minimax:tool_call>\n<invoke name=\"add\"></invoke>\n<invoke name=\"get_weather\">"
      "\n<parameter name=\"city\">Bonn</parameter>\n<parameter name=\"list\">[\"a\"]</parameter>"
      "</invoke>\n</minimax:tool_call>",
      kFunctions);
  ASSERT_EQ(answer.calls.size(), 2U);
  EXPECT_EQ(answer.content, "I look.");
  EXPECT_EQ(answer.calls[0].arguments, "{}");
  EXPECT_EQ(answer.calls[1].arguments, "{\"city\":\"Bonn\",\"list\":[\"a\"]}");
  EXPECT_EQ(ParseToolCalls("<tool_call>add</tool_call>\n<tool_call>add</tool_call>", kFunctions)
                .calls.size(),
            2U);
}

TEST(ToolCalls, PythonsLiterals) {
  EXPECT_EQ(
      Call("[add(a='it\\'s \\n', b=\"\\\\d\", c=-2.5, d=[True, None, (1, 2)], e={'k': {}},)]"),
      "add{\"a\":\"it's \\n\",\"b\":\"\\\\d\",\"c\":-2.5,\"d\":[true,null,[1,2]],\"e\":"
      "{\"k\":{}}}");
  EXPECT_EQ(ParseToolCalls("[add(), get_weather(city=\"Bonn\")]", kFunctions).calls.size(), 2U);
  const std::string deep = "[add(a=" + std::string(5000, '[') + std::string(5000, ']') + ")]";
  for (const std::string& text :
       {std::string("[add(1)]"), std::string("[add(a=b)]"), std::string("[add(a=1]"),
        std::string("[add(a='x)]"), std::string("[add(a=1)] then"), std::string("[other(a=1)]"),
        std::string("[add(a=1e999)]"), std::string("[]"), deep}) {
    EXPECT_TRUE(ParseToolCalls(text, kFunctions).calls.empty()) << text;
  }
}

TEST(ToolCalls, MarksInsideAnAnswerThatIsACall) {
  EXPECT_EQ(Call("{\"name\": \"add\", \"parameters\": {\"a\": \"Action: <tool_call>\"}}"),
            "add{\"a\":\"Action: <tool_call>\"}");
}

TEST(ToolCalls, WhatDoesNotParseStaysText) {
  for (const char* text : {"{\"name\": \"unknown\", \"arguments\": {}}",
                           "<tool_call>{\"name\": </tool_call>",
                           "<function=unknown>{}</function>",
                           "<function=add>{",
                           "[TOOL_CALLS]add[ARGS]",
                           "[TOOL_CALLS]",
                           "<tool_call><function=add><parameter=a></function></tool_call>",
                           "<function=add",
                           "<tool_call>add<arg_key>a</arg_key></tool_call>",
                           "<tool_call>other</tool_call>",
                           "<minimax:tool_call>add</minimax:tool_call>",
                           "<minimax:tool_call><invoke name=\"add\">x</invoke></minimax:tool_call>",
                           "<|START_ACTION|>[]<|END_ACTION|>",
                           "Action: none",
                           "Action:\n```json\n[",
                           "{\"answer\": 42}",
                           "[1, 2]",
                           "plain",
                           "[TOOL_CALLS] nothing",
                           "\v[add(a=1)]",
                           "[add(\fa=1)]",
                           ""}) {
    const ParsedAnswer answer = ParseToolCalls(text, kFunctions);
    EXPECT_TRUE(answer.calls.empty()) << text;
    EXPECT_EQ(answer.content, text);
  }
}

TEST(ToolCalls, StreamShowsOnlyWhatIsCertainlyText) {
  EXPECT_EQ(CertainText("Hello"), 5U);
  EXPECT_EQ(CertainText("Hello <tool"), 6U);
  EXPECT_EQ(CertainText("Hello <tool_call>{"), 6U);
  EXPECT_EQ(CertainText("Hello <minimax"), 6U);
  EXPECT_EQ(CertainText("Hello Act"), 6U);
  EXPECT_EQ(CertainText("{\"na", /*goes_on=*/true), 4U);
  EXPECT_TRUE(ParseToolCalls("{\"name\": \"add\"}", kFunctions, /*goes_on=*/true).calls.empty());
  EXPECT_EQ(CertainText("{\"na"), 0U);
  EXPECT_EQ(CertainText("  "), 0U);
}

}  // namespace
}  // namespace shoal
