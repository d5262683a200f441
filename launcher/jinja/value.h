// Values of the template language: Python's, as far as chat templates see them.
//
// Strings are shared and never change. Lists, dicts and namespaces may change and may even hold
// themselves, so a Heap owns them all and Values only point at them: a Value must not outlive the
// Heap of the rendering it belongs to. Nothing here is thread-safe; a rendering has one thread.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "absl/container/flat_hash_map.h"

namespace shoal::jinja {

struct List;
struct Dict;
struct Object;

struct None {};
// A name or attribute that does not exist: empty when printed, an error when used.
struct Undefined {
  std::shared_ptr<const std::string> reason;  // "'foo' is undefined"; may be null
};

using StringPtr = std::shared_ptr<const std::string>;
using ObjectPtr = std::shared_ptr<const Object>;

class Value {
 public:
  Value() = default;  // undefined
  Value(None) : data_(None{}) {}
  Value(bool b) : data_(b) {}
  Value(int i) : data_(int64_t{i}) {}
  Value(int64_t i) : data_(i) {}
  Value(double d) : data_(d) {}
  Value(const char* s) : Value(std::string(s)) {}
  Value(std::string_view s) : Value(std::string(s)) {}
  Value(std::string s) : data_(std::make_shared<const std::string>(std::move(s))) {}
  Value(List* list) : data_(list) {}
  Value(Dict* dict) : data_(dict) {}
  Value(ObjectPtr object) : data_(std::move(object)) {}
  static Value MakeUndefined(std::string reason);

  template <typename T>
  bool is() const {
    return std::holds_alternative<T>(data_);
  }
  bool is_undefined() const { return is<Undefined>(); }
  bool is_none() const { return is<None>(); }
  bool is_bool() const { return is<bool>(); }
  bool is_int() const { return is<int64_t>(); }
  bool is_float() const { return is<double>(); }
  bool is_string() const { return is<StringPtr>(); }
  bool is_list() const { return is<List*>(); }  // tuples too
  bool is_dict() const { return is<Dict*>(); }  // not namespaces
  bool is_number() const { return is_bool() || is_int() || is_float(); }
  bool is_integral() const { return is_bool() || is_int(); }

  // REQUIRES: the kind asked for.
  const std::string& str() const { return *std::get<StringPtr>(data_); }
  List& list() const { return *std::get<List*>(data_); }
  Dict& dict() const { return *std::get<Dict*>(data_); }
  const Object& object() const { return *std::get<ObjectPtr>(data_); }
  int64_t integral() const { return is_bool() ? std::get<bool>(data_) : std::get<int64_t>(data_); }
  double number() const {
    return is_float() ? std::get<double>(data_) : static_cast<double>(integral());
  }
  const Undefined& undefined() const { return std::get<Undefined>(data_); }
  bool same_as(const Value& other) const;  // Python's `is`

 private:
  std::variant<Undefined, None, bool, int64_t, double, StringPtr, List*, Dict*, ObjectPtr> data_;
};

struct List {
  std::vector<Value> items;
  bool tuple = false;
};

// Keeps the order of insertion. Keys are strings, numbers, None or tuples of those.
struct Dict {
  const Value* Find(const Value& key) const;
  const Value* Find(std::string_view key) const;
  void Set(const Value& key, Value value);
  bool Erase(const Value& key);

  std::vector<std::pair<Value, Value>> items;

 private:
  // Equal keys have equal strings here.
  static std::string IndexKey(const Value& key);
  absl::flat_hash_map<std::string, size_t> index_;
};

class Runtime;

struct Arguments {
  std::vector<Value> positional;
  std::vector<std::pair<std::string, Value>> keyword;
};

// A macro, a function, a bound method, the `loop` variable, a namespace.
struct Object {
  virtual ~Object() = default;
  virtual std::string_view kind() const = 0;  // for error messages and printing
  // Undefined without a reason: no such attribute.
  virtual Value GetAttribute(std::string_view name) const { return {}; }
  virtual bool callable() const { return false; }
  // Errors go to the runtime. REQUIRES: callable().
  virtual Value Call(Runtime& runtime, const Arguments& arguments) const { return {}; }
  // False: attributes cannot be set.
  virtual bool SetAttribute(Runtime& runtime, const std::string& name, const Value& value) const {
    return false;
  }
};

// Owns the containers of one rendering.
class Heap {
 public:
  List* NewList(std::vector<Value> items = {}, bool tuple = false);
  Dict* NewDict();

 private:
  std::deque<List> lists_;
  std::deque<Dict> dicts_;
};

bool Truth(const Value& v);                  // Python's bool()
bool Equal(const Value& a, const Value& b);  // Python's ==; containers nest at most 100 deep
std::string TypeName(const Value& v);        // "str", "int", ...
std::string FloatRepr(double d);             // Python's repr(float)
// Python's str() and repr(). Nesting beyond 100 levels prints as "..."; a container stops to be
// written out soon after max_bytes.
std::string Str(const Value& v, size_t max_bytes = 1 << 20);
std::string Repr(const Value& v, size_t max_bytes = 1 << 20);

// -1 less, 0 equal, 1 greater, 2 not comparable.
int Compare(const Value& a, const Value& b);

}  // namespace shoal::jinja
