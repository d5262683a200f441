// Calls of functions in a model's answer, in the formats that public models are trained on.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace shoal {

struct ToolCall {
  std::string name;
  std::string arguments;  // JSON text
};

struct ParsedAnswer {
  std::string content;  // the text around the calls; the whole answer when there are none
  std::vector<ToolCall> calls;
};

// Understands <tool_call>{...}</tool_call> (Hermes, Qwen), <function=name> with <parameter=key>
// elements (Qwen3-Coder) or JSON (Llama) inside, [TOOL_CALLS] [...] and [TOOL_CALLS]name[ARGS]{...}
// (Mistral), <|python_tag|>{...} and bare {"name": ..., "parameters": ...} (Llama 3). What does not
// parse, or names a function that is not in `names`, stays text.
ParsedAnswer ParseToolCalls(std::string_view text, const std::vector<std::string>& names);

// Bytes at the start of an answer under way that certainly are text: what stands before anything
// that may become a call.
size_t CertainText(std::string_view text);

}  // namespace shoal
