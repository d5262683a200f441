#include "launcher/jinja/json_text.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "launcher/jinja/python_text.h"
#include "nlohmann/json.hpp"

namespace shoal::jinja {
namespace {

constexpr int kMaxNesting = 200;

Value FromJsonAt(Runtime& rt, const nlohmann::ordered_json& json, int depth) {
  if (depth > kMaxNesting) return rt.Fail("the request's JSON nests too deep");
  switch (json.type()) {
    case nlohmann::ordered_json::value_t::boolean:
      return json.get<bool>();
    case nlohmann::ordered_json::value_t::number_integer:
      return json.get<int64_t>();
    case nlohmann::ordered_json::value_t::number_unsigned: {
      const auto u = json.get<uint64_t>();
      return u > INT64_MAX ? Value(static_cast<double>(u)) : Value(static_cast<int64_t>(u));
    }
    case nlohmann::ordered_json::value_t::number_float:
      return json.get<double>();
    case nlohmann::ordered_json::value_t::string:
      return rt.NewString(json.get_ref<const std::string&>());
    case nlohmann::ordered_json::value_t::array: {
      std::vector<Value> items;
      for (const auto& item : json) items.push_back(FromJsonAt(rt, item, depth + 1));
      return rt.NewList(std::move(items));
    }
    case nlohmann::ordered_json::value_t::object: {
      Dict* dict = rt.NewDict();
      for (const auto& [key, item] : json.items()) {
        rt.SetItem(*dict, Value(key), FromJsonAt(rt, item, depth + 1));
      }
      return dict;
    }
    default:
      return None{};
  }
}

class JsonWriter {
 public:
  JsonWriter(Runtime& rt, const JsonStyle& style) : rt_(rt), style_(style) {}

  std::string Run(const Value& value) {
    Write(value, 0);
    return std::move(out_);
  }

 private:
  void Write(const Value& v, int depth) {
    if (!rt_.Step()) return;
    if (out_.size() > rt_.limits().output_bytes || depth > kMaxNesting) {
      rt_.Fail("tojson: the value is too large or nests too deep");
    } else if (v.is_none()) {
      out_ += "null";
    } else if (v.is_bool()) {
      out_ += v.integral() != 0 ? "true" : "false";
    } else if (v.is_int()) {
      absl::StrAppend(&out_, v.integral());
    } else if (v.is_float()) {
      out_ += Number(v.number());
    } else if (v.is_string()) {
      out_ += JsonString(v.str(), style_.ascii_only);
    } else if (v.is_list()) {
      WriteList(v.list(), depth);
    } else if (v.is_dict()) {
      WriteDict(v.dict(), depth);
    } else {
      rt_.Fail(absl::StrCat("tojson: a value of type ", TypeName(v), " has no JSON form"));
    }
  }

  static std::string Number(double d) {
    if (std::isnan(d)) return "NaN";
    if (std::isinf(d)) return d < 0 ? "-Infinity" : "Infinity";
    return FloatRepr(d);
  }

  void Break(int depth, bool first) {
    if (!first) out_ += style_.item_separator;
    NewLine(depth);
  }
  void NewLine(int depth) {
    if (!style_.pretty) return;
    out_ += '\n';
    for (int i = 0; i < depth; ++i) out_ += style_.indent;
  }

  void WriteList(const List& list, int depth) {
    if (list.items.empty()) {
      out_ += "[]";
      return;
    }
    out_ += '[';
    bool first = true;
    for (const Value& item : list.items) {
      Break(depth + 1, first);
      first = false;
      Write(item, depth + 1);
    }
    NewLine(depth);
    out_ += ']';
  }

  void WriteDict(const Dict& dict, int depth) {
    if (dict.items.empty()) {
      out_ += "{}";
      return;
    }
    auto items = dict.items;
    if (style_.sort_keys) {
      std::stable_sort(items.begin(), items.end(), [](const auto& a, const auto& b) {
        return Compare(a.first, b.first) == -1;
      });
    }
    out_ += '{';
    bool first = true;
    for (const auto& [key, value] : items) {
      Break(depth + 1, first);
      first = false;
      // Keys that are not text are written as the text of their JSON form.
      if (key.is_string()) {
        out_ += JsonString(key.str(), style_.ascii_only);
      } else {
        out_ += '"';
        Write(key, depth + 1);
        out_ += '"';
      }
      out_ += style_.key_separator;
      Write(value, depth + 1);
    }
    NewLine(depth);
    out_ += '}';
  }

  Runtime& rt_;
  const JsonStyle& style_;
  std::string out_;
};

}  // namespace

Value FromJson(Runtime& rt, const nlohmann::ordered_json& json) { return FromJsonAt(rt, json, 0); }

std::string ToJson(Runtime& rt, const Value& value, const JsonStyle& style) {
  return JsonWriter(rt, style).Run(value);
}

}  // namespace shoal::jinja
