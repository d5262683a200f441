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
constexpr std::string_view kFunction = "<function=";
constexpr std::string_view kFunctionEnd = "</function>";
constexpr std::string_view kParameter = "<parameter=";
constexpr std::string_view kParameterEnd = "</parameter>";
constexpr std::string_view kArguments = "[ARGS]";
constexpr std::array<std::string_view, 4> kMarkers = {kHermes, kMistral, kPython, kFunction};
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

bool Known(std::string_view name, const std::vector<std::string>& names) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

std::optional<Json> ReadObject(std::string_view text) {
  if (!CheckJsonDepth(text, kMaxDepth).ok()) return std::nullopt;
  Json value = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!value.is_object()) return std::nullopt;
  return value;
}

// The value of a parameter element: JSON where it is some, else a string.
Json ParameterValue(std::string_view text) {
  if (!CheckJsonDepth(text, kMaxDepth).ok()) return std::string(text);
  Json value = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (value.is_discarded()) return std::string(text);
  return value;
}

// <parameter=key>value</parameter>, any number of them and nothing else.
std::optional<Json> ReadParameters(std::string_view text) {
  Json arguments = Json::object();
  for (text = Trim(text); !text.empty(); text = Trim(text)) {
    const size_t name_end = text.find('>');
    const size_t end = text.find(kParameterEnd);
    if (text.substr(0, kParameter.size()) != kParameter || end == text.npos || name_end > end) {
      return std::nullopt;
    }
    const std::string key(text.substr(kParameter.size(), name_end - kParameter.size()));
    arguments[key] = ParameterValue(Trim(text.substr(name_end + 1, end - name_end - 1)));
    text.remove_prefix(end + kParameterEnd.size());
  }
  return arguments;
}

// <function=name>...</function>, one or more, and nothing else.
std::optional<std::vector<ToolCall>> ReadFunctions(std::string_view text,
                                                   const std::vector<std::string>& names) {
  std::vector<ToolCall> calls;
  for (text = Trim(text); !text.empty(); text = Trim(text)) {
    const size_t name_end = text.find('>');
    const size_t end = text.find(kFunctionEnd);
    if (text.substr(0, kFunction.size()) != kFunction || end == text.npos || name_end > end) {
      return std::nullopt;
    }
    const std::string_view name = text.substr(kFunction.size(), name_end - kFunction.size());
    const std::string_view body = Trim(text.substr(name_end + 1, end - name_end - 1));
    const std::optional<Json> arguments =
        body.substr(0, 1) == "{" ? ReadObject(body) : ReadParameters(body);
    if (!arguments.has_value() || !Known(name, names)) return std::nullopt;
    calls.push_back({std::string(name), DumpJson(*arguments)});
    text.remove_prefix(end + kFunctionEnd.size());
  }
  if (calls.empty()) return std::nullopt;
  return calls;
}

// name[ARGS]{...} or name{...}; each further one after a marker of its own.
std::optional<std::vector<ToolCall>> ReadNamedCalls(std::string_view text,
                                                    const std::vector<std::string>& names) {
  std::vector<ToolCall> calls;
  for (;;) {
    const size_t next = text.find(kMistral);
    const std::string_view call = text.substr(0, next);
    const size_t brace = std::min(call.find('{'), call.size());
    std::string_view name = Trim(call.substr(0, brace));
    if (name.size() > kArguments.size() &&
        name.substr(name.size() - kArguments.size()) == kArguments) {
      name.remove_suffix(kArguments.size());
    }
    const std::optional<Json> arguments = ReadObject(Trim(call.substr(brace)));
    if (!arguments.has_value() || !Known(name, names)) return std::nullopt;
    calls.push_back({std::string(name), DumpJson(*arguments)});
    if (next == text.npos) return calls;
    text.remove_prefix(next + kMistral.size());
  }
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
    auto calls = ReadCalls(Trim(inner.substr(0, end)), names);
    if (!calls.has_value()) calls = ReadFunctions(inner.substr(0, end), names);
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
  auto calls = ReadCalls(json, names);
  if (const size_t at = text.find(kFunction); !calls.has_value() && at != text.npos) {
    content = Trim(text.substr(0, at));
    calls = ReadFunctions(text.substr(at), names);
  } else if (!calls.has_value() && text.find(kMistral) != text.npos) {
    calls = ReadNamedCalls(json, names);
  }
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
