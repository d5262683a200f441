#include "launcher/tool_calls.h"

#include <algorithm>
#include <array>
#include <optional>

#include "launcher/json_text.h"
#include "launcher/python_calls.h"
#include "nlohmann/json.hpp"

namespace shoal {
namespace {

using Json = nlohmann::ordered_json;
using Calls = std::optional<std::vector<ToolCall>>;  // never an empty list
using Functions = std::vector<ToolFunction>;

constexpr int kMaxDepth = 64;

// What stands between two marks; without `end` it goes on to the next `begin`.
struct Envelope {
  std::string_view begin, end;
  Calls (*read)(std::string_view inside, const Functions& functions);
};

std::string_view Trim(std::string_view s) {
  while (!s.empty() && std::string_view(" \t\r\n").find(s.front()) != s.npos) s.remove_prefix(1);
  while (!s.empty() && std::string_view(" \t\r\n").find(s.back()) != s.npos) s.remove_suffix(1);
  return s;
}

bool Consume(std::string_view* text, std::string_view prefix) {
  if (text->substr(0, prefix.size()) != prefix) return false;
  text->remove_prefix(prefix.size());
  return true;
}

// What stands before `mark`, which is taken too; nullopt where there is none.
std::optional<std::string_view> ConsumeUpTo(std::string_view* text, std::string_view mark) {
  const size_t at = text->find(mark);
  if (at == text->npos) return std::nullopt;
  const std::string_view before = text->substr(0, at);
  text->remove_prefix(at + mark.size());
  return before;
}

const ToolFunction* Find(std::string_view name, const Functions& functions) {
  const auto found = std::find_if(functions.begin(), functions.end(),
                                  [&](const ToolFunction& f) { return f.name == name; });
  return found == functions.end() ? nullptr : &*found;
}

Json ParseJson(std::string_view text) {
  if (!CheckJsonDepth(text, kMaxDepth).ok()) return Json(Json::value_t::discarded);
  return Json::parse(text, nullptr, /*allow_exceptions=*/false);
}

bool ReadJsonCall(const Json& value, const Functions& functions, ToolCall* call) {
  if (!value.is_object()) return false;
  const char* name = value.contains("name") ? "name" : "tool_name";
  if (!value.contains(name) || !value[name].is_string()) return false;
  call->name = value[name].get<std::string>();
  const char* key = value.contains("arguments") ? "arguments" : "parameters";
  if (!value.contains(key)) {
    call->arguments = "{}";
  } else if (value[key].is_string()) {
    call->arguments = value[key].get<std::string>();
  } else {
    call->arguments = DumpJson(value[key]);
  }
  return Find(call->name, functions) != nullptr;
}

// One call as JSON, or a list of them.
Calls ReadJson(std::string_view text, const Functions& functions) {
  const Json value = ParseJson(text);
  const Json list = value.is_object() ? Json::array({value}) : value;
  if (!list.is_array() || list.empty()) return std::nullopt;
  std::vector<ToolCall> calls(list.size());
  for (size_t i = 0; i < list.size(); ++i) {
    if (!ReadJsonCall(list[i], functions, &calls[i])) return std::nullopt;
  }
  return calls;
}

Calls OneCall(std::string_view name, const Json& arguments, const Functions& functions) {
  if (!arguments.is_object() || Find(name, functions) == nullptr) return std::nullopt;
  return std::vector<ToolCall>{{std::string(name), DumpJson(arguments)}};
}

// A value between two marks: a text where the function says so, else JSON where it is some.
Json ValueOf(std::string_view text, std::string_view key, const ToolFunction& function) {
  const auto& texts = function.text_parameters;
  if (std::find(texts.begin(), texts.end(), key) != texts.end()) {
    Consume(&text, "\n");
    if (!text.empty() && text.back() == '\n') text.remove_suffix(1);
    return std::string(text);
  }
  const Json value = ParseJson(text);
  return value.is_discarded() ? Json(std::string(Trim(text))) : value;
}

// How each argument of a call is written: begin KEY key_end value_begin VALUE end.
struct ElementMarks {
  std::string_view begin, key_end, value_begin, end;
};

// Any number of such elements and nothing else.
Calls ReadElements(std::string_view name, std::string_view text, const ElementMarks& marks,
                   const Functions& functions) {
  const ToolFunction* function = Find(name, functions);
  if (function == nullptr) return std::nullopt;
  Json arguments = Json::object();
  for (text = Trim(text); !text.empty(); text = Trim(text)) {
    if (!Consume(&text, marks.begin)) return std::nullopt;
    const std::optional<std::string_view> key = ConsumeUpTo(&text, marks.key_end);
    if (!key.has_value()) return std::nullopt;
    if (!marks.value_begin.empty()) text = Trim(text);
    if (!Consume(&text, marks.value_begin)) return std::nullopt;
    const std::optional<std::string_view> value = ConsumeUpTo(&text, marks.end);
    if (!value.has_value()) return std::nullopt;
    arguments[std::string(Trim(*key))] = ValueOf(*value, Trim(*key), *function);
  }
  return OneCall(name, arguments, functions);
}

// Behind <function= : name>{...} or name><parameter=key>value</parameter>.
Calls ReadFunction(std::string_view text, const Functions& functions) {
  const std::optional<std::string_view> name = ConsumeUpTo(&text, ">");
  if (!name.has_value()) return std::nullopt;
  const std::string_view body = Trim(text);
  if (body.substr(0, 1) == "{") return OneCall(*name, ParseJson(body), functions);
  return ReadElements(*name, body, {"<parameter=", ">", "", "</parameter>"}, functions);
}

// Behind <invoke name=" : name"><parameter name="key">value</parameter>.
Calls ReadInvoke(std::string_view text, const Functions& functions) {
  const std::optional<std::string_view> name = ConsumeUpTo(&text, "\">");
  if (!name.has_value()) return std::nullopt;
  return ReadElements(*name, text, {"<parameter name=\"", "\">", "", "</parameter>"}, functions);
}

// name <arg_key>key</arg_key> <arg_value>value</arg_value>; space may stand between all of them.
Calls ReadArgKeys(std::string_view text, const Functions& functions) {
  const std::string_view name = Trim(text.substr(0, text.find("<arg_key>")));
  text = Trim(text);
  text.remove_prefix(name.size());
  return ReadElements(name, text, {"<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"},
                      functions);
}

constexpr Envelope kFunction = {"<function=", "</function>", ReadFunction};
constexpr Envelope kInvoke = {"<invoke name=\"", "</invoke>", ReadInvoke};

// All calls of one envelope after the other; `between`: what stands outside.
Calls ReadEnvelopes(std::string_view text, const Envelope& envelope, const Functions& functions,
                    std::string* between) {
  std::vector<ToolCall> calls;
  for (;;) {
    const size_t begin = text.find(envelope.begin);
    *between += text.substr(0, begin);
    if (begin == text.npos) break;
    text.remove_prefix(begin + envelope.begin.size());
    const size_t end =
        std::min(text.find(envelope.end.empty() ? envelope.begin : envelope.end), text.size());
    const Calls inside = envelope.read(Trim(text.substr(0, end)), functions);
    if (!inside.has_value()) return std::nullopt;
    calls.insert(calls.end(), inside->begin(), inside->end());
    text.remove_prefix(std::min(end + envelope.end.size(), text.size()));
  }
  if (calls.empty()) return std::nullopt;
  return calls;
}

// One envelope after the other and nothing else.
Calls ReadOnlyEnvelopes(std::string_view text, const Envelope& envelope,
                        const Functions& functions) {
  std::string between;
  Calls calls = ReadEnvelopes(text, envelope, functions, &between);
  return Trim(between).empty() ? calls : std::nullopt;
}

Calls ReadHermes(std::string_view text, const Functions& functions) {
  if (text.substr(0, 1) == "{" || text.substr(0, 1) == "[") return ReadJson(text, functions);
  if (text.substr(0, kFunction.begin.size()) == kFunction.begin) {
    return ReadOnlyEnvelopes(text, kFunction, functions);
  }
  return ReadArgKeys(text, functions);
}

Calls ReadMiniMax(std::string_view text, const Functions& functions) {
  return ReadOnlyEnvelopes(text, kInvoke, functions);
}

// [{"name": ...}], name[ARGS]{...} or name{...}.
Calls ReadMistral(std::string_view text, const Functions& functions) {
  if (text.substr(0, 1) == "[" || text.substr(0, 1) == "{") return ReadJson(text, functions);
  constexpr std::string_view kArguments = "[ARGS]";
  const size_t brace = std::min(text.find('{'), text.size());
  std::string_view name = Trim(text.substr(0, brace));
  if (const size_t at = name.find(kArguments);
      at != name.npos && at + kArguments.size() == name.size()) {
    name.remove_suffix(kArguments.size());
  }
  return OneCall(name, ParseJson(text.substr(brace)), functions);
}

Calls ReadBare(std::string_view text, const Functions& functions) {
  if (Calls calls = ReadJson(text, functions); calls.has_value()) return calls;
  const auto python = ReadPythonCalls(text);
  if (!python.has_value()) return std::nullopt;
  std::vector<ToolCall> calls;
  for (const PythonCall& call : *python) {
    const Calls one = OneCall(call.name, call.arguments, functions);
    if (!one.has_value()) return std::nullopt;
    calls.push_back(one->front());
  }
  return calls;
}

// Behind Action: , a list of calls in a block of JSON.
Calls ReadAction(std::string_view text, const Functions& functions) {
  if (!Consume(&text, "```json")) return std::nullopt;
  return ReadJson(Trim(text.substr(0, text.find("```"))), functions);
}

// The first one whose mark an answer has is the one it is read by.
constexpr std::array<Envelope, 9> kEnvelopes = {{
    {"<tool_call>", "</tool_call>", ReadHermes},
    {"<seed:tool_call>", "</seed:tool_call>", ReadHermes},
    {"<minimax:tool_call>", "</minimax:tool_call>", ReadMiniMax},
    {"<|START_ACTION|>", "<|END_ACTION|>", ReadJson},
    {"[TOOL_CALLS]", "", ReadMistral},
    {"<|python_tag|>", "", ReadBare},
    {"<|python_start|>", "<|python_end|>", ReadBare},
    kFunction,
    {"Action:", "", ReadAction},
}};

}  // namespace

ParsedAnswer ParseToolCalls(std::string_view text, const std::vector<ToolFunction>& functions,
                            bool goes_on) {
  std::string content;
  Calls calls = goes_on ? std::nullopt : ReadBare(Trim(text), functions);
  const auto envelope = std::find_if(kEnvelopes.begin(), kEnvelopes.end(), [&](const Envelope& e) {
    return text.find(e.begin) != text.npos;
  });
  if (!calls.has_value() && envelope != kEnvelopes.end()) {
    calls = ReadEnvelopes(text, *envelope, functions, &content);
  }
  if (!calls.has_value()) return {std::string(text), {}};
  return {std::string(Trim(content)), *std::move(calls)};
}

size_t CertainText(std::string_view text, bool goes_on) {
  const std::string_view trimmed = Trim(text);
  if (!goes_on && (trimmed.empty() || trimmed.front() == '{' || trimmed.front() == '[')) return 0;
  size_t certain = text.size();
  for (const Envelope& envelope : kEnvelopes) {
    const std::string_view marker = envelope.begin;
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
