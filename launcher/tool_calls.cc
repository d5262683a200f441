#include "launcher/tool_calls.h"

#include <algorithm>
#include <array>
#include <optional>

#include "launcher/json_text.h"
#include "nlohmann/json.hpp"

namespace shoal {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::string_view kHermes = "<tool_call>";
constexpr std::string_view kHermesEnd = "</tool_call>";
constexpr std::string_view kMistral = "[TOOL_CALLS]";
constexpr std::string_view kPython = "<|python_tag|>";
constexpr std::array<std::string_view, 3> kMarkers = {kHermes, kMistral, kPython};
constexpr int kMaxDepth = 64;

std::string_view Trim(std::string_view s) {
  while (!s.empty() && std::string_view(" \t\r\n").find(s.front()) != s.npos) s.remove_prefix(1);
  while (!s.empty() && std::string_view(" \t\r\n").find(s.back()) != s.npos) s.remove_suffix(1);
  return s;
}

bool ReadCall(const Json& value, const std::vector<std::string>& names, ToolCall* call) {
  if (!value.is_object() || !value.contains("name") || !value["name"].is_string()) return false;
  call->name = value["name"].get<std::string>();
  if (std::find(names.begin(), names.end(), call->name) == names.end()) return false;
  const char* key = value.contains("arguments") ? "arguments" : "parameters";
  if (!value.contains(key)) {
    call->arguments = "{}";
  } else if (value[key].is_string()) {
    call->arguments = value[key].get<std::string>();
  } else {
    call->arguments = DumpJson(value[key]);
  }
  return true;
}

// One call or a list of them; nullopt when the text is anything else.
std::optional<std::vector<ToolCall>> ReadCalls(std::string_view text,
                                               const std::vector<std::string>& names) {
  if (!CheckJsonDepth(text, kMaxDepth).ok()) return std::nullopt;
  const Json value = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (value.is_discarded()) return std::nullopt;
  std::vector<ToolCall> calls;
  if (!value.is_array()) {
    calls.emplace_back();
    if (!ReadCall(value, names, &calls.back())) return std::nullopt;
    return calls;
  }
  for (const Json& v : value) {
    calls.emplace_back();
    if (!ReadCall(v, names, &calls.back())) return std::nullopt;
  }
  if (calls.empty()) return std::nullopt;
  return calls;
}

ParsedAnswer ParseHermes(std::string_view text, const std::vector<std::string>& names) {
  ParsedAnswer answer;
  std::string_view rest = text;
  while (!rest.empty()) {
    const size_t begin = rest.find(kHermes);
    answer.content += rest.substr(0, begin);
    if (begin == rest.npos) break;
    const std::string_view inner = rest.substr(begin + kHermes.size());
    const size_t end = std::min(inner.find(kHermesEnd), inner.size());
    const auto calls = ReadCalls(Trim(inner.substr(0, end)), names);
    if (!calls.has_value()) return {std::string(text), {}};
    answer.calls.insert(answer.calls.end(), calls->begin(), calls->end());
    rest = inner.substr(std::min(end + kHermesEnd.size(), inner.size()));
  }
  answer.content = std::string(Trim(answer.content));
  return answer;
}

}  // namespace

ParsedAnswer ParseToolCalls(std::string_view text, const std::vector<std::string>& names) {
  if (text.find(kHermes) != text.npos) return ParseHermes(text, names);
  std::string_view content;
  std::string_view json = Trim(text);
  for (std::string_view marker : {kMistral, kPython}) {
    const size_t at = text.find(marker);
    if (at == text.npos) continue;
    content = Trim(text.substr(0, at));
    json = Trim(text.substr(at + marker.size()));
  }
  const auto calls = ReadCalls(json, names);
  if (!calls.has_value()) return {std::string(text), {}};
  return {std::string(content), *calls};
}

size_t CertainText(std::string_view text) {
  const std::string_view trimmed = Trim(text);
  if (trimmed.empty() || trimmed.front() == '{' || trimmed.front() == '[') return 0;
  size_t certain = text.size();
  for (std::string_view marker : kMarkers) {
    certain = std::min(certain, text.find(marker));
    for (size_t n = std::min(text.size(), marker.size() - 1); n > 0; --n) {
      if (text.substr(text.size() - n) == marker.substr(0, n)) {
        certain = std::min(certain, text.size() - n);
        break;
      }
    }
  }
  return certain;
}

}  // namespace shoal
