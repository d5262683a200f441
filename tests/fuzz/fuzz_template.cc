// Any bytes as a chat template, rendered over a conversation under small limits: it may fail, never
// crash or hang.
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "launcher/jinja/template.h"
#include "nlohmann/json.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const auto variables = nlohmann::ordered_json::parse(R"({
    "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "h\u00e9 <b>"},
                 {"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1.5}}}]},
                 {"role": "tool", "content": [{"type": "text", "text": "t"}]}],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": [1, true, null, {}]}}}],
    "bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": true, "n": 7, "f": 2.5, "e": "", "l": [3, 1, 2]
  })");
  shoal::jinja::Limits limits;
  limits.output_bytes = 1 << 18;
  limits.steps = 100'000;
  limits.values = 50'000;
  limits.depth = 200;  // sanitizers make frames large
  limits.time = std::chrono::milliseconds(2000);
  const auto parsed =
      shoal::jinja::Template::Parse(std::string_view(reinterpret_cast<const char*>(data), size));
  if (parsed.ok()) (void)parsed->Render(variables, limits, 1718000000);
  return 0;
}
