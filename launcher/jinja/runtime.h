// What one rendering carries around: its heap, its limits, and the first error.
//
// Code that evaluates returns plain Values. After Fail() the runtime is failed(), every evaluation
// returns undefined at once, and Template::Render reports the first error.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "launcher/jinja/value.h"

namespace shoal::jinja {

struct Limits {
  size_t output_bytes = 64 << 20;  // of the rendering, and of any string on the way
  int64_t steps = 50'000'000;      // nodes evaluated, and one for each few bytes or items handled
  int64_t values = 8'000'000;      // held in lists and dicts
  int depth = 700;                 // of evaluations within each other, macro calls included
  std::chrono::milliseconds time{10'000};
};

class Runtime {
 public:
  explicit Runtime(const Limits& limits)
      : limits_(limits), deadline_(std::chrono::steady_clock::now() + limits.time) {}

  bool failed() const { return !status_.ok(); }
  const absl::Status& status() const { return status_; }
  // Keeps the first message, with the line that is being evaluated. Returns undefined.
  Value Fail(std::string_view what);

  // Charges work; false when a limit is reached or an error happened before.
  bool Step(int64_t work = 1);
  // Charges for a string that is about to be made; false when it would be too long.
  bool AllowString(size_t bytes);
  bool AllowValues(size_t count);

  // Containers, charged for.
  Value NewList(std::vector<Value> items, bool tuple = false);
  Dict* NewDict();
  void SetItem(Dict& dict, const Value& key, Value value);
  Value NewString(std::string text) {
    return AllowString(text.size()) ? Value(std::move(text)) : Value();
  }

  // An undefined value for something that does not exist.
  Value Missing(std::string reason) { return Value::MakeUndefined(std::move(reason)); }
  // Fails when `v` is undefined (it may be printed and tested, not worked with).
  bool Require(const Value& v);
  // Items to loop over: of a list, the characters of a string, the keys of a dict, none of
  // undefined.
  bool Items(const Value& v, std::vector<Value>* out);
  // Str() of a value, charged for.
  std::string Text(const Value& v);

  const Limits& limits() const { return limits_; }
  int line = 0;   // being evaluated
  int depth = 0;  // evaluations open

 private:
  const Limits limits_;
  const std::chrono::steady_clock::time_point deadline_;
  int64_t steps_ = 0;
  int64_t next_clock_ = 0;  // steps at which the time is looked at again
  int64_t values_ = 0;
  absl::Status status_;
  Heap heap_;
};

// Counts one evaluation inside another. `ok()` is false where the depth limit is reached.
class DepthGuard {
 public:
  explicit DepthGuard(Runtime& rt) : rt_(rt) {
    if (++rt_.depth > rt_.limits().depth) rt_.Fail("evaluation nests too deep");
  }
  ~DepthGuard() { --rt_.depth; }
  DepthGuard(const DepthGuard&) = delete;
  DepthGuard& operator=(const DepthGuard&) = delete;

 private:
  Runtime& rt_;
};

// Matches the arguments of a call to the parameters of a built-in. Too many of them, unknown names
// and missing ones fail, with the built-in's name.
class Parameters {
 public:
  Parameters(Runtime& rt, std::string_view function, const Arguments& arguments,
             std::initializer_list<std::string_view> names, size_t required = 0);
  bool ok() const { return !rt_.failed(); }
  bool has(size_t i) const { return values_[i] != nullptr; }
  // REQUIRES: has(i)
  const Value& operator[](size_t i) const { return *values_[i]; }
  // With a fallback; fail when the argument is of another type. None counts as not given.
  int64_t Int(size_t i, int64_t fallback);
  bool Bool(size_t i, bool fallback) const { return has(i) ? Truth(*values_[i]) : fallback; }
  std::string String(size_t i, std::string_view fallback);

 private:
  Runtime& rt_;
  const std::string function_;
  std::vector<const Value*> values_;
};

}  // namespace shoal::jinja
