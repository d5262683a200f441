// Conversations through templates of the shapes that public models use (written for this test).
#include "launcher/chat_template.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

namespace shoal {
namespace {

using nlohmann::ordered_json;
using ::testing::HasSubstr;

ordered_json Message(const char* role, const ordered_json& content) {
  ordered_json message;
  message["role"] = role;
  message["content"] = content;
  return message;
}

std::string Render(const std::string& source, const ordered_json& messages,
                   const ordered_json& tools = nullptr, ChatTemplateOptions options = {}) {
  if (options.bos_token.empty()) options.bos_token = "<s>";
  if (options.eos_token.empty()) options.eos_token = "</s>";
  auto parsed = ChatTemplate::Parse(source);
  EXPECT_TRUE(parsed.ok()) << parsed.status();
  if (!parsed.ok()) return {};
  const auto text = parsed->Render(messages, tools, options);
  return text.ok() ? *text : "error: " + std::string(text.status().message());
}

const char kChatMl[] =
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

TEST(ChatTemplateTest, ChatMl) {
  const ordered_json messages = {Message("system", "Be brief."), Message("user", "Hi\n")};
  EXPECT_EQ(Render(kChatMl, messages),
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi\n<|im_end|>\n"
            "<|im_start|>assistant\n");
  ChatTemplateOptions options;
  options.add_generation_prompt = false;
  EXPECT_EQ(Render(kChatMl, ordered_json::array({Message("user", "Hi")}), nullptr, options),
            "<|im_start|>user\nHi<|im_end|>\n");
}

// The system message goes into the first user turn, and roles must take turns.
const char kBracketed[] = R"({%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set rest = messages %}
{%- endif %}
{{- bos_token }}
{%- for m in rest %}
    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must take turns, beginning with user') }}
    {%- endif %}
    {%- if m['role'] == 'user' %}
        {%- if loop.first and system is defined %}
            {{- '[INST] ' + system + '\n\n' + m['content'] | trim + '[/INST]' }}
        {%- else %}
            {{- '[INST] ' + m['content'] | trim + '[/INST]' }}
        {%- endif %}
    {%- else %}
        {{- ' ' + m['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
)";

TEST(ChatTemplateTest, BracketedTurns) {
  EXPECT_EQ(Render(kBracketed, {Message("system", "S"), Message("user", " a "),
                                Message("assistant", "b "), Message("user", "c")}),
            "<s>[INST] S\n\na[/INST] b</s>[INST] c[/INST]");
  EXPECT_THAT(Render(kBracketed, {Message("user", "a"), Message("user", "b")}),
              HasSubstr("roles must take turns"));
}

const char kTools[] = R"({{- bos_token }}
{%- if tools is not none and tools %}
    {{- "<|system|>You can call:\n" }}
    {%- for tool in tools %}
        {{- tool.function | tojson(indent=2) }}
        {{- "\n" }}
    {%- endfor %}
    {{- "Today is " + strftime_now("%d %b %Y") + "\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "tool" %}
        {{- "<|tool|>" + message.content }}
    {%- elif message.tool_calls is defined and message.tool_calls %}
        {%- for call in message.tool_calls %}
            {{- '<|call|>{"name": "' ~ call.function.name ~ '", "arguments": ' ~ call.function.arguments | tojson ~ "}" }}
        {%- endfor %}
    {%- else %}
        {{- "<|" + message.role + "|>" }}
        {%- if message.content is string %}
            {{- message.content }}
        {%- else %}
            {%- for part in message.content if part.type == "text" %}
                {{- part.text }}
            {%- endfor %}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|assistant|>" }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- "<think>\n\n</think>\n\n" }}
    {%- endif %}
{%- endif %}
)";

TEST(ChatTemplateTest, ToolsPartsAndThinking) {
  const auto tools = ordered_json::parse(
      R"([{"type": "function", "function": {"name": "f", "parameters": {"z": 1, "a": ["é", "<b>"]}}}])");
  ordered_json call = Message("assistant", nullptr);
  call["tool_calls"] = ordered_json::parse(
      R"([{"type": "function", "function": {"name": "f", "arguments": {"x": 1.0, "y": null}}}])");
  const ordered_json parts = ordered_json::parse(
      R"([{"type": "text", "text": "one "}, {"type": "image"}, {"type": "text", "text": "two"}])");
  ChatTemplateOptions options;
  options.now = 1718000000;
  options.extra = {{"enable_thinking", false}};
  EXPECT_EQ(
      Render(kTools, {Message("user", parts), call, Message("tool", "7")}, tools, options),
      "<s><|system|>You can call:\n"
      "{\n  \"name\": \"f\",\n  \"parameters\": {\n    \"z\": 1,\n    \"a\": [\n      \"é\",\n"
      "      \"<b>\"\n    ]\n  }\n}\n"
      "Today is 10 Jun 2024\n"
      "<|user|>one two<|call|>{\"name\": \"f\", \"arguments\": {\"x\": 1.0, \"y\": null}}<|tool|>7"
      "<|assistant|><think>\n\n</think>\n\n");
  EXPECT_EQ(Render(kTools, ordered_json::array({Message("user", "x")})),
            "<s><|user|>x<|assistant|>");
}

TEST(ChatTemplateTest, WhatUsersWriteIsNeverTemplateCode) {
  EXPECT_EQ(Render(kChatMl, ordered_json::array({Message("user", "{{ 7 * 7 }}{% raw %}")})),
            "<|im_start|>user\n{{ 7 * 7 }}{% raw %}<|im_end|>\n<|im_start|>assistant\n");
}

TEST(ChatTemplateTest, BadInputIsRefused) {
  EXPECT_THAT(Render(kChatMl, ordered_json::object()), HasSubstr("expected a JSON array"));
  EXPECT_THAT(Render(kChatMl, ordered_json::array({Message("user", nullptr)})),
              HasSubstr("does not work on str and NoneType"));
  ChatTemplateOptions options;
  options.extra = ordered_json::array();
  EXPECT_THAT(Render(kChatMl, ordered_json::array({Message("user", "x")}), nullptr, options),
              HasSubstr("expected a JSON object"));
  EXPECT_EQ(ChatTemplate::Parse("{% if %}").status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(ChatTemplateTest, ExtraArgumentsCannotReplaceTheConversation) {
  ChatTemplateOptions options;
  options.extra = {{"messages", ordered_json::array()}, {"bos_token", "evil"}};
  EXPECT_EQ(Render("{{ bos_token }}{{ messages | length }}",
                   ordered_json::array({Message("user", "x")}), nullptr, options),
            "<s>1");
}

}  // namespace
}  // namespace shoal
