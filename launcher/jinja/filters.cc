#include "launcher/jinja/filters.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <map>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "launcher/jinja/json_text.h"
#include "launcher/jinja/operators.h"
#include "launcher/jinja/python_text.h"

namespace shoal::jinja {
namespace {

// Filters on text take any value and work on its str().

template <std::string (*Function)(std::string_view)>
Value TextMap(Runtime& rt, const Value& in, const Arguments& arguments) {
  Parameters p(rt, "text filter", arguments, {});
  if (!p.ok()) return {};
  return rt.NewString(Function(rt.Text(in)));
}

// Unlike str.title(), a word begins only behind white space, a dash or an opening bracket.
std::string TitleWords(std::string_view text) {
  std::string out, word;
  const auto flush = [&] {
    if (word.empty()) return;
    const size_t first = Characters(word)[0].size();
    absl::StrAppend(&out, Upper(std::string_view(word).substr(0, first)),
                    Lower(std::string_view(word).substr(first)));
    word.clear();
  };
  for (const std::string_view c : Characters(text)) {
    const bool separator =
        std::string_view("-({[<").find(c) != std::string_view::npos || IsSpace(CodePoint(c));
    if (separator) flush();
    separator ? out.append(c) : word.append(c);
  }
  flush();
  return out;
}

Value Trim(Runtime& rt, const Value& in, const Arguments& arguments) {
  Parameters p(rt, "trim", arguments, {"chars"});
  const std::string chars = p.ok() ? p.String(0, "") : "";
  if (!p.ok()) return {};
  const std::string text = rt.Text(in);
  const bool given = p.has(0) && !p[0].is_none();
  return given ? Value(Strip(text, chars, Side::kBoth)) : Value(Strip(text, Side::kBoth));
}

Value ReplaceFilter(Runtime& rt, const Value& in, const Arguments& arguments) {
  Parameters p(rt, "replace", arguments, {"old", "new", "count"}, 2);
  if (!p.ok()) return {};
  Arguments strings;
  strings.positional = {Value(rt.Text(p[0])), Value(rt.Text(p[1]))};
  if (p.has(2)) strings.positional.push_back(p[2]);
  const Value text = rt.NewString(rt.Text(in));
  return rt.failed() ? Value() : Call(rt, FindMethod(text, "replace"), strings);
}

Value Indent(Runtime& rt, const Value& in, const Arguments& arguments) {
  Parameters p(rt, "indent", arguments, {"width", "first", "blank"});
  if (!p.ok()) return {};
  const bool text_width = p.has(0) && p[0].is_string();
  const int64_t width = text_width ? 0 : p.Int(0, 4);
  if (!p.ok() || !rt.AllowString(static_cast<size_t>(std::clamp<int64_t>(width, 0, 1 << 20))))
    return {};
  const std::string indent =
      text_width ? p[0].str()
                 : std::string(static_cast<size_t>(std::clamp<int64_t>(width, 0, 1 << 20)), ' ');
  const bool blank = p.Bool(2, false);
  const std::string text = absl::StrCat(rt.Text(in), "\n");
  std::string out = p.Bool(1, false) ? indent : "";
  bool first = true;
  for (const std::string_view line : SplitLines(text, false)) {
    if (!first) out += '\n';
    if (!first && (blank || !line.empty())) out += indent;
    out += line;
    first = false;
    if (out.size() > rt.limits().output_bytes) break;
  }
  return rt.NewString(std::move(out));
}

Value Truncate(Runtime& rt, const Value& in, const Arguments& arguments) {
  Parameters p(rt, "truncate", arguments, {"length", "killwords", "end", "leeway"});
  if (!p.ok()) return {};
  const std::string text = rt.Text(in), end = p.String(2, "...");
  const int64_t length = p.Int(0, 255), leeway = p.Int(3, 5);
  const auto size = static_cast<int64_t>(Length(text)),
             end_size = static_cast<int64_t>(Length(end));
  if (!p.ok()) return {};
  if (length < end_size || leeway < 0) return rt.Fail("truncate: length is less than that of end");
  if (size <= leeway || size - leeway <= length) return text;
  std::string_view kept = Substring(text, 0, static_cast<size_t>(length - end_size));
  if (!p.Bool(1, false)) kept = SplitRight(kept, " ", 1)[0];
  return absl::StrCat(std::string(kept), end);
}

Value Center(Runtime& rt, const Value& in, const Arguments& arguments) {
  Parameters p(rt, "center", arguments, {"width"});
  if (!p.ok()) return {};
  Arguments width;
  width.positional.push_back(p.Int(0, 80));
  const Value text = rt.NewString(rt.Text(in));
  return rt.failed() ? Value() : Call(rt, FindMethod(text, "center"), width);
}

Value FormatFilter(Runtime& rt, const Value& in, const Arguments& arguments) {
  if (!arguments.keyword.empty()) {
    Dict* values = rt.NewDict();
    for (const auto& [key, value] : arguments.keyword) rt.SetItem(*values, Value(key), value);
    return PercentFormat(rt, rt.Text(in), values);
  }
  return PercentFormat(rt, rt.Text(in), rt.NewList(arguments.positional, /*tuple=*/true));
}

Value WordCount(Runtime& rt, const Value& in, const Arguments& arguments) {
  int64_t count = 0;
  bool in_word = false;
  const std::string text = rt.Text(in);
  for (const std::string_view c : Characters(text)) {
    const bool part = c == "_" || AllAre(c, CharacterClass::kAlnum);
    count += part && !in_word;
    in_word = part;
  }
  return count;
}

Value UrlEncode(Runtime& rt, const Value& in, const Arguments& arguments) {
  std::string out;
  for (const char c : rt.Text(in)) {
    const bool plain = (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
                       std::string_view("_.-~/").find(c) != std::string_view::npos;
    if (plain) {
      out += c;
    } else {
      absl::StrAppendFormat(&out, "%%%02X", static_cast<unsigned>(static_cast<uint8_t>(c)));
    }
  }
  return rt.NewString(std::move(out));
}

Value Same(Runtime& rt, const Value& in, const Arguments& arguments) {
  return rt.NewString(rt.Text(in));
}

// --- numbers

// What int() and float() take from a text; nothing when it is no number.
bool ParseInt(std::string_view text, int base, int64_t* out) {
  text = Strip(text, Side::kBoth);
  std::string digits;
  for (const char c : text) {
    if (c != '_') digits += c;
  }
  std::string_view rest = digits;
  const bool negative = rest.starts_with('-');
  if (negative || rest.starts_with('+')) rest.remove_prefix(1);
  if (rest.empty() || rest[0] == '-') return false;
  const auto prefix = [&](char letter, int b) {
    if ((base == b || base == 0) && rest.size() > 2 && rest[0] == '0' &&
        (rest[1] | 0x20) == letter) {
      rest.remove_prefix(2);
      base = b;
    }
  };
  prefix('x', 16);
  prefix('o', 8);
  prefix('b', 2);
  if (base == 0) base = 10;
  if (base < 2 || base > 36) return false;
  const auto result = std::from_chars(rest.data(), rest.data() + rest.size(), *out, base);
  if (result.ec != std::errc() || result.ptr != rest.data() + rest.size()) return false;
  if (negative) *out = -*out;
  return true;
}

bool ParseFloat(std::string_view text, double* out) {
  const std::string trimmed(Strip(text, Side::kBoth));
  if (trimmed.empty() || trimmed.find_first_of("xXpP(") != std::string::npos) return false;
  char* end = nullptr;
  *out = std::strtod(trimmed.c_str(), &end);
  return end == trimmed.c_str() + trimmed.size();
}

Value IntFilter(Runtime& rt, const Value& in, const Arguments& arguments) {
  Parameters p(rt, "int", arguments, {"default", "base"});
  if (!p.ok()) return {};
  const Value fallback = p.has(0) ? p[0] : Value(0);
  if (in.is_integral()) return in.integral();
  double d = 0;
  int64_t i = 0;
  if (in.is_string() &&
      ParseInt(in.str(), static_cast<int>(std::clamp<int64_t>(p.Int(1, 10), 0, 99)), &i)) {
    return i;
  }
  if (in.is_float()) {
    d = in.number();
  } else if (!in.is_string() || !ParseFloat(in.str(), &d)) {
    return fallback;
  }
  if (!(std::abs(d) < 9.2e18)) return fallback;
  return static_cast<int64_t>(d);
}

Value FloatFilter(Runtime& rt, const Value& in, const Arguments& arguments) {
  Parameters p(rt, "float", arguments, {"default"});
  if (!p.ok()) return {};
  if (in.is_number()) return in.number();
  double d = 0;
  if (in.is_string() && ParseFloat(in.str(), &d)) return d;
  return p.has(0) ? p[0] : Value(0.0);
}

Value Abs(Runtime& rt, const Value& in, const Arguments& arguments) {
  if (!rt.Require(in)) return {};
  if (in.is_float()) return std::abs(in.number());
  if (in.is_integral()) return in.integral() < 0 ? Negate(rt, in) : Value(in.integral());
  return rt.Fail(absl::StrCat("abs does not work on ", TypeName(in)));
}

// Python rounds the exact decimal value half to even: printf does the same.
double RoundTo(double value, int64_t digits) {
  if (!std::isfinite(value) || digits > 300) return value;
  if (digits >= 0)
    return std::strtod(absl::StrFormat("%.*f", static_cast<int>(digits), value).c_str(), nullptr);
  const double unit = std::pow(10.0, static_cast<double>(-std::max<int64_t>(digits, -300)));
  return std::nearbyint(value / unit) * unit;
}

Value Round(Runtime& rt, const Value& in, const Arguments& arguments) {
  Parameters p(rt, "round", arguments, {"precision", "method"});
  if (!p.ok() || !rt.Require(in)) return {};
  const int64_t precision = p.Int(0, 0);
  const std::string method = p.String(1, "common");
  if (!p.ok()) return {};
  if (!in.is_number()) return rt.Fail(absl::StrCat("round does not work on ", TypeName(in)));
  if (method == "common") {
    if (in.is_integral() && precision >= 0) return in.integral();
    return RoundTo(in.number(), precision);
  }
  const double scale =
      std::pow(10.0, static_cast<double>(std::clamp<int64_t>(precision, -300, 300)));
  if (method == "ceil") return std::ceil(in.number() * scale) / scale;
  if (method == "floor") return std::floor(in.number() * scale) / scale;
  return rt.Fail("round: method is 'common', 'ceil' or 'floor'");
}

// --- any value

Value Default(Runtime& rt, const Value& in, const Arguments& arguments) {
  Parameters p(rt, "default", arguments, {"default_value", "boolean"});
  if (!p.ok()) return {};
  if (in.is_undefined() || (p.Bool(1, false) && !Truth(in))) return p.has(0) ? p[0] : Value("");
  return in;
}

// Parameters and their order as transformers has them, which differ from Jinja's own.
Value ToJsonFilter(Runtime& rt, const Value& in, const Arguments& arguments) {
  Parameters p(rt, "tojson", arguments, {"ensure_ascii", "indent", "separators", "sort_keys"});
  if (!p.ok()) return {};
  JsonStyle style;
  style.ascii_only = p.Bool(0, false);
  style.sort_keys = p.Bool(3, false);
  if (p.has(1) && !p[1].is_none()) {
    style.pretty = true;
    style.item_separator.resize(1);  // ","
    const auto width =
        static_cast<size_t>(p[1].is_string() ? 0 : std::clamp<int64_t>(p.Int(1, 0), 0, 100));
    style.indent = p[1].is_string() ? p[1].str() : std::string(width, ' ');
  }
  if (p.has(2) && !p[2].is_none()) {
    if (!p[2].is_list() || p[2].list().items.size() != 2)
      return rt.Fail("tojson: separators are two texts");
    style.item_separator = Str(p[2].list().items[0]);
    style.key_separator = Str(p[2].list().items[1]);
  }
  if (!p.ok()) return {};
  return rt.NewString(ToJson(rt, in, style));
}

Value Attr(Runtime& rt, const Value& in, const Arguments& arguments) {
  Parameters p(rt, "attr", arguments, {"name"}, 1);
  const std::string name = p.ok() ? p.String(0, "") : "";
  return p.ok() ? GetAttribute(rt, in, name) : Value();
}

}  // namespace

Builtin FindFilter(std::string_view name) {
  static const std::map<std::string_view, Builtin> table = {
      {"upper", TextMap<Upper>},
      {"lower", TextMap<Lower>},
      {"capitalize", TextMap<Capitalize>},
      {"title", TextMap<TitleWords>},
      {"escape", TextMap<EscapeHtml>},
      {"e", TextMap<EscapeHtml>},
      {"forceescape", TextMap<EscapeHtml>},
      {"safe", Same},
      {"string", Same},
      {"trim", Trim},
      {"strip", Trim},  // not Jinja's, but some templates were written for engines that have it
      {"replace", ReplaceFilter},
      {"indent", Indent},
      {"truncate", Truncate},
      {"center", Center},
      {"format", FormatFilter},
      {"wordcount", WordCount},
      {"urlencode", UrlEncode},
      {"int", IntFilter},
      {"float", FloatFilter},
      {"abs", Abs},
      {"round", Round},
      {"default", Default},
      {"d", Default},
      {"tojson", ToJsonFilter},
      {"attr", Attr},
  };
  const auto found = table.find(name);
  return found == table.end() ? FindSequenceFilter(name) : found->second;
}

Value ApplyFilter(Runtime& rt, std::string_view name, const Value& input,
                  const Arguments& arguments) {
  if (!rt.Step()) return {};
  const Builtin filter = FindFilter(name);
  if (filter == nullptr)
    return rt.Fail(absl::StrCat("there is no filter '", std::string(name), "'"));
  Value result = filter(rt, input, arguments);
  return rt.failed() ? Value() : result;
}

}  // namespace shoal::jinja
