#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "launcher/jinja/operators.h"
#include "launcher/jinja/python_text.h"

namespace shoal::jinja {
namespace {

constexpr int64_t kMaxWidth = 10000;

struct Spec {
  bool left = false, zero = false, plus = false, space = false, alternate = false;
  int64_t width = 0;
  int64_t precision = -1;
  char kind = 0;
};

// Digits at the front of *text, at most kMaxWidth.
int64_t TakeNumber(std::string_view* text) {
  int64_t number = 0;
  while (!text->empty() && text->front() >= '0' && text->front() <= '9') {
    number = std::min(number * 10 + (text->front() - '0'), kMaxWidth);
    text->remove_prefix(1);
  }
  return number;
}

Spec TakeSpec(std::string_view* text) {
  Spec spec;
  for (; !text->empty(); text->remove_prefix(1)) {
    const char c = text->front();
    if (c == '-')
      spec.left = true;
    else if (c == '0')
      spec.zero = true;
    else if (c == '+')
      spec.plus = true;
    else if (c == ' ')
      spec.space = true;
    else if (c == '#')
      spec.alternate = true;
    else
      break;
  }
  spec.width = TakeNumber(text);
  if (text->starts_with('.')) {
    text->remove_prefix(1);
    spec.precision = TakeNumber(text);
  }
  if (!text->empty()) {
    spec.kind = text->front();
    text->remove_prefix(1);
  }
  return spec;
}

std::string FormatFloat(const Spec& spec, double value) {
  const int precision = static_cast<int>(spec.precision < 0 ? 6 : spec.precision);
  switch (spec.kind) {
    case 'e':
      return absl::StrFormat("%.*e", precision, value);
    case 'E':
      return absl::StrFormat("%.*E", precision, value);
    case 'g':
      return absl::StrFormat("%.*g", precision, value);
    case 'G':
      return absl::StrFormat("%.*G", precision, value);
    default:
      return absl::StrFormat("%.*f", precision, value);
  }
}

// The value without its padding; false when it is of the wrong type.
bool FormatOne(Runtime& rt, const Spec& spec, const Value& value, std::string* out) {
  switch (spec.kind) {
    case 's':
    case 'r': {
      *out = spec.kind == 's' ? rt.Text(value) : Repr(value, rt.limits().output_bytes);
      if (spec.precision >= 0 && static_cast<size_t>(spec.precision) < Length(*out)) {
        *out = std::string(Substring(*out, 0, static_cast<size_t>(spec.precision)));
      }
      return true;
    }
    case 'd':
    case 'i':
    case 'u':
      if (!value.is_number() || !(std::abs(value.number()) < 9.2e18)) return false;
      *out =
          absl::StrCat(value.is_float() ? static_cast<int64_t>(value.number()) : value.integral());
      return true;
    case 'x':
    case 'X':
    case 'o': {
      if (!value.is_integral()) return false;
      const int64_t n = value.integral();
      const uint64_t magnitude = n < 0 ? uint64_t{0} - static_cast<uint64_t>(n) : n;
      *out = spec.kind == 'x'   ? absl::StrFormat("%x", magnitude)
             : spec.kind == 'X' ? absl::StrFormat("%X", magnitude)
                                : absl::StrFormat("%o", magnitude);
      if (spec.alternate) *out = absl::StrCat("0", std::string(1, spec.kind), *out);
      if (n < 0) *out = "-" + *out;
      return true;
    }
    case 'c':
      if (!value.is_string() || Length(value.str()) != 1) return false;
      *out = value.str();
      return true;
    default:
      if (!value.is_number()) return false;
      *out = FormatFloat(spec, value.number());
      return true;
  }
}

std::string Pad(const Spec& spec, std::string text) {
  const bool numeric = std::string_view("src").find(spec.kind) == std::string_view::npos;
  if (numeric && !text.starts_with('-') && (spec.plus || spec.space)) {
    text.insert(0, 1, spec.plus ? '+' : ' ');
  }
  const size_t length = Length(text), width = static_cast<size_t>(spec.width);
  if (length >= width) return text;
  if (spec.left) return text.append(width - length, ' ');
  if (!numeric || !spec.zero) return text.insert(0, width - length, ' ');
  const bool sign = text.starts_with('-') || text.starts_with('+') || text.starts_with(' ');
  return text.insert(sign ? 1 : 0, width - length, '0');
}

}  // namespace

Value PercentFormat(Runtime& rt, std::string_view text, const Value& values) {
  const bool tuple = values.is_list() && values.list().tuple;
  size_t used = 0;
  std::string out;
  while (!text.empty() && !rt.failed()) {
    const size_t percent = std::min(text.find('%'), text.size());
    out.append(text.substr(0, percent));
    text.remove_prefix(percent);
    if (text.empty()) break;
    text.remove_prefix(1);
    Value value;
    bool named = false;
    if (text.starts_with('(')) {
      const size_t end = std::min(text.find(')'), text.size());
      const Value* found = values.is_dict() ? values.dict().Find(text.substr(1, end - 1)) : nullptr;
      if (found == nullptr) return rt.Fail("a format names a value that was not given");
      value = *found;
      named = true;
      text.remove_prefix(std::min(end + 1, text.size()));
    }
    const Spec spec = TakeSpec(&text);
    if (spec.kind == '%') {
      out += '%';
      continue;
    }
    if (spec.kind == 0 ||
        std::string_view("srdiuxXofFeEgGc").find(spec.kind) == std::string_view::npos) {
      return rt.Fail("a format has an unknown conversion");
    }
    if (!named) {
      const size_t given = tuple ? values.list().items.size() : 1;
      if (used >= given) return rt.Fail("a format needs more values than were given");
      value = tuple ? values.list().items[used] : values;
      ++used;
    }
    std::string piece;
    if (!FormatOne(rt, spec, value, &piece)) {
      return rt.Fail(
          absl::StrCat("format %", std::string(1, spec.kind), " was given a ", TypeName(value)));
    }
    out += Pad(spec, std::move(piece));
    if (!rt.AllowString(out.size())) return {};
  }
  if (tuple && used < values.list().items.size()) {
    return rt.Fail("a format was given more values than it uses");
  }
  return rt.NewString(std::move(out));
}

}  // namespace shoal::jinja
