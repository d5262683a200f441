// Calls written as in Python, [name(key=value), ...], as Llama 4 and the small Llama 3.2 write
// them.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "nlohmann/json.hpp"

namespace shoal {

struct PythonCall {
  std::string name;
  nlohmann::ordered_json arguments;  // an object
};

// A list of one or more calls by keyword, whose values are literals: texts, numbers, True, False,
// None, lists and dicts of them, at most 64 deep. nullopt for anything else.
std::optional<std::vector<PythonCall>> ReadPythonCalls(std::string_view text);

}  // namespace shoal
