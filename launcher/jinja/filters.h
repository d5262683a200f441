// The filters ({{ x | name(...) }}) and tests ({{ x is name(...) }}) of the language.
#pragma once

#include <string_view>

#include "launcher/jinja/methods.h"
#include "launcher/jinja/runtime.h"
#include "launcher/jinja/value.h"

namespace shoal::jinja {

// Null for an unknown name; `self` of a filter is the value it is applied to.
Builtin FindFilter(std::string_view name);
Builtin FindSequenceFilter(std::string_view name);  // a part of the former

using TestFunction = bool (*)(Runtime& rt, const Value& value, const Arguments& arguments);
TestFunction FindTest(std::string_view name);

// By name; an unknown one fails.
Value ApplyFilter(Runtime& rt, std::string_view name, const Value& input,
                  const Arguments& arguments);
bool ApplyTest(Runtime& rt, std::string_view name, const Value& value, const Arguments& arguments);

}  // namespace shoal::jinja
