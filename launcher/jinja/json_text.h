// Values from JSON and to JSON.
#pragma once

#include <string>

#include "launcher/jinja/runtime.h"
#include "nlohmann/json_fwd.hpp"

namespace shoal::jinja {

// Fails beyond 200 levels.
Value FromJson(Runtime& rt, const nlohmann::ordered_json& json);

struct JsonStyle {
  bool ascii_only = false;
  bool sort_keys = false;
  bool pretty = false;  // a line for each item, indented by `indent`
  std::string indent;
  std::string item_separator = ", ";  // "," when pretty
  std::string key_separator = ": ";
};

// As Python's json.dumps. Undefined values and objects fail.
std::string ToJson(Runtime& rt, const Value& value, const JsonStyle& style);

}  // namespace shoal::jinja
