#include "launcher/jinja/runtime.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "launcher/jinja/python_text.h"

namespace shoal::jinja {

namespace {
constexpr int64_t kStepsBetweenClocks = 4096;
constexpr size_t kBytesPerStep = 16;
}  // namespace

Value Runtime::Fail(std::string_view what) {
  if (!failed()) {
    status_ = absl::InvalidArgumentError(
        absl::StrCat("chat template line ", line, ": ", std::string(what)));
  }
  return {};
}

bool Runtime::Step(int64_t work) {
  if (failed()) return false;
  steps_ += work;
  if (steps_ > limits_.steps) {
    Fail(absl::StrCat("gave up after ", limits_.steps, " steps"));
  } else if (steps_ >= next_clock_) {
    next_clock_ = steps_ + kStepsBetweenClocks;
    if (std::chrono::steady_clock::now() > deadline_) {
      Fail(absl::StrCat("gave up after ", limits_.time.count(), " ms"));
    }
  }
  return !failed();
}

bool Runtime::AllowString(size_t bytes) {
  if (bytes > limits_.output_bytes) {
    Fail(absl::StrCat("a text of ", bytes, " bytes is longer than the limit of ",
                      limits_.output_bytes));
    return false;
  }
  return Step(static_cast<int64_t>(1 + bytes / kBytesPerStep));
}

bool Runtime::AllowValues(size_t count) {
  values_ += static_cast<int64_t>(count);
  if (values_ > limits_.values) {
    Fail(absl::StrCat("lists and dicts hold more than ", limits_.values, " values"));
  }
  return Step(static_cast<int64_t>(1 + count / 4));
}

Value Runtime::NewList(std::vector<Value> items, bool tuple) {
  if (!AllowValues(items.size() + 1)) return {};
  return heap_.NewList(std::move(items), tuple);
}

Dict* Runtime::NewDict() {
  AllowValues(1);
  return heap_.NewDict();
}

void Runtime::SetItem(Dict& dict, const Value& key, Value value) {
  if (key.is_dict() || (key.is_list() && !key.list().tuple)) {
    Fail(absl::StrCat("a ", TypeName(key), " cannot be a key"));
    return;
  }
  if (AllowValues(4)) dict.Set(key, std::move(value));
}

bool Runtime::Require(const Value& v) {
  if (failed()) return false;
  if (!v.is_undefined()) return true;
  const StringPtr& reason = v.undefined().reason;
  Fail(reason != nullptr ? *reason : "a value is undefined");
  return false;
}

bool Runtime::Items(const Value& v, std::vector<Value>* out) {
  out->clear();
  if (failed()) return false;
  if (v.is_undefined()) return true;
  if (v.is_list()) {
    *out = v.list().items;
  } else if (v.is_string()) {
    for (const std::string_view c : Characters(v.str())) out->emplace_back(c);
  } else if (v.is_dict()) {
    for (const auto& [key, value] : v.dict().items) out->push_back(key);
  } else {
    Fail(absl::StrCat("a ", TypeName(v), " cannot be looped over"));
    return false;
  }
  return Step(static_cast<int64_t>(out->size()));
}

std::string Runtime::Text(const Value& v) {
  std::string text = Str(v, limits_.output_bytes);
  return AllowString(text.size()) ? text : std::string();
}

Parameters::Parameters(Runtime& rt, std::string_view function, const Arguments& arguments,
                       std::initializer_list<std::string_view> names, size_t required)
    : rt_(rt), function_(function), values_(names.size(), nullptr) {
  if (arguments.positional.size() > names.size()) {
    rt_.Fail(absl::StrCat(function_, " takes at most ", names.size(), " arguments, ",
                          arguments.positional.size(), " given"));
    return;
  }
  for (size_t i = 0; i < arguments.positional.size(); ++i) values_[i] = &arguments.positional[i];
  for (const auto& [name, value] : arguments.keyword) {
    const auto* found = std::find(names.begin(), names.end(), name);
    if (found == names.end() || values_[found - names.begin()] != nullptr) {
      rt_.Fail(absl::StrCat(
          function_,
          found == names.end() ? " has no parameter '" : " has two values for parameter '", name,
          "'"));
      return;
    }
    values_[found - names.begin()] = &value;
  }
  for (size_t i = 0; i < required; ++i) {
    if (values_[i] != nullptr) continue;
    rt_.Fail(absl::StrCat(function_, " needs its parameter '", std::string(names.begin()[i]), "'"));
    return;
  }
}

int64_t Parameters::Int(size_t i, int64_t fallback) {
  if (!has(i) || values_[i]->is_none()) return fallback;
  if (values_[i]->is_integral()) return values_[i]->integral();
  rt_.Fail(absl::StrCat(function_, " was given a ", TypeName(*values_[i]), "; expected an int"));
  return fallback;
}

std::string Parameters::String(size_t i, std::string_view fallback) {
  if (!has(i) || values_[i]->is_none()) return std::string(fallback);
  if (values_[i]->is_string()) return values_[i]->str();
  rt_.Fail(absl::StrCat(function_, " was given a ", TypeName(*values_[i]), "; expected a str"));
  return std::string(fallback);
}

}  // namespace shoal::jinja
