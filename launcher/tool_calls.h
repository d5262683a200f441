// Calls of functions in a model's answer, in the formats that public models are trained on.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace shoal {

// What an answer may call.
struct ToolFunction {
  std::string name;
  std::vector<std::string> text_parameters;  // of type string: "12" stays a text
};

struct ToolCall {
  std::string name;
  std::string arguments;  // JSON text
};

struct ParsedAnswer {
  std::string content;  // the text around the calls; the whole answer when there are none
  std::vector<ToolCall> calls;
};

// Understands, each with several calls:
//   Hermes, Qwen       <tool_call>{"name": ..., "arguments": {...}}</tool_call>
//   Qwen3-Coder        <function=name><parameter=key>value</parameter></function>, in <tool_call>
//                      or alone; Seed-OSS: in <seed:tool_call>
//   GLM-4.5            name<arg_key>key</arg_key><arg_value>value</arg_value>, in <tool_call>
//   MiniMax-M2         <invoke name="..."><parameter name="key">value</parameter></invoke>, in
//                      <minimax:tool_call>
//   Command A, R7B     <|START_ACTION|>[{"tool_name": ..., "parameters": {...}}]<|END_ACTION|>
//   Command R, R+      Action: and the same list in a block of ```json
//   Mistral            [TOOL_CALLS] [{"name": ...}] or [TOOL_CALLS]name[ARGS]{...}
//   Llama 3, Llama 4   {"name": ..., "parameters": ...} or [name(key=value), ...], also behind
//                      <|python_tag|> or <|python_start|>; <function=name>{...}</function>
// What does not parse, or calls what is not in `functions`, stays text. `goes_on`: other text was
// taken from the answer's front before, so that calls without marks cannot be meant.
ParsedAnswer ParseToolCalls(std::string_view text, const std::vector<ToolFunction>& functions,
                            bool goes_on = false);

// Bytes at the start of an answer under way that certainly are text: what stands before anything
// that may become a call. goes_on: as above.
size_t CertainText(std::string_view text, bool goes_on = false);

}  // namespace shoal
