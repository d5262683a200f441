// The methods of str, list, dict and the numbers.
#pragma once

#include <string_view>

#include "launcher/jinja/runtime.h"
#include "launcher/jinja/value.h"

namespace shoal::jinja {

// `self.name`, ready to be called; undefined when there is no such method.
Value FindMethod(const Value& self, std::string_view name);

using Builtin = Value (*)(Runtime& rt, const Value& self, const Arguments& arguments);

// A built-in function or bound method as a value.
class BuiltinObject : public Object {
 public:
  BuiltinObject(Builtin function, Value self) : function_(function), self_(std::move(self)) {}
  std::string_view kind() const override { return "builtin function"; }
  bool callable() const override { return true; }
  Value Call(Runtime& rt, const Arguments& arguments) const override {
    return function_(rt, self_, arguments);
  }

 private:
  const Builtin function_;
  const Value self_;
};

}  // namespace shoal::jinja
