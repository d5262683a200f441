// Any text as a model's answer: thoughts and content do not depend on how it is cut into pieces,
// and calls of functions are found in it or it stays as it is.
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/check.h"
#include "launcher/reasoning.h"
#include "launcher/tool_calls.h"

namespace shoal {
namespace {

using Text = ReasoningSplitter::Text;

Text InPieces(ReasoningFormat format, bool in_thought, std::string_view answer, size_t piece) {
  ReasoningSplitter splitter(format, in_thought);
  Text all;
  const auto add = [&all](const Text& t) {
    all.reasoning += t.reasoning;
    all.content += t.content;
  };
  for (size_t i = 0; i < answer.size(); i += piece) add(splitter.Push(answer.substr(i, piece)));
  add(splitter.Finish());
  return all;
}

// A stream and an answer that comes whole tell the same.
void CheckCalls(std::string_view content, size_t piece) {
  static const auto* const functions = new std::vector<ToolFunction>{{"f", {"s"}}, {"g", {}}};
  const ParsedAnswer whole = ParseToolCalls(content, *functions);
  SHOAL_CHECK(!whole.calls.empty() || whole.content == content, "text stays as it is");
  for (const ToolCall& call : whole.calls) {
    SHOAL_CHECK(call.name == "f" || call.name == "g", "a function that was offered");
  }
  std::string sent, held;
  for (size_t i = 0; i < content.size(); i += piece) {
    held += content.substr(i, piece);
    const size_t certain = CertainText(held, !sent.empty());
    SHOAL_CHECK(certain <= held.size(), "certain text is a part");
    sent += held.substr(0, certain);
    held.erase(0, certain);
  }
  const ParsedAnswer rest = ParseToolCalls(held, *functions, !sent.empty());
  SHOAL_CHECK(rest.calls.size() == whole.calls.size(), "calls of a stream");
  for (size_t i = 0; i < rest.calls.size(); ++i) {
    SHOAL_CHECK(rest.calls[i].arguments == whole.calls[i].arguments, "arguments of a stream");
  }
  SHOAL_CHECK(!rest.calls.empty() || sent + rest.content == content, "text of a stream");
}

void Check(ReasoningFormat format, bool in_thought, std::string_view answer, size_t piece) {
  const Text whole = InPieces(format, in_thought, answer, answer.size() + 1);
  const Text cut = InPieces(format, in_thought, answer, piece);
  SHOAL_CHECK(whole.reasoning == cut.reasoning && whole.content == cut.content, "pieces");

  CheckCalls(whole.content, piece);
}

}  // namespace
}  // namespace shoal

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string_view answer(reinterpret_cast<const char*>(data) + 1, size - 1);
  constexpr int kFormats = static_cast<int>(shoal::ReasoningFormat::kCohere) + 1;
  shoal::Check(static_cast<shoal::ReasoningFormat>(data[0] % kFormats), data[0] % 2 != 0, answer,
               1 + data[0] / 16);
  return 0;
}
