#include "launcher/jinja/operators.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"
#include "launcher/jinja/methods.h"
#include "launcher/jinja/python_text.h"

namespace shoal::jinja {
namespace {

Value WrongOperands(Runtime& rt, std::string_view op, const Value& a, const Value& b) {
  return rt.Fail(
      absl::StrCat("'", std::string(op), "' does not work on ", TypeName(a), " and ", TypeName(b)));
}

Value IntPower(Runtime& rt, int64_t base, int64_t exponent) {
  if (exponent < 0) return std::pow(static_cast<double>(base), static_cast<double>(exponent));
  int64_t result = 1;
  for (; exponent > 0; exponent >>= 1) {
    if ((exponent & 1) && __builtin_mul_overflow(result, base, &result)) {
      return rt.Fail("a number is beyond 64 bits");
    }
    if (exponent > 1 && __builtin_mul_overflow(base, base, &base)) {
      return rt.Fail("a number is beyond 64 bits");
    }
  }
  return result;
}

Value IntOperator(Runtime& rt, std::string_view op, int64_t a, int64_t b) {
  int64_t result = 0;
  bool overflow = false;
  if (op == "+") {
    overflow = __builtin_add_overflow(a, b, &result);
  } else if (op == "-") {
    overflow = __builtin_sub_overflow(a, b, &result);
  } else if (op == "*") {
    overflow = __builtin_mul_overflow(a, b, &result);
  } else if (op == "**") {
    return IntPower(rt, a, b);
  } else if (b == 0) {
    return rt.Fail("division by zero");
  } else if (op == "/") {
    return static_cast<double>(a) / static_cast<double>(b);
  } else if (b == -1) {  // INT64_MIN / -1 is beyond 64 bits
    overflow = op == "//" && __builtin_sub_overflow(int64_t{0}, a, &result);
  } else {
    const bool down = a % b != 0 && (a % b < 0) != (b < 0);  // Python rounds towards minus infinity
    result = op == "//" ? a / b - down : a % b + (down ? b : 0);
  }
  if (overflow) return rt.Fail("a number is beyond 64 bits");
  return result;
}

Value FloatOperator(Runtime& rt, std::string_view op, double a, double b) {
  if (op == "+") return a + b;
  if (op == "-") return a - b;
  if (op == "*") return a * b;
  if (op == "**") return std::pow(a, b);
  if (b == 0) return rt.Fail("division by zero");
  if (op == "/") return a / b;
  if (op == "//") return std::floor(a / b);
  const double rest = std::fmod(a, b);
  return rest != 0 && (rest < 0) != (b < 0) ? rest + b : rest;
}

// sequence * count
Value Repeat(Runtime& rt, const Value& sequence, int64_t count) {
  const size_t size = sequence.is_string() ? sequence.str().size() : sequence.list().items.size();
  const size_t times = static_cast<size_t>(std::max<int64_t>(count, 0));
  if (size > 0 && times > rt.limits().output_bytes / size) {
    return rt.Fail("a repeated sequence is too long");
  }
  if (sequence.is_string()) {
    if (!rt.AllowString(size * times)) return {};
    std::string out;
    out.reserve(size * times);
    for (size_t i = 0; i < times && size > 0; ++i) out += sequence.str();
    return out;
  }
  if (!rt.AllowValues(size * times)) return {};
  std::vector<Value> items;
  for (size_t i = 0; i < times && size > 0; ++i) {
    items.insert(items.end(), sequence.list().items.begin(), sequence.list().items.end());
  }
  return rt.NewList(std::move(items), sequence.list().tuple);
}

Value Add(Runtime& rt, const Value& a, const Value& b) {
  if (a.is_string() && b.is_string()) {
    if (!rt.AllowString(a.str().size() + b.str().size())) return {};
    return a.str() + b.str();
  }
  if (a.is_list() && b.is_list() && a.list().tuple == b.list().tuple) {
    if (!rt.AllowValues(a.list().items.size() + b.list().items.size())) return {};
    std::vector<Value> items = a.list().items;
    items.insert(items.end(), b.list().items.begin(), b.list().items.end());
    return rt.NewList(std::move(items), a.list().tuple);
  }
  return WrongOperands(rt, "+", a, b);
}

// The item at a Python index (negative: from the end), or none.
template <typename Sequence>
const typename Sequence::value_type* At(const Sequence& items, int64_t index) {
  const auto size = static_cast<int64_t>(items.size());
  if (index < 0) index += size;
  return index < 0 || index >= size ? nullptr : &items[static_cast<size_t>(index)];
}

Value NoElement(Runtime& rt, const Value& object, const Value& key) {
  return rt.Missing(absl::StrCat("'", TypeName(object), " object' has no ",
                                 key.is_string() ? "attribute '" : "element ",
                                 Str(key).substr(0, 100), key.is_string() ? "'" : ""));
}

// Where a slice of `size` items begins and ends and what its stride is.
struct Range {
  int64_t from, to, step;
};

bool ResolveSlice(Runtime& rt, int64_t size, const Value& from, const Value& to, const Value& step,
                  Range* range) {
  for (const Value* bound : {&from, &to, &step}) {
    if (!bound->is_none() && !bound->is_integral()) {
      rt.Fail(absl::StrCat("slice bounds are integers, not ", TypeName(*bound)));
      return false;
    }
  }
  range->step = step.is_none() ? 1 : step.integral();
  if (range->step == 0) {
    rt.Fail("the step of a slice is zero");
    return false;
  }
  const bool up = range->step > 0;
  const auto clamp = [&](const Value& bound, int64_t fallback) {
    if (bound.is_none()) return fallback;
    int64_t at = bound.integral();
    if (at < 0) at = at < -size ? -1 : at + size;
    if (at < 0) return up ? int64_t{0} : int64_t{-1};
    return std::min(at, up ? size : size - 1);
  };
  range->from = clamp(from, up ? 0 : size - 1);
  range->to = clamp(to, up ? size : -1);
  return true;
}

template <typename Visit>
void ForRange(const Range& range, const Visit& visit) {
  if (range.step > 0) {
    for (int64_t i = range.from; i < range.to;) {
      visit(static_cast<size_t>(i));
      if (range.step >= range.to - i) break;  // i + step may be beyond 64 bits
      i += range.step;
    }
  } else {
    for (int64_t i = range.from; i > range.to;) {
      visit(static_cast<size_t>(i));
      if (range.step <= range.to - i) break;
      i += range.step;
    }
  }
}

}  // namespace

Value BinaryOperator(Runtime& rt, std::string_view op, const Value& a, const Value& b) {
  if (!rt.Require(a) || !rt.Require(b)) return {};
  if (op == "%" && a.is_string()) return PercentFormat(rt, a.str(), b);
  if (a.is_integral() && b.is_integral()) return IntOperator(rt, op, a.integral(), b.integral());
  if (a.is_number() && b.is_number()) return FloatOperator(rt, op, a.number(), b.number());
  if (op == "+") return Add(rt, a, b);
  if (op == "*") {
    const bool a_sequence = a.is_string() || a.is_list(), b_sequence = b.is_string() || b.is_list();
    if (a_sequence && b.is_integral()) return Repeat(rt, a, b.integral());
    if (b_sequence && a.is_integral()) return Repeat(rt, b, a.integral());
  }
  return WrongOperands(rt, op, a, b);
}

bool Contains(Runtime& rt, const Value& container, const Value& item) {
  if (rt.failed() || container.is_undefined()) return false;
  if (container.is_string()) {
    if (!item.is_string()) {
      WrongOperands(rt, "in", item, container);
      return false;
    }
    rt.Step(static_cast<int64_t>(1 + container.str().size() / 64));
    return container.str().find(item.str()) != std::string::npos;
  }
  if (container.is_dict()) return container.dict().Find(item) != nullptr;
  if (container.is_list()) {
    const auto& items = container.list().items;
    rt.Step(static_cast<int64_t>(1 + items.size()));
    return std::any_of(items.begin(), items.end(), [&](const Value& v) { return Equal(v, item); });
  }
  WrongOperands(rt, "in", item, container);
  return false;
}

bool CompareOperator(Runtime& rt, std::string_view op, const Value& a, const Value& b) {
  if (rt.failed()) return false;
  if (op == "==") return Equal(a, b);
  if (op == "!=") return !Equal(a, b);
  if (op == "in") return Contains(rt, b, a);
  if (op == "not in") return !Contains(rt, b, a);
  if (!rt.Require(a) || !rt.Require(b)) return false;
  const int order = Compare(a, b);
  if (order == 2) {
    WrongOperands(rt, op, a, b);
    return false;
  }
  if (op == "<") return order < 0;
  if (op == "<=") return order <= 0;
  return op == ">" ? order > 0 : order >= 0;
}

Value Negate(Runtime& rt, const Value& v) {
  if (!rt.Require(v)) return {};
  if (v.is_float()) return -v.number();
  if (v.is_integral()) return IntOperator(rt, "-", 0, v.integral());
  return rt.Fail(absl::StrCat("'-' does not work on ", TypeName(v)));
}

Value GetAttribute(Runtime& rt, const Value& object, std::string_view name) {
  if (!rt.Require(object)) return {};
  if (object.is<ObjectPtr>()) {
    Value found = object.object().GetAttribute(name);
    return found.is_undefined() ? NoElement(rt, object, Value(name)) : found;
  }
  Value method = FindMethod(object, name);
  if (!method.is_undefined()) return method;
  if (object.is_dict()) {
    if (const Value* found = object.dict().Find(name)) return *found;
  }
  return NoElement(rt, object, Value(name));
}

Value GetItem(Runtime& rt, const Value& object, const Value& key) {
  if (!rt.Require(object)) return {};
  if (object.is_dict()) {
    if (const Value* found = object.dict().Find(key)) return *found;
  } else if (object.is_list() && key.is_integral()) {
    if (const Value* found = At(object.list().items, key.integral())) return *found;
  } else if (object.is_string() && key.is_integral()) {
    rt.Step(static_cast<int64_t>(1 + object.str().size() / 16));
    const auto characters = Characters(object.str());
    if (const auto* found = At(characters, key.integral())) return Value(*found);
  }
  if (key.is_string()) {
    if (object.is<ObjectPtr>()) return GetAttribute(rt, object, key.str());
    Value method = FindMethod(object, key.str());
    if (!method.is_undefined()) return method;
  }
  return NoElement(rt, object, key);
}

Value GetSlice(Runtime& rt, const Value& object, const Value& from, const Value& to,
               const Value& step) {
  if (!rt.Require(object)) return {};
  Range range{};
  if (object.is_string()) {
    const auto characters = Characters(object.str());
    if (!rt.AllowString(object.str().size()) ||
        !ResolveSlice(rt, static_cast<int64_t>(characters.size()), from, to, step, &range)) {
      return {};
    }
    std::string out;
    ForRange(range, [&](size_t i) { out += characters[i]; });
    return out;
  }
  if (object.is_list()) {
    const auto& items = object.list().items;
    if (!ResolveSlice(rt, static_cast<int64_t>(items.size()), from, to, step, &range)) return {};
    std::vector<Value> out;
    ForRange(range, [&](size_t i) { out.push_back(items[i]); });
    return rt.NewList(std::move(out), object.list().tuple);
  }
  return rt.Fail(absl::StrCat("a ", TypeName(object), " has no slices"));
}

Value Call(Runtime& rt, const Value& callee, const Arguments& arguments) {
  if (!rt.Require(callee)) return {};
  if (!callee.is<ObjectPtr>() || !callee.object().callable()) {
    return rt.Fail(absl::StrCat("a ", TypeName(callee), " cannot be called"));
  }
  DepthGuard guard(rt);
  if (rt.failed()) return {};
  Value result = callee.object().Call(rt, arguments);
  return rt.failed() ? Value() : result;
}

Value GetPath(Runtime& rt, const Value& object, const Value& path) {
  if (!path.is_string()) return GetItem(rt, object, path);
  Value value = object;
  for (const std::string_view part : Split(path.str(), ".", -1)) {
    int64_t index = 0;
    const auto number = std::from_chars(part.data(), part.data() + part.size(), index);
    const bool is_number = number.ec == std::errc() && number.ptr == part.data() + part.size();
    value = GetItem(rt, value, is_number ? Value(index) : Value(part));
    if (rt.failed()) return {};
  }
  return value;
}

}  // namespace shoal::jinja
