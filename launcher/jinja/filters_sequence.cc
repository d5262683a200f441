// Filters on lists, dicts and what else can be looped over.
#include <algorithm>
#include <map>

#include "absl/strings/str_cat.h"
#include "launcher/jinja/filters.h"
#include "launcher/jinja/operators.h"
#include "launcher/jinja/python_text.h"

namespace shoal::jinja {
namespace {

Value LengthFilter(Runtime& rt, const Value& in, const Arguments& arguments) {
  if (in.is_undefined()) return 0;
  if (in.is_string()) {
    rt.Step(static_cast<int64_t>(1 + in.str().size() / 16));
    return static_cast<int64_t>(Length(in.str()));
  }
  if (in.is_list()) return static_cast<int64_t>(in.list().items.size());
  if (in.is_dict()) return static_cast<int64_t>(in.dict().items.size());
  return rt.Fail(absl::StrCat("a ", TypeName(in), " has no length"));
}

template <bool Last>
Value FirstOrLast(Runtime& rt, const Value& in, const Arguments& arguments) {
  std::vector<Value> items;
  if (!rt.Items(in, &items)) return {};
  if (items.empty()) return rt.Missing("an empty sequence has no first or last item");
  return Last ? items.back() : items.front();
}

Value ListFilter(Runtime& rt, const Value& in, const Arguments& arguments) {
  std::vector<Value> items;
  if (!rt.Items(in, &items)) return {};
  return rt.NewList(std::move(items));
}

Value Join(Runtime& rt, const Value& in, const Arguments& arguments) {
  Parameters p(rt, "join", arguments, {"d", "attribute"});
  std::vector<Value> items;
  if (!p.ok() || !rt.Items(in, &items)) return {};
  const std::string separator = p.has(0) ? rt.Text(p[0]) : "";
  std::string out;
  for (size_t i = 0; i < items.size() && !rt.failed(); ++i) {
    if (i > 0) out += separator;
    out += rt.Text(p.has(1) && !p[1].is_none() ? GetPath(rt, items[i], p[1]) : items[i]);
    if (out.size() > rt.limits().output_bytes) break;
  }
  return rt.NewString(std::move(out));
}

// As in Jinja, map and select take any false value for an empty sequence.
Value Map(Runtime& rt, const Value& in, const Arguments& arguments) {
  if (!Truth(in)) return rt.NewList({});
  std::vector<Value> items;
  if (!rt.Items(in, &items)) return {};
  if (arguments.positional.empty()) {
    Parameters p(rt, "map", arguments, {"attribute", "default"}, 1);
    for (Value& item : items) {
      if (!p.ok()) return {};
      item = GetPath(rt, item, p[0]);
      if (item.is_undefined() && p.has(1)) item = p[1];
    }
    return rt.NewList(std::move(items));
  }
  if (!arguments.positional[0].is_string()) return rt.Fail("map takes the name of a filter");
  const std::string name = arguments.positional[0].str();
  Arguments rest = arguments;
  rest.positional.erase(rest.positional.begin());
  for (Value& item : items) {
    item = ApplyFilter(rt, name, item, rest);
    if (rt.failed()) return {};
  }
  return rt.NewList(std::move(items));
}

// select, reject, selectattr, rejectattr
template <bool Keep, bool OfAttribute>
Value Select(Runtime& rt, const Value& in, const Arguments& arguments) {
  if (!Truth(in)) return rt.NewList({});
  std::vector<Value> items, out;
  if (!rt.Items(in, &items)) return {};
  Arguments rest = arguments;
  const auto take = [&] {
    Value first = rest.positional.front();
    rest.positional.erase(rest.positional.begin());
    return first;
  };
  if (OfAttribute && rest.positional.empty())
    return rt.Fail("selectattr needs the name of an attribute");
  const Value path = OfAttribute ? take() : Value();
  std::string test;
  if (!rest.positional.empty()) {
    const Value name = take();
    if (!name.is_string()) return rt.Fail("select takes the name of a test");
    test = name.str();
  }
  for (const Value& item : items) {
    const Value subject = OfAttribute ? GetPath(rt, item, path) : item;
    const bool holds = test.empty() ? Truth(subject) : ApplyTest(rt, test, subject, rest);
    if (!rt.Step()) return {};
    if (holds == Keep) out.push_back(item);
  }
  return rt.NewList(std::move(out));
}

Value ItemsFilter(Runtime& rt, const Value& in, const Arguments& arguments) {
  if (in.is_undefined()) return rt.NewList({});
  if (!in.is_dict()) return rt.Fail(absl::StrCat("items works on a dict, not on ", TypeName(in)));
  return Call(rt, FindMethod(in, "items"), {});
}

// What a sort, min, max, unique or groupby compares: an attribute, or several, case folded.
std::vector<Value> SortKeys(Runtime& rt, const std::vector<Value>& items, const Value* attribute,
                            bool case_sensitive) {
  const auto fold = [&](const Value& v) {
    return v.is_string() && !case_sensitive ? Value(Lower(v.str())) : v;
  };
  std::vector<Value> keys;
  for (const Value& item : items) {
    if (!rt.Step()) return keys;
    if (attribute == nullptr || attribute->is_none()) {
      keys.push_back(fold(item));
    } else if (attribute->is_string() && attribute->str().find(',') != std::string::npos) {
      std::vector<Value> parts;
      for (const std::string_view part : Split(attribute->str(), ",", -1)) {
        parts.push_back(fold(GetPath(rt, item, Value(part))));
      }
      keys.push_back(rt.NewList(std::move(parts), /*tuple=*/true));
    } else {
      keys.push_back(fold(GetPath(rt, item, *attribute)));
    }
  }
  return keys;
}

// Indices of `keys` in rising order, equal ones as they were (also when falling).
std::vector<size_t> SortedOrder(Runtime& rt, const std::vector<Value>& keys, bool reverse) {
  std::vector<size_t> order(keys.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  // Not comparable or out of steps: everything counts as equal from there on, which is an order.
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    if (!rt.Step()) return false;
    const int result = reverse ? Compare(keys[b], keys[a]) : Compare(keys[a], keys[b]);
    if (result == 2 && !Equal(keys[a], keys[b])) {
      rt.Fail(absl::StrCat("cannot sort ", TypeName(keys[a]), " and ", TypeName(keys[b])));
    }
    return result == -1;
  });
  return order;
}

Value Reordered(Runtime& rt, const std::vector<Value>& items, const std::vector<size_t>& order) {
  if (rt.failed()) return {};
  std::vector<Value> out;
  out.reserve(items.size());
  for (const size_t i : order) out.push_back(items[i]);
  return rt.NewList(std::move(out));
}

Value Sort(Runtime& rt, const Value& in, const Arguments& arguments) {
  Parameters p(rt, "sort", arguments, {"reverse", "case_sensitive", "attribute"});
  std::vector<Value> items;
  if (!p.ok() || !rt.Items(in, &items)) return {};
  const auto keys = SortKeys(rt, items, p.has(2) ? &p[2] : nullptr, p.Bool(1, false));
  return Reordered(rt, items,
                   rt.failed() ? std::vector<size_t>() : SortedOrder(rt, keys, p.Bool(0, false)));
}

Value DictSort(Runtime& rt, const Value& in, const Arguments& arguments) {
  Parameters p(rt, "dictsort", arguments, {"case_sensitive", "by", "reverse"});
  if (!p.ok() || !rt.Require(in)) return {};
  const std::string by = p.String(1, "key");
  if (!in.is_dict())
    return rt.Fail(absl::StrCat("dictsort works on a dict, not on ", TypeName(in)));
  if (by != "key" && by != "value") return rt.Fail("dictsort sorts by 'key' or 'value'");
  std::vector<Value> pairs, subjects;
  for (const auto& [key, value] : in.dict().items) {
    pairs.push_back(rt.NewList({key, value}, /*tuple=*/true));
    subjects.push_back(by == "key" ? key : value);
  }
  const auto keys = SortKeys(rt, subjects, nullptr, p.Bool(0, false));
  return Reordered(rt, pairs,
                   rt.failed() ? std::vector<size_t>() : SortedOrder(rt, keys, p.Bool(2, false)));
}

template <bool Largest>
Value Extreme(Runtime& rt, const Value& in, const Arguments& arguments) {
  Parameters p(rt, Largest ? "max" : "min", arguments, {"case_sensitive", "attribute"});
  std::vector<Value> items;
  if (!p.ok() || !rt.Items(in, &items)) return {};
  if (items.empty()) return rt.Missing("an empty sequence has no smallest or largest item");
  const auto keys = SortKeys(rt, items, p.has(1) ? &p[1] : nullptr, p.Bool(0, false));
  size_t best = 0;
  for (size_t i = 1; i < items.size() && !rt.failed(); ++i) {
    const int order = Compare(keys[i], keys[best]);
    if (order == 2) return rt.Fail("cannot compare the items of a sequence");
    if (order == (Largest ? 1 : -1)) best = i;
  }
  return items[best];
}

Value Unique(Runtime& rt, const Value& in, const Arguments& arguments) {
  Parameters p(rt, "unique", arguments, {"case_sensitive", "attribute"});
  std::vector<Value> items, out;
  if (!p.ok() || !rt.Items(in, &items)) return {};
  const auto keys = SortKeys(rt, items, p.has(1) ? &p[1] : nullptr, p.Bool(0, false));
  Dict seen;
  for (size_t i = 0; i < items.size() && rt.Step(); ++i) {
    if (seen.Find(keys[i]) != nullptr) continue;
    seen.Set(keys[i], true);
    out.push_back(items[i]);
  }
  return rt.NewList(std::move(out));
}

Value GroupBy(Runtime& rt, const Value& in, const Arguments& arguments) {
  Parameters p(rt, "groupby", arguments, {"attribute", "default", "case_sensitive"}, 1);
  std::vector<Value> items, groups;
  if (!p.ok() || !rt.Items(in, &items)) return {};
  auto keys = SortKeys(rt, items, &p[0], p.Bool(2, false));
  for (Value& key : keys) {
    if (key.is_undefined() && p.has(1)) key = p[1];
  }
  const auto order = rt.failed() ? std::vector<size_t>() : SortedOrder(rt, keys, false);
  for (size_t i = 0; i < order.size() && !rt.failed();) {
    std::vector<Value> members;
    const size_t first = order[i];
    for (; i < order.size() && Equal(keys[order[i]], keys[first]); ++i)
      members.push_back(items[order[i]]);
    Value name = GetPath(rt, items[first], p[0]);
    if (name.is_undefined() && p.has(1)) name = p[1];
    groups.push_back(rt.NewList({name, rt.NewList(std::move(members))}, /*tuple=*/true));
  }
  return rt.NewList(std::move(groups));
}

Value Reverse(Runtime& rt, const Value& in, const Arguments& arguments) {
  if (in.is_string()) {
    auto characters = Characters(in.str());
    if (!rt.AllowString(in.str().size())) return {};
    std::string out;
    for (auto c = characters.rbegin(); c != characters.rend(); ++c) out += *c;
    return out;
  }
  std::vector<Value> items;
  if (!rt.Items(in, &items)) return {};
  std::reverse(items.begin(), items.end());
  return rt.NewList(std::move(items));
}

Value Batch(Runtime& rt, const Value& in, const Arguments& arguments) {
  Parameters p(rt, "batch", arguments, {"linecount", "fill_with"}, 1);
  const int64_t size = p.ok() ? p.Int(0, 1) : 1;
  std::vector<Value> items, out;
  if (!p.ok() || !rt.Items(in, &items)) return {};
  if (size < 1) return rt.Fail("batch: linecount is at least 1");
  for (size_t at = 0; at < items.size() && !rt.failed();) {
    const size_t n =
        static_cast<size_t>(std::min<int64_t>(size, static_cast<int64_t>(items.size() - at)));
    std::vector<Value> row(items.begin() + static_cast<ptrdiff_t>(at),
                           items.begin() + static_cast<ptrdiff_t>(at + n));
    const auto missing = static_cast<size_t>(size) - n;
    if (p.has(1) && !p[1].is_none() && missing > 0) {
      if (!rt.AllowValues(missing)) return {};
      row.insert(row.end(), missing, p[1]);
    }
    out.push_back(rt.NewList(std::move(row)));
    at += n;
  }
  return rt.NewList(std::move(out));
}

Value Slice(Runtime& rt, const Value& in, const Arguments& arguments) {
  Parameters p(rt, "slice", arguments, {"slices", "fill_with"}, 1);
  const int64_t count = p.ok() ? p.Int(0, 1) : 1;
  std::vector<Value> items, out;
  if (!p.ok() || !rt.Items(in, &items)) return {};
  if (count < 1 || count > 100000) return rt.Fail("slice: the number of slices is 1 to 100000");
  const auto size = static_cast<int64_t>(items.size());
  int64_t at = 0;
  for (int64_t i = 0; i < count && !rt.failed(); ++i) {
    const int64_t n = size / count + (i < size % count);
    std::vector<Value> column(items.begin() + at, items.begin() + at + n);
    if (p.has(1) && !p[1].is_none() && i >= size % count) column.push_back(p[1]);
    out.push_back(rt.NewList(std::move(column)));
    at += n;
  }
  return rt.NewList(std::move(out));
}

Value Sum(Runtime& rt, const Value& in, const Arguments& arguments) {
  Parameters p(rt, "sum", arguments, {"attribute", "start"});
  std::vector<Value> items;
  if (!p.ok() || !rt.Items(in, &items)) return {};
  Value total = p.has(1) ? p[1] : Value(0);
  for (const Value& item : items) {
    total = BinaryOperator(rt, "+", total,
                           p.has(0) && !p[0].is_none() ? GetPath(rt, item, p[0]) : item);
    if (rt.failed()) return {};
  }
  return total;
}

}  // namespace

Builtin FindSequenceFilter(std::string_view name) {
  static const std::map<std::string_view, Builtin> table = {
      {"length", LengthFilter},
      {"count", LengthFilter},
      {"first", FirstOrLast<false>},
      {"last", FirstOrLast<true>},
      {"list", ListFilter},
      {"join", Join},
      {"map", Map},
      {"select", Select<true, false>},
      {"reject", Select<false, false>},
      {"selectattr", Select<true, true>},
      {"rejectattr", Select<false, true>},
      {"items", ItemsFilter},
      {"sort", Sort},
      {"dictsort", DictSort},
      {"min", Extreme<false>},
      {"max", Extreme<true>},
      {"unique", Unique},
      {"groupby", GroupBy},
      {"reverse", Reverse},
      {"batch", Batch},
      {"slice", Slice},
      {"sum", Sum},
  };
  const auto found = table.find(name);
  return found == table.end() ? nullptr : found->second;
}

}  // namespace shoal::jinja
