// What the operators of the language do. All follow Python; errors go to the runtime.
#pragma once

#include <string>
#include <string_view>

#include "launcher/jinja/runtime.h"
#include "launcher/jinja/value.h"

namespace shoal::jinja {

// op: + - * / // % **
Value BinaryOperator(Runtime& rt, std::string_view op, const Value& a, const Value& b);
// op: == != < <= > >= in, "not in"
bool CompareOperator(Runtime& rt, std::string_view op, const Value& a, const Value& b);
bool Contains(Runtime& rt, const Value& container, const Value& item);
Value Negate(Runtime& rt, const Value& v);

// object.name: a method or attribute, else the item of that name.
Value GetAttribute(Runtime& rt, const Value& object, std::string_view name);
// object[key]: the item, else the method or attribute of that name.
Value GetItem(Runtime& rt, const Value& object, const Value& key);
// object[from:to:step]; none stands for a missing bound.
Value GetSlice(Runtime& rt, const Value& object, const Value& from, const Value& to,
               const Value& step);
Value Call(Runtime& rt, const Value& callee, const Arguments& arguments);

// The value at a path like "function.name" or "0.id", as filters take it in `attribute`.
Value GetPath(Runtime& rt, const Value& object, const Value& path);

// `text % values`: %s %r %d %i %f %g %e %x %o %c %% with flags, width and precision.
Value PercentFormat(Runtime& rt, std::string_view text, const Value& values);

}  // namespace shoal::jinja
