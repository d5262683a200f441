#include "launcher/jinja/value.h"

#include <algorithm>
#include <charconv>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "launcher/jinja/python_text.h"

namespace shoal::jinja {
namespace {

constexpr int kMaxNesting = 100;

// Shared parts can make a value far larger to walk than to hold ([x, x] over and over), so walks
// are cut off: nothing that a template really prints or compares comes near.
constexpr int64_t kMaxComparisons = 10'000'000;

bool EqualAt(const Value& a, const Value& b, int depth, int64_t& budget);

bool EqualDicts(const Dict& a, const Dict& b, int depth, int64_t& budget) {
  if (a.items.size() != b.items.size()) return false;
  for (const auto& [key, value] : a.items) {
    const Value* other = b.Find(key);
    if (other == nullptr || !EqualAt(value, *other, depth + 1, budget)) return false;
  }
  return true;
}

bool EqualAt(const Value& a, const Value& b, int depth, int64_t& budget) {
  if (a.is_number() && b.is_number()) {
    if (a.is_integral() && b.is_integral()) return a.integral() == b.integral();
    return a.number() == b.number();
  }
  if (a.same_as(b) || depth > kMaxNesting || --budget < 0) return a.same_as(b);
  if (a.is_list() && b.is_list()) {
    const List &x = a.list(), &y = b.list();
    return x.tuple == y.tuple && std::equal(x.items.begin(), x.items.end(), y.items.begin(),
                                            y.items.end(), [&](const Value& i, const Value& j) {
                                              return EqualAt(i, j, depth + 1, budget);
                                            });
  }
  return a.is_dict() && b.is_dict() && EqualDicts(a.dict(), b.dict(), depth, budget);
}

void AppendRepr(const Value& v, int depth, size_t max, std::string& out);

void AppendReprList(const List& list, int depth, size_t max, std::string& out) {
  out += list.tuple ? '(' : '[';
  bool first = true;
  for (const Value& item : list.items) {
    if (!first) out += ", ";
    first = false;
    AppendRepr(item, depth + 1, max, out);
  }
  if (list.tuple && list.items.size() == 1) out += ',';
  out += list.tuple ? ')' : ']';
}

void AppendReprDict(const Dict& dict, int depth, size_t max, std::string& out) {
  out += '{';
  bool first = true;
  for (const auto& [key, value] : dict.items) {
    if (!first) out += ", ";
    first = false;
    AppendRepr(key, depth + 1, max, out);
    out += ": ";
    AppendRepr(value, depth + 1, max, out);
  }
  out += '}';
}

void AppendRepr(const Value& v, int depth, size_t max, std::string& out) {
  if (out.size() > max) return;
  if (v.is_string()) {
    out += StringRepr(v.str());
  } else if (v.is_undefined()) {
    out += "Undefined";
  } else if (v.is_none()) {
    out += "None";
  } else if (v.is_bool()) {
    out += v.integral() != 0 ? "True" : "False";
  } else if (v.is_int()) {
    absl::StrAppend(&out, v.integral());
  } else if (v.is_float()) {
    out += FloatRepr(v.number());
  } else if (depth > kMaxNesting) {
    out += "...";
  } else if (v.is_list()) {
    AppendReprList(v.list(), depth, max, out);
  } else if (v.is_dict()) {
    AppendReprDict(v.dict(), depth, max, out);
  } else {
    absl::StrAppend(&out, "<", std::string(v.object().kind()), ">");
  }
}

}  // namespace

Value Value::MakeUndefined(std::string reason) {
  Value v;
  v.data_ = Undefined{std::make_shared<const std::string>(std::move(reason))};
  return v;
}

bool Value::same_as(const Value& other) const {
  if (data_.index() != other.data_.index()) return false;
  if (is_list()) return &list() == &other.list();
  if (is_dict()) return &dict() == &other.dict();
  if (is<ObjectPtr>()) return &object() == &other.object();
  if (is_string()) return str() == other.str();
  if (is_number()) return number() == other.number();
  return true;  // None, undefined
}

std::string Dict::IndexKey(const Value& key) {
  if (key.is_string()) return absl::StrCat("s", key.str());
  // 1, 1.0 and True are one key in Python.
  if (key.is_float() && key.number() == std::floor(key.number()) && std::abs(key.number()) < 9e15) {
    return absl::StrCat("i", static_cast<int64_t>(key.number()));
  }
  if (key.is_integral()) return absl::StrCat("i", key.integral());
  return absl::StrCat("r", Repr(key));
}

const Value* Dict::Find(const Value& key) const {
  const auto found = index_.find(IndexKey(key));
  return found == index_.end() ? nullptr : &items[found->second].second;
}

const Value* Dict::Find(std::string_view key) const {
  const auto found = index_.find(absl::StrCat("s", std::string(key)));
  return found == index_.end() ? nullptr : &items[found->second].second;
}

void Dict::Set(const Value& key, Value value) {
  const auto [entry, added] = index_.try_emplace(IndexKey(key), items.size());
  if (added) {
    items.emplace_back(key, std::move(value));
  } else {
    items[entry->second].second = std::move(value);
  }
}

bool Dict::Erase(const Value& key) {
  const auto found = index_.find(IndexKey(key));
  if (found == index_.end()) return false;
  const size_t at = found->second;
  index_.erase(found);
  items.erase(items.begin() + static_cast<ptrdiff_t>(at));
  for (auto& [name, position] : index_) {
    if (position > at) --position;
  }
  return true;
}

List* Heap::NewList(std::vector<Value> items, bool tuple) {
  lists_.push_back({std::move(items), tuple});
  return &lists_.back();
}

Dict* Heap::NewDict() { return &dicts_.emplace_back(); }

bool Truth(const Value& v) {
  if (v.is_undefined() || v.is_none()) return false;
  if (v.is_number()) return v.number() != 0;
  if (v.is_string()) return !v.str().empty();
  if (v.is_list()) return !v.list().items.empty();
  if (v.is_dict()) return !v.dict().items.empty();
  return true;
}

bool Equal(const Value& a, const Value& b) {
  int64_t budget = kMaxComparisons;
  return EqualAt(a, b, 0, budget);
}

int Compare(const Value& a, const Value& b) {
  if (a.is_integral() && b.is_integral()) {
    return a.integral() < b.integral() ? -1 : a.integral() > b.integral();
  }
  if (a.is_number() && b.is_number()) {
    return a.number() < b.number() ? -1 : a.number() > b.number();
  }
  if (a.is_string() && b.is_string()) {
    const int order = a.str().compare(b.str());  // of UTF-8 bytes: that of code points
    return order < 0 ? -1 : order > 0;
  }
  if (a.is_list() && b.is_list() && a.list().tuple == b.list().tuple) {
    const auto &x = a.list().items, &y = b.list().items;
    for (size_t i = 0; i < x.size() && i < y.size(); ++i) {
      if (Equal(x[i], y[i])) continue;
      if (x[i].is_list() && y[i].is_list()) return 2;  // no deeper: it needs no recursion limit
      return Compare(x[i], y[i]);
    }
    return x.size() < y.size() ? -1 : x.size() > y.size();
  }
  return 2;
}

std::string TypeName(const Value& v) {
  if (v.is_undefined()) return "Undefined";
  if (v.is_none()) return "NoneType";
  if (v.is_bool()) return "bool";
  if (v.is_int()) return "int";
  if (v.is_float()) return "float";
  if (v.is_string()) return "str";
  if (v.is_list()) return v.list().tuple ? "tuple" : "list";
  if (v.is_dict()) return "dict";
  return std::string(v.object().kind());
}

// The shortest digits that read back as the same number, in Python's choice of notation.
std::string FloatRepr(double d) {
  if (std::isnan(d)) return "nan";
  if (std::isinf(d)) return d < 0 ? "-inf" : "inf";
  char buffer[64];
  const auto end = std::to_chars(buffer, buffer + sizeof(buffer), d, std::chars_format::scientific);
  const std::string_view text(buffer, end.ptr - buffer);
  const size_t e = text.find('e');
  int exponent = 0;
  const size_t sign = text[e + 1] == '+' ? 2 : 1;  // from_chars takes no '+'
  std::from_chars(text.data() + e + sign, text.data() + text.size(), exponent);
  if (exponent < -4 || exponent >= 16) return std::string(text);
  const auto fixed = std::to_chars(buffer, buffer + sizeof(buffer), d, std::chars_format::fixed);
  std::string out(buffer, fixed.ptr - buffer);
  if (out.find('.') == std::string::npos) out += ".0";
  return out;
}

std::string Str(const Value& v, size_t max_bytes) {
  if (v.is_string()) return v.str();
  if (v.is_undefined()) return "";
  return Repr(v, max_bytes);
}

std::string Repr(const Value& v, size_t max_bytes) {
  std::string out;
  AppendRepr(v, 0, max_bytes, out);
  return out;
}

}  // namespace shoal::jinja
