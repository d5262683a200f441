#include "launcher/jinja/methods.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <map>

#include "absl/strings/str_cat.h"
#include "launcher/jinja/operators.h"
#include "launcher/jinja/python_text.h"

namespace shoal::jinja {
namespace {

using Table = std::map<std::string_view, Builtin>;

Value Texts(Runtime& rt, const std::vector<std::string_view>& parts, bool tuple = false) {
  std::vector<Value> items;
  items.reserve(parts.size());
  for (const std::string_view part : parts) {
    if (!rt.Step(static_cast<int64_t>(1 + part.size() / 16))) return {};
    items.emplace_back(part);
  }
  return rt.NewList(std::move(items), tuple);
}

// --- str

template <std::string (*Function)(std::string_view)>
Value StrMap(Runtime& rt, const Value& self, const Arguments& arguments) {
  Parameters p(rt, "str method", arguments, {});
  if (!p.ok() || !rt.AllowString(self.str().size())) return {};
  return Function(self.str());
}

template <CharacterClass Class>
Value StrIs(Runtime& rt, const Value& self, const Arguments& arguments) {
  Parameters p(rt, "str method", arguments, {});
  return AllAre(self.str(), Class);
}

template <Side Where>
Value StrStrip(Runtime& rt, const Value& self, const Arguments& arguments) {
  Parameters p(rt, "strip()", arguments, {"chars"});
  const std::string chars = p.ok() ? p.String(0, "") : "";
  if (!p.ok() || !rt.AllowString(self.str().size())) return {};
  const bool given = p.has(0) && !p[0].is_none();
  return given ? Value(Strip(self.str(), chars, Where)) : Value(Strip(self.str(), Where));
}

template <bool FromRight>
Value StrSplit(Runtime& rt, const Value& self, const Arguments& arguments) {
  Parameters p(rt, "split()", arguments, {"sep", "maxsplit"});
  if (!p.ok()) return {};
  const int64_t max = p.Int(1, -1);
  const bool space = !p.has(0) || p[0].is_none();
  const std::string separator = p.String(0, "");
  if (!space && separator.empty()) return rt.Fail("split() was given an empty separator");
  if (!p.ok()) return {};
  if (space)
    return Texts(rt, FromRight ? SplitSpaceRight(self.str(), max) : SplitSpace(self.str(), max));
  return Texts(
      rt, FromRight ? SplitRight(self.str(), separator, max) : Split(self.str(), separator, max));
}

Value StrSplitLines(Runtime& rt, const Value& self, const Arguments& arguments) {
  Parameters p(rt, "splitlines()", arguments, {"keepends"});
  if (!p.ok()) return {};
  return Texts(rt, SplitLines(self.str(), p.Bool(0, false)));
}

template <bool AtEnd>
Value StrStartsOrEnds(Runtime& rt, const Value& self, const Arguments& arguments) {
  Parameters p(rt, AtEnd ? "endswith()" : "startswith()", arguments, {"text"}, 1);
  if (!p.ok()) return {};
  const std::vector<Value> one = {p[0]};
  const auto& options = p[0].is_list() && p[0].list().tuple ? p[0].list().items : one;
  for (const Value& option : options) {
    if (!option.is_string()) {
      return rt.Fail(
          absl::StrCat("startswith() and endswith() take a str, not a ", TypeName(option)));
    }
    if (AtEnd ? self.str().ends_with(option.str()) : self.str().starts_with(option.str())) {
      return true;
    }
  }
  return false;
}

Value StrReplace(Runtime& rt, const Value& self, const Arguments& arguments) {
  Parameters p(rt, "replace()", arguments, {"old", "new", "count"}, 2);
  if (!p.ok()) return {};
  const std::string from = p.String(0, ""), to = p.String(1, "");
  const int64_t max = p.Int(2, -1);
  if (!p.ok()) return {};
  // What it can grow to, before it does.
  const size_t places = from.empty() ? self.str().size() + 1 : self.str().size() / from.size();
  const size_t most = max < 0 ? places : std::min(places, static_cast<size_t>(max));
  if (to.size() > 1 && most > rt.limits().output_bytes / to.size()) {
    return rt.Fail("replace() makes too long a text");
  }
  if (!rt.AllowString(self.str().size())) return {};
  return rt.NewString(Replace(self.str(), from, to, max));
}

// find, rfind, index, rindex: positions count characters.
template <bool Last, bool Raise>
Value StrFind(Runtime& rt, const Value& self, const Arguments& arguments) {
  Parameters p(rt, "find()", arguments, {"sub", "start"}, 1);
  if (!p.ok() || !rt.AllowString(self.str().size())) return {};
  const std::string sub = p.String(0, "");
  const int64_t start = p.Int(1, 0);
  if (!p.ok()) return {};
  const auto length = static_cast<int64_t>(Length(self.str()));
  const int64_t skip = std::clamp<int64_t>(start < 0 ? start + length : start, 0, length);
  const std::string_view text =
      Substring(self.str(), static_cast<size_t>(skip), static_cast<size_t>(length));
  const size_t at = Last ? text.rfind(sub) : text.find(sub);
  if (at == std::string_view::npos || start > length) {
    return Raise ? rt.Fail("index() did not find its text") : Value(-1);
  }
  return skip + static_cast<int64_t>(Length(text.substr(0, at)));
}

Value StrCount(Runtime& rt, const Value& self, const Arguments& arguments) {
  Parameters p(rt, "count()", arguments, {"sub"}, 1);
  const std::string sub = p.ok() ? p.String(0, "") : "";
  if (!p.ok() || !rt.AllowString(self.str().size())) return {};
  if (sub.empty()) return static_cast<int64_t>(Length(self.str()) + 1);
  int64_t count = 0;
  for (size_t at = 0; (at = self.str().find(sub, at)) != std::string::npos; at += sub.size())
    ++count;
  return count;
}

Value StrJoin(Runtime& rt, const Value& self, const Arguments& arguments) {
  Parameters p(rt, "join()", arguments, {"items"}, 1);
  std::vector<Value> items;
  if (!p.ok() || !rt.Items(p[0], &items)) return {};
  std::string out;
  for (size_t i = 0; i < items.size(); ++i) {
    if (!items[i].is_string())
      return rt.Fail(absl::StrCat("join() takes str, not ", TypeName(items[i])));
    if (i > 0) out += self.str();
    out += items[i].str();
    if (out.size() > rt.limits().output_bytes) break;
  }
  return rt.NewString(std::move(out));
}

template <bool Last>
Value StrPartition(Runtime& rt, const Value& self, const Arguments& arguments) {
  Parameters p(rt, "partition()", arguments, {"sep"}, 1);
  const std::string sep = p.ok() ? p.String(0, "") : "";
  if (!p.ok()) return {};
  if (sep.empty()) return rt.Fail("partition() was given an empty separator");
  const std::string_view text = self.str();
  const size_t at = Last ? text.rfind(sep) : text.find(sep);
  if (at == std::string_view::npos) {
    if (Last) return Texts(rt, {"", "", text}, true);
    return Texts(rt, {text, "", ""}, true);
  }
  return Texts(rt, {text.substr(0, at), text.substr(at, sep.size()), text.substr(at + sep.size())},
               true);
}

template <bool Suffix>
Value StrRemoveAffix(Runtime& rt, const Value& self, const Arguments& arguments) {
  Parameters p(rt, "removeprefix()", arguments, {"affix"}, 1);
  const std::string affix = p.ok() ? p.String(0, "") : "";
  if (!p.ok() || !rt.AllowString(self.str().size())) return {};
  std::string_view text = self.str();
  if (Suffix && text.ends_with(affix)) text.remove_suffix(affix.size());
  if (!Suffix && text.starts_with(affix)) text.remove_prefix(affix.size());
  return text;
}

template <Side Text>
Value StrJustify(Runtime& rt, const Value& self, const Arguments& arguments) {
  Parameters p(rt, "justify()", arguments, {"width", "fillchar"}, 1);
  if (!p.ok()) return {};
  const std::string fill = p.String(1, " ");
  const int64_t room = p.Int(0, 0) - static_cast<int64_t>(Length(self.str()));
  if (!p.ok()) return {};
  if (room <= 0) return self;
  if (Length(fill) != 1) return rt.Fail("a fill text is one character");
  if (!rt.AllowString(static_cast<size_t>(room))) return {};
  const int64_t width = room + static_cast<int64_t>(Length(self.str()));
  const int64_t left = Text == Side::kLeft ? 0
                       : Text == Side::kRight
                           ? room
                           : room / 2 + (room & width & 1);  // as CPython centers
  std::string out;
  for (int64_t i = 0; i < left; ++i) out += fill;
  out += self.str();
  for (int64_t i = left; i < room; ++i) out += fill;
  return out;
}

Value StrZfill(Runtime& rt, const Value& self, const Arguments& arguments) {
  Parameters p(rt, "zfill()", arguments, {"width"}, 1);
  const int64_t width = p.ok() ? p.Int(0, 0) : 0;
  const int64_t room = width - static_cast<int64_t>(Length(self.str()));
  if (!p.ok() || room <= 0) return p.ok() ? self : Value();
  if (!rt.AllowString(static_cast<size_t>(room))) return {};
  std::string out = self.str();
  out.insert(out.starts_with('-') || out.starts_with('+') ? 1 : 0, static_cast<size_t>(room), '0');
  return out;
}

// str.format with {}, {0}, {name}; attributes, items and format specifications are not known.
Value StrFormat(Runtime& rt, const Value& self, const Arguments& arguments) {
  std::string out;
  size_t next = 0;
  std::string_view text = self.str();
  while (!text.empty()) {
    const char c = text[0];
    text.remove_prefix(1);
    if ((c == '{' || c == '}') && text.starts_with(c)) {
      text.remove_prefix(1);
      out += c;
    } else if (c == '}') {
      return rt.Fail("format() found a single '}'");
    } else if (c != '{') {
      out += c;
    } else {
      const size_t end = text.find('}');
      if (end == std::string_view::npos) return rt.Fail("format() found a '{' without its '}'");
      const std::string name(text.substr(0, end));
      text.remove_prefix(end + 1);
      const bool number = AllAre(name, CharacterClass::kDigit) && name.size() < 6;
      const Value* found = nullptr;
      const size_t index = name.empty() ? next++ : number ? std::stoul(name) : SIZE_MAX;
      if (index < arguments.positional.size()) found = &arguments.positional[index];
      for (const auto& [key, value] : arguments.keyword) {
        if (key == name) found = &value;
      }
      if (found == nullptr)
        return rt.Fail(absl::StrCat("format() has no value for '{", name, "}'"));
      out += rt.Text(*found);
      if (!rt.AllowString(out.size())) return {};
    }
  }
  return rt.NewString(std::move(out));
}

// --- list

Value ListAppend(Runtime& rt, const Value& self, const Arguments& arguments) {
  Parameters p(rt, "append()", arguments, {"item"}, 1);
  if (!p.ok() || !rt.AllowValues(1)) return {};
  self.list().items.push_back(p[0]);
  return None{};
}

Value ListExtend(Runtime& rt, const Value& self, const Arguments& arguments) {
  Parameters p(rt, "extend()", arguments, {"items"}, 1);
  std::vector<Value> items;
  if (!p.ok() || !rt.Items(p[0], &items) || !rt.AllowValues(items.size())) return {};
  self.list().items.insert(self.list().items.end(), items.begin(), items.end());
  return None{};
}

Value ListInsert(Runtime& rt, const Value& self, const Arguments& arguments) {
  Parameters p(rt, "insert()", arguments, {"index", "item"}, 2);
  const int64_t index = p.ok() ? p.Int(0, 0) : 0;
  if (!p.ok() || !rt.AllowValues(1)) return {};
  auto& items = self.list().items;
  const auto size = static_cast<int64_t>(items.size());
  items.insert(items.begin() + std::clamp<int64_t>(index < 0 ? index + size : index, 0, size),
               p[1]);
  return None{};
}

Value ListPop(Runtime& rt, const Value& self, const Arguments& arguments) {
  Parameters p(rt, "pop()", arguments, {"index"});
  int64_t index = p.ok() ? p.Int(0, -1) : 0;
  if (!p.ok()) return {};
  auto& items = self.list().items;
  if (index < 0) index += static_cast<int64_t>(items.size());
  if (index < 0 || index >= static_cast<int64_t>(items.size()))
    return rt.Fail("pop() index out of range");
  Value popped = items[static_cast<size_t>(index)];
  items.erase(items.begin() + index);
  return popped;
}

Value ListIndex(Runtime& rt, const Value& self, const Arguments& arguments) {
  Parameters p(rt, "index()", arguments, {"item"}, 1);
  const auto& items = self.list().items;
  for (size_t i = 0; p.ok() && i < items.size() && rt.Step(); ++i) {
    if (Equal(items[i], p[0])) return static_cast<int64_t>(i);
  }
  return rt.Fail("index() did not find its item");
}

Value ListCount(Runtime& rt, const Value& self, const Arguments& arguments) {
  Parameters p(rt, "count()", arguments, {"item"}, 1);
  int64_t count = 0;
  for (const Value& item : self.list().items) {
    if (!p.ok() || !rt.Step()) return {};
    count += Equal(item, p[0]);
  }
  return count;
}

Value ListCopy(Runtime& rt, const Value& self, const Arguments& arguments) {
  return rt.NewList(self.list().items);
}

Value ListReverse(Runtime& rt, const Value& self, const Arguments& arguments) {
  rt.Step(static_cast<int64_t>(self.list().items.size()));
  std::reverse(self.list().items.begin(), self.list().items.end());
  return None{};
}

// --- dict

Value DictGet(Runtime& rt, const Value& self, const Arguments& arguments) {
  Parameters p(rt, "get()", arguments, {"key", "default"}, 1);
  if (!p.ok()) return {};
  if (const Value* found = self.dict().Find(p[0])) return *found;
  return p.has(1) ? p[1] : Value(None{});
}

enum class Part { kKey, kValue, kItem };

template <Part What>
Value DictParts(Runtime& rt, const Value& self, const Arguments& arguments) {
  Parameters p(rt, "dict method", arguments, {});
  std::vector<Value> out;
  for (const auto& [key, value] : self.dict().items) {
    if (!p.ok()) return {};
    out.push_back(What == Part::kKey     ? key
                  : What == Part::kValue ? value
                                         : rt.NewList({key, value}, /*tuple=*/true));
  }
  return rt.NewList(std::move(out));
}

Value DictPop(Runtime& rt, const Value& self, const Arguments& arguments) {
  Parameters p(rt, "pop()", arguments, {"key", "default"}, 1);
  if (!p.ok()) return {};
  const Value* found = self.dict().Find(p[0]);
  if (found == nullptr) return p.has(1) ? p[1] : rt.Fail("pop() did not find its key");
  Value popped = *found;
  rt.Step(static_cast<int64_t>(self.dict().items.size()));
  self.dict().Erase(p[0]);
  return popped;
}

Value DictUpdate(Runtime& rt, const Value& self, const Arguments& arguments) {
  for (const Value& other : arguments.positional) {
    if (!other.is_dict()) return rt.Fail("update() takes a dict");
    const auto items = other.dict().items;  // a copy: it may be the dict itself
    for (const auto& [key, value] : items) rt.SetItem(self.dict(), key, value);
  }
  for (const auto& [key, value] : arguments.keyword) rt.SetItem(self.dict(), Value(key), value);
  return None{};
}

Value DictSetDefault(Runtime& rt, const Value& self, const Arguments& arguments) {
  Parameters p(rt, "setdefault()", arguments, {"key", "default"}, 1);
  if (!p.ok()) return {};
  if (const Value* found = self.dict().Find(p[0])) return *found;
  const Value value = p.has(1) ? p[1] : Value(None{});
  rt.SetItem(self.dict(), p[0], value);
  return value;
}

Value DictCopy(Runtime& rt, const Value& self, const Arguments& arguments) {
  Dict* copy = rt.NewDict();
  for (const auto& [key, value] : self.dict().items) rt.SetItem(*copy, key, value);
  return copy;
}

const Table& StrMethods() {
  static const Table table = {
      {"upper", StrMap<Upper>},
      {"lower", StrMap<Lower>},
      {"casefold", StrMap<Lower>},
      {"capitalize", StrMap<Capitalize>},
      {"title", StrMap<Title>},
      {"swapcase", StrMap<SwapCase>},
      {"isalpha", StrIs<CharacterClass::kAlpha>},
      {"isdigit", StrIs<CharacterClass::kDigit>},
      {"isdecimal", StrIs<CharacterClass::kDigit>},
      {"isnumeric", StrIs<CharacterClass::kDigit>},
      {"isalnum", StrIs<CharacterClass::kAlnum>},
      {"isspace", StrIs<CharacterClass::kSpace>},
      {"isupper", StrIs<CharacterClass::kUpper>},
      {"islower", StrIs<CharacterClass::kLower>},
      {"strip", StrStrip<Side::kBoth>},
      {"lstrip", StrStrip<Side::kLeft>},
      {"rstrip", StrStrip<Side::kRight>},
      {"split", StrSplit<false>},
      {"rsplit", StrSplit<true>},
      {"splitlines", StrSplitLines},
      {"startswith", StrStartsOrEnds<false>},
      {"endswith", StrStartsOrEnds<true>},
      {"replace", StrReplace},
      {"find", StrFind<false, false>},
      {"rfind", StrFind<true, false>},
      {"index", StrFind<false, true>},
      {"rindex", StrFind<true, true>},
      {"count", StrCount},
      {"join", StrJoin},
      {"partition", StrPartition<false>},
      {"rpartition", StrPartition<true>},
      {"removeprefix", StrRemoveAffix<false>},
      {"removesuffix", StrRemoveAffix<true>},
      {"ljust", StrJustify<Side::kLeft>},
      {"rjust", StrJustify<Side::kRight>},
      {"center", StrJustify<Side::kBoth>},
      {"zfill", StrZfill},
      {"format", StrFormat},
  };
  return table;
}

const Table& ListMethods() {
  static const Table table = {
      {"append", ListAppend}, {"extend", ListExtend},   {"insert", ListInsert},
      {"pop", ListPop},       {"index", ListIndex},     {"count", ListCount},
      {"copy", ListCopy},     {"reverse", ListReverse},
  };
  return table;
}

const Table& DictMethods() {
  static const Table table = {
      {"get", DictGet},
      {"keys", DictParts<Part::kKey>},
      {"values", DictParts<Part::kValue>},
      {"items", DictParts<Part::kItem>},
      {"pop", DictPop},
      {"update", DictUpdate},
      {"setdefault", DictSetDefault},
      {"copy", DictCopy},
  };
  return table;
}

}  // namespace

Value FindMethod(const Value& self, std::string_view name) {
  const bool tuple = self.is_list() && self.list().tuple;
  const Table* table = self.is_string() ? &StrMethods()
                       : self.is_list() ? &ListMethods()
                       : self.is_dict() ? &DictMethods()
                                        : nullptr;
  if (table == nullptr || (tuple && name != "index" && name != "count")) return {};
  const auto found = table->find(name);
  if (found == table->end()) return {};
  return ObjectPtr(std::make_shared<BuiltinObject>(found->second, self));
}

}  // namespace shoal::jinja
