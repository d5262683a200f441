// The tests of the language: what stands behind `is`.
#include <map>

#include "absl/strings/str_cat.h"
#include "launcher/jinja/filters.h"
#include "launcher/jinja/operators.h"
#include "launcher/jinja/python_text.h"

namespace shoal::jinja {
namespace {

bool IsDefined(Runtime&, const Value& v, const Arguments&) { return !v.is_undefined(); }
bool IsUndefined(Runtime&, const Value& v, const Arguments&) { return v.is_undefined(); }
bool IsNone(Runtime&, const Value& v, const Arguments&) { return v.is_none(); }
bool IsBoolean(Runtime&, const Value& v, const Arguments&) { return v.is_bool(); }
bool IsTrue(Runtime&, const Value& v, const Arguments&) { return v.is_bool() && Truth(v); }
bool IsFalse(Runtime&, const Value& v, const Arguments&) { return v.is_bool() && !Truth(v); }
bool IsInteger(Runtime&, const Value& v, const Arguments&) { return v.is_int(); }
bool IsFloat(Runtime&, const Value& v, const Arguments&) { return v.is_float(); }
bool IsNumber(Runtime&, const Value& v, const Arguments&) { return v.is_number(); }
bool IsString(Runtime&, const Value& v, const Arguments&) { return v.is_string(); }
bool IsMapping(Runtime&, const Value& v, const Arguments&) { return v.is_dict(); }
// As in Jinja, text, mappings and undefined values can be looped over and indexed.
bool IsIterable(Runtime&, const Value& v, const Arguments&) {
  return v.is_string() || v.is_list() || v.is_dict() || v.is_undefined();
}
bool IsCallable(Runtime&, const Value& v, const Arguments&) {
  return v.is<ObjectPtr>() && v.object().callable();
}

// The remainder of an integer, for even, odd and divisibleby.
bool Divides(Runtime& rt, const Value& v, int64_t by, int64_t rest) {
  if (!v.is_integral()) {
    rt.Fail(absl::StrCat("a ", TypeName(v), " is neither even nor odd nor divisible"));
    return false;
  }
  const Value found = BinaryOperator(rt, "%", v, Value(by));
  return found.is_int() && found.integral() == rest;
}
bool IsEven(Runtime& rt, const Value& v, const Arguments&) { return Divides(rt, v, 2, 0); }
bool IsOdd(Runtime& rt, const Value& v, const Arguments&) { return Divides(rt, v, 2, 1); }
bool IsDivisibleBy(Runtime& rt, const Value& v, const Arguments& arguments) {
  Parameters p(rt, "divisibleby", arguments, {"num"}, 1);
  return p.ok() && Divides(rt, v, p.Int(0, 1), 0);
}

bool IsLower(Runtime& rt, const Value& v, const Arguments&) {
  return AllAre(rt.Text(v), CharacterClass::kLower);
}
bool IsUpper(Runtime& rt, const Value& v, const Arguments&) {
  return AllAre(rt.Text(v), CharacterClass::kUpper);
}

bool WithOperator(Runtime& rt, const char* op, const Value& v, const Arguments& arguments) {
  Parameters p(rt, op, arguments, {"other"}, 1);
  return p.ok() && CompareOperator(rt, op, v, p[0]);
}
bool IsEq(Runtime& rt, const Value& v, const Arguments& a) { return WithOperator(rt, "==", v, a); }
bool IsNe(Runtime& rt, const Value& v, const Arguments& a) { return WithOperator(rt, "!=", v, a); }
bool IsLt(Runtime& rt, const Value& v, const Arguments& a) { return WithOperator(rt, "<", v, a); }
bool IsLe(Runtime& rt, const Value& v, const Arguments& a) { return WithOperator(rt, "<=", v, a); }
bool IsGt(Runtime& rt, const Value& v, const Arguments& a) { return WithOperator(rt, ">", v, a); }
bool IsGe(Runtime& rt, const Value& v, const Arguments& a) { return WithOperator(rt, ">=", v, a); }
bool IsIn(Runtime& rt, const Value& v, const Arguments& a) { return WithOperator(rt, "in", v, a); }
bool IsSameAs(Runtime& rt, const Value& v, const Arguments& arguments) {
  Parameters p(rt, "sameas", arguments, {"other"}, 1);
  return p.ok() && v.same_as(p[0]);
}

bool IsFilter(Runtime& rt, const Value& v, const Arguments&) {
  return v.is_string() && FindFilter(v.str()) != nullptr;
}
bool IsTest(Runtime& rt, const Value& v, const Arguments&) {
  return v.is_string() && FindTest(v.str()) != nullptr;
}

}  // namespace

TestFunction FindTest(std::string_view name) {
  static const std::map<std::string_view, TestFunction> table = {
      {"defined", IsDefined},
      {"undefined", IsUndefined},
      {"none", IsNone},
      {"boolean", IsBoolean},
      {"true", IsTrue},
      {"false", IsFalse},
      {"integer", IsInteger},
      {"float", IsFloat},
      {"number", IsNumber},
      {"string", IsString},
      {"mapping", IsMapping},
      {"sequence", IsIterable},
      {"iterable", IsIterable},
      {"callable", IsCallable},
      {"even", IsEven},
      {"odd", IsOdd},
      {"divisibleby", IsDivisibleBy},
      {"lower", IsLower},
      {"upper", IsUpper},
      {"eq", IsEq},
      {"equalto", IsEq},
      {"==", IsEq},
      {"ne", IsNe},
      {"!=", IsNe},
      {"lt", IsLt},
      {"lessthan", IsLt},
      {"<", IsLt},
      {"le", IsLe},
      {"<=", IsLe},
      {"gt", IsGt},
      {"greaterthan", IsGt},
      {">", IsGt},
      {"ge", IsGe},
      {">=", IsGe},
      {"in", IsIn},
      {"sameas", IsSameAs},
      {"filter", IsFilter},
      {"test", IsTest},
  };
  const auto found = table.find(name);
  return found == table.end() ? nullptr : found->second;
}

bool ApplyTest(Runtime& rt, std::string_view name, const Value& value, const Arguments& arguments) {
  if (!rt.Step()) return false;
  const TestFunction test = FindTest(name);
  if (test == nullptr) {
    rt.Fail(absl::StrCat("there is no test '", std::string(name), "'"));
    return false;
  }
  return test(rt, value, arguments) && !rt.failed();
}

}  // namespace shoal::jinja
