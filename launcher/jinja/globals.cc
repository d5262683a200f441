#include <algorithm>
#include <array>
#include <ctime>

#include "absl/strings/str_cat.h"
#include "launcher/jinja/interpreter.h"
#include "launcher/jinja/methods.h"
#include "launcher/jinja/operators.h"

namespace shoal::jinja {
namespace {

constexpr int64_t kMaxRange = 100'000;  // as Jinja's sandbox

Value Range(Runtime& rt, const Value&, const Arguments& arguments) {
  Parameters p(rt, "range()", arguments, {"start", "stop", "step"}, 1);
  if (!p.ok()) return {};
  const int64_t from = p.has(1) ? p.Int(0, 0) : 0;
  const int64_t to = p.has(1) ? p.Int(1, 0) : p.Int(0, 0);
  const int64_t step = p.Int(2, 1);
  if (!p.ok()) return {};
  if (step == 0) return rt.Fail("range() was given a step of zero");
  std::vector<Value> items;
  for (int64_t i = from; step > 0 ? i < to : i > to;) {
    if (static_cast<int64_t>(items.size()) >= kMaxRange) {
      return rt.Fail(absl::StrCat("range() would have more than ", kMaxRange, " items"));
    }
    items.emplace_back(i);
    if (__builtin_add_overflow(i, step, &i)) break;
  }
  return rt.NewList(std::move(items));
}

// From dicts, then from named arguments.
Dict* MakeDict(Runtime& rt, const Arguments& arguments) {
  Dict* dict = rt.NewDict();
  for (const Value& other : arguments.positional) {
    if (!other.is_dict()) {
      rt.Fail(absl::StrCat("dict() takes a dict, not a ", TypeName(other)));
      break;
    }
    for (const auto& [key, value] : other.dict().items) rt.SetItem(*dict, key, value);
  }
  for (const auto& [key, value] : arguments.keyword) rt.SetItem(*dict, Value(key), value);
  return dict;
}

Value DictFunction(Runtime& rt, const Value&, const Arguments& arguments) {
  return MakeDict(rt, arguments);
}

class Namespace : public Object {
 public:
  explicit Namespace(Dict* values) : values_(values) {}
  std::string_view kind() const override { return "namespace"; }
  Value GetAttribute(std::string_view name) const override {
    const Value* found = values_->Find(name);
    return found == nullptr ? Value() : *found;
  }
  bool SetAttribute(Runtime& rt, const std::string& name, const Value& value) const override {
    if (values_->Find(std::string_view(name)) == nullptr) {
      rt.SetItem(*values_, Value(name), value);
    } else {
      values_->Set(Value(name), value);
    }
    return true;
  }

 private:
  Dict* const values_;  // of the runtime's heap
};

Value NamespaceFunction(Runtime& rt, const Value&, const Arguments& arguments) {
  return ObjectPtr(std::make_shared<Namespace>(MakeDict(rt, arguments)));
}

Value RaiseException(Runtime& rt, const Value&, const Arguments& arguments) {
  Parameters p(rt, "raise_exception()", arguments, {"message"}, 1);
  return p.ok() ? rt.Fail(rt.Text(p[0])) : Value();
}

// `self` is the time, in seconds.
Value StrftimeNow(Runtime& rt, const Value& self, const Arguments& arguments) {
  Parameters p(rt, "strftime_now()", arguments, {"format"}, 1);
  const std::string format = p.ok() ? p.String(0, "") : "";
  if (!p.ok() || format.empty()) return p.ok() ? Value("") : Value();
  if (format.size() > 1000) return rt.Fail("strftime_now() was given too long a format");
  const std::time_t now = self.integral();
  std::tm parts{};
  localtime_r(&now, &parts);
  // Eight times the format holds what any conversion makes of its two characters.
  std::string out(format.size() * 64 + 64, '\0');
  out.resize(std::strftime(out.data(), out.size(), format.c_str(), &parts));
  return out;
}

// joiner(sep): empty at its first call, the separator from then on.
class Joiner : public Object {
 public:
  explicit Joiner(std::string separator) : separator_(std::move(separator)) {}
  std::string_view kind() const override { return "joiner"; }
  bool callable() const override { return true; }
  Value Call(Runtime& rt, const Arguments&) const override {
    return std::exchange(used_, true) ? rt.NewString(separator_) : Value("");
  }

 private:
  const std::string separator_;
  mutable bool used_ = false;
};

Value JoinerFunction(Runtime& rt, const Value&, const Arguments& arguments) {
  Parameters p(rt, "joiner()", arguments, {"sep"});
  return p.ok() ? Value(ObjectPtr(std::make_shared<Joiner>(p.String(0, ", ")))) : Value();
}

}  // namespace

absl::flat_hash_map<std::string, Value> Globals(std::time_t now) {
  const auto function = [](Builtin f, Value self = {}) {
    return Value(ObjectPtr(std::make_shared<BuiltinObject>(f, std::move(self))));
  };
  return {
      {"range", function(Range)},
      {"dict", function(DictFunction)},
      {"namespace", function(NamespaceFunction)},
      {"raise_exception", function(RaiseException)},
      {"strftime_now", function(StrftimeNow, static_cast<int64_t>(now))},
      {"joiner", function(JoinerFunction)},
  };
}

}  // namespace shoal::jinja
