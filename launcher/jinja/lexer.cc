#include "launcher/jinja/lexer.h"

#include <algorithm>
#include <charconv>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "launcher/jinja/python_text.h"
#include "launcher/utf8_stream.h"

namespace shoal::jinja {
namespace {

// \r\n and \r become \n, and one newline at the very end is dropped.
std::string NormalizeNewlines(std::string_view source) {
  std::string out;
  out.reserve(source.size());
  for (size_t i = 0; i < source.size(); ++i) {
    if (source[i] != '\r') {
      out += source[i];
    } else {
      out += '\n';
      if (i + 1 < source.size() && source[i + 1] == '\n') ++i;
    }
  }
  if (out.ends_with('\n')) out.pop_back();
  return out;
}

bool IsAsciiSpace(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }
bool IsDigit(char c) { return c >= '0' && c <= '9'; }
bool IsNameStart(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' ||
         static_cast<uint8_t>(c) >= 0x80;
}

void AppendUtf8(std::string& out, uint32_t c) {
  if (c < 0x80) {
    out += static_cast<char>(c);
  } else if (c < 0x800) {
    out += {static_cast<char>(0xC0 | c >> 6), static_cast<char>(0x80 | (c & 0x3F))};
  } else if (c < 0x10000) {
    out += {static_cast<char>(0xE0 | c >> 12), static_cast<char>(0x80 | (c >> 6 & 0x3F)),
            static_cast<char>(0x80 | (c & 0x3F))};
  } else {
    out += {static_cast<char>(0xF0 | c >> 18), static_cast<char>(0x80 | (c >> 12 & 0x3F)),
            static_cast<char>(0x80 | (c >> 6 & 0x3F)), static_cast<char>(0x80 | (c & 0x3F))};
  }
}

// Reads up to `max` digits of `base` at the front of *text; -1 when there is none.
int64_t TakeDigits(std::string_view* text, size_t max, int base) {
  uint32_t value = 0;
  const size_t n = std::min(max, text->size());
  const auto result = std::from_chars(text->data(), text->data() + n, value, base);
  if (result.ec != std::errc()) return -1;
  text->remove_prefix(result.ptr - text->data());
  return value;
}

// Python's escapes; unknown ones keep their backslash.
std::string Unescape(std::string_view text) {
  std::string out;
  while (!text.empty()) {
    const char c = text[0];
    text.remove_prefix(1);
    if (c != '\\' || text.empty()) {
      out += c;
      continue;
    }
    const char kind = text[0];
    constexpr std::string_view kFrom = "abfnrtv\\'\"\n", kTo = "\a\b\f\n\r\t\v\\'\"";
    if (const size_t at = kFrom.find(kind); at != std::string_view::npos) {
      if (at < kTo.size()) out += kTo[at];  // an escaped newline vanishes
      text.remove_prefix(1);
      continue;
    }
    const size_t digits = kind == 'x' ? 2 : kind == 'u' ? 4 : kind == 'U' ? 8 : 0;
    std::string_view rest = text.substr(digits > 0 ? 1 : 0);
    const size_t before = rest.size();
    const int64_t code = digits > 0                   ? TakeDigits(&rest, digits, 16)
                         : kind >= '0' && kind <= '7' ? TakeDigits(&rest, 3, 8)
                                                      : -1;
    const bool whole = digits == 0 || before - rest.size() == digits;
    const bool surrogate = code >= 0xD800 && code < 0xE000;
    if (code < 0 || !whole || surrogate || code > 0x10FFFF) {
      out += '\\';
      continue;
    }
    AppendUtf8(out, static_cast<uint32_t>(code));
    text = rest;
  }
  return out;
}

class Lexer {
 public:
  explicit Lexer(std::string_view source) : source_(NormalizeNewlines(source)) {}

  absl::StatusOr<std::vector<Token>> Run() {
    while (at_ < source_.size()) {
      if (auto s = LexText(); !s.ok()) return s;
    }
    Emit(Token::Kind::kEnd, "");
    return std::move(tokens_);
  }

 private:
  std::string_view Rest() const { return std::string_view(source_).substr(at_); }

  absl::Status Error(std::string_view what) const {
    return absl::InvalidArgumentError(
        absl::StrCat("chat template line ", line_, ": ", std::string(what)));
  }

  void Emit(Token::Kind kind, std::string text) {
    tokens_.push_back({kind, std::move(text), line_});
  }

  void Advance(size_t n) {
    const std::string_view passed = Rest().substr(0, n);
    line_ += static_cast<int>(std::count(passed.begin(), passed.end(), '\n'));
    if (n > 0) line_starting_ = passed.back() == '\n';
    at_ += n;
  }

  void SkipSpace() {
    size_t n = 0;
    while (n < Rest().size() && IsAsciiSpace(Rest()[n])) ++n;
    Advance(n);
  }

  // Where the next {{, {% or {# is, or npos.
  size_t FindTag() const {
    for (size_t i = at_; i + 1 < source_.size(); ++i) {
      if (source_[i] != '{') continue;
      const char next = source_[i + 1];
      if (next == '{' || next == '%' || next == '#') return i;
    }
    return std::string::npos;
  }

  // Text before a tag, with what the tag's sign and lstrip_blocks take away.
  std::string_view TextBefore(std::string_view text, char sign, bool is_print) const {
    if (sign == '-') return Strip(text, Side::kRight);
    if (sign == '+' || is_print) return text;
    const size_t line_begin = text.rfind('\n') + 1;  // npos + 1 == 0
    if (line_begin == 0 && !line_starting_) return text;
    return Strip(text.substr(line_begin), Side::kRight).empty() ? text.substr(0, line_begin) : text;
  }

  // One stretch of text and the tag behind it.
  absl::Status LexText() {
    const size_t tag = FindTag();
    if (tag == std::string::npos) {
      Emit(Token::Kind::kData, std::string(Rest()));
      Advance(Rest().size());
      return absl::OkStatus();
    }
    const char kind = source_[tag + 1];
    const char next = tag + 2 < source_.size() ? source_[tag + 2] : '\0';
    const char sign = next == '-' || next == '+' ? next : '\0';
    const std::string_view text = Rest().substr(0, tag - at_);
    const std::string_view kept = TextBefore(text, sign, kind == '{');
    if (!kept.empty()) Emit(Token::Kind::kData, std::string(kept));
    Advance(text.size() + (sign != '\0' ? 3 : 2));
    if (kind == '#') return LexComment();
    if (kind == '%' && AtRaw()) return LexRaw();
    Emit(kind == '{' ? Token::Kind::kPrintBegin : Token::Kind::kBlockBegin, "");
    return LexTag(kind == '{' ? "}}" : "%}");
  }

  // Skips an end mark at the front: its sign, the mark, and the white space it takes along.
  // 0 when there is none.
  size_t EndMark(std::string_view mark, bool takes_newline) const {
    const std::string_view rest = Rest();
    if (rest.empty()) return 0;
    const bool plus = rest[0] == '+' && mark != "}}", minus = rest[0] == '-';
    const size_t begin = plus || minus ? 1 : 0;
    if (!rest.substr(begin).starts_with(mark)) return 0;
    size_t n = begin + mark.size();
    if (minus) {
      const std::string_view behind = rest.substr(n);
      n += behind.size() - Strip(behind, Side::kLeft).size();
    } else if (!plus && takes_newline && n < rest.size() && rest[n] == '\n') {
      ++n;
    }
    return n;
  }

  absl::Status LexComment() {
    while (at_ < source_.size()) {
      if (const size_t n = EndMark("#}", true); n > 0) {
        Advance(n);
        return absl::OkStatus();
      }
      Advance(1);
    }
    return Error("comment without its end '#}'");
  }

  bool AtRaw() const {
    const std::string_view rest = Strip(Rest(), Side::kLeft);
    if (!rest.starts_with("raw")) return false;
    const std::string_view behind = Strip(rest.substr(3), Side::kLeft);
    return behind.starts_with("%}") || behind.starts_with("-%}");
  }

  absl::Status LexRaw() {
    Advance(Rest().find("raw") + 3);
    SkipSpace();
    Advance(EndMark("%}", false));
    for (size_t end = at_; (end = source_.find("{%", end)) != std::string::npos; end += 2) {
      std::string_view rest = std::string_view(source_).substr(end + 2);
      const char sign = rest.starts_with('-') || rest.starts_with('+') ? rest[0] : '\0';
      if (sign != '\0') rest.remove_prefix(1);
      rest = Strip(rest, Side::kLeft);
      if (!rest.starts_with("endraw")) continue;
      const std::string_view behind = Strip(rest.substr(6), Side::kLeft);
      if (!behind.starts_with("%}") && !behind.starts_with("-%}") && !behind.starts_with("+%}")) {
        continue;
      }
      const std::string_view text = Rest().substr(0, end - at_);
      Emit(Token::Kind::kData, std::string(TextBefore(text, sign, false)));
      Advance(behind.data() - Rest().data());
      Advance(EndMark("%}", true));
      return absl::OkStatus();
    }
    return Error("raw block without its end '{% endraw %}'");
  }

  absl::Status LexTag(std::string_view mark) {
    std::vector<char> open;  // closing brackets that are due
    while (true) {
      SkipSpace();
      if (at_ >= source_.size()) return Error(absl::StrCat("missing '", std::string(mark), "'"));
      if (open.empty()) {
        if (const size_t n = EndMark(mark, mark == "%}"); n > 0) {
          Emit(mark == "%}" ? Token::Kind::kBlockEnd : Token::Kind::kPrintEnd, "");
          Advance(n);
          return absl::OkStatus();
        }
      }
      if (auto s = LexToken(&open); !s.ok()) return s;
    }
  }

  absl::Status LexToken(std::vector<char>* open) {
    const std::string_view rest = Rest();
    const char c = rest[0];
    if (IsNameStart(c)) {
      size_t n = 1;
      while (n < rest.size() && (IsNameStart(rest[n]) || IsDigit(rest[n]))) ++n;
      Emit(Token::Kind::kName, std::string(rest.substr(0, n)));
      Advance(n);
      return absl::OkStatus();
    }
    if (c == '"' || c == '\'') return LexString(c);
    if (IsDigit(c)) return LexNumber();
    return LexOperator(open);
  }

  absl::Status LexString(char quote) {
    const std::string_view rest = Rest();
    size_t end = 1;
    while (end < rest.size() && rest[end] != quote) end += rest[end] == '\\' ? 2 : 1;
    if (end >= rest.size()) return Error("string without its closing quote");
    Emit(Token::Kind::kString, Unescape(rest.substr(1, end - 1)));
    Advance(end + 1);
    return absl::OkStatus();
  }

  // Digits and underscores between digits, at `from` of the rest; returns where they end.
  template <typename IsOne>
  size_t Digits(size_t from, const IsOne& is_one) const {
    const std::string_view rest = Rest();
    size_t n = from;
    while (n < rest.size() && (is_one(rest[n]) || (rest[n] == '_' && n > from &&
                                                   n + 1 < rest.size() && is_one(rest[n + 1])))) {
      ++n;
    }
    return n;
  }

  absl::Status LexNumber() {
    const std::string_view rest = Rest();
    Token::Kind kind = Token::Kind::kInteger;
    size_t n;
    const char base = rest.size() > 1 && rest[0] == '0' ? static_cast<char>(rest[1] | 0x20) : '\0';
    if (base == 'x' || base == 'o' || base == 'b') {
      n = Digits(2, [&](char d) {
        return base == 'b'   ? d == '0' || d == '1'
               : base == 'o' ? d >= '0' && d <= '7'
                             : IsDigit(d) || ((d | 0x20) >= 'a' && (d | 0x20) <= 'f');
      });
    } else {
      n = Digits(0, IsDigit);
      if (n + 1 < rest.size() && rest[n] == '.' && IsDigit(rest[n + 1])) {
        kind = Token::Kind::kFloat;
        n = Digits(n + 1, IsDigit);
      }
      if (n < rest.size() && (rest[n] | 0x20) == 'e') {
        const size_t sign = n + 1 < rest.size() && (rest[n + 1] == '+' || rest[n + 1] == '-');
        if (const size_t end = Digits(n + 1 + sign, IsDigit); end > n + 1 + sign) {
          kind = Token::Kind::kFloat;
          n = end;
        }
      }
    }
    std::string text(rest.substr(0, n));
    std::erase(text, '_');
    Emit(kind, std::move(text));
    Advance(n);
    return absl::OkStatus();
  }

  absl::Status LexOperator(std::vector<char>* open) {
    static constexpr std::string_view kTwo[] = {"**", "//", "==", "!=", ">=", "<="};
    const std::string_view rest = Rest();
    for (const std::string_view op : kTwo) {
      if (rest.starts_with(op)) {
        Emit(Token::Kind::kOperator, std::string(op));
        Advance(2);
        return absl::OkStatus();
      }
    }
    const char c = rest[0];
    if (std::string_view("+-/*%~[](){}><=.:|,;").find(c) == std::string_view::npos) {
      return Error(absl::StrCat("unexpected character '", std::string(1, c), "'"));
    }
    if (c == '(' || c == '[' || c == '{') {
      open->push_back(c == '(' ? ')' : c == '[' ? ']' : '}');
    } else if (c == ')' || c == ']' || c == '}') {
      if (open->empty() || open->back() != c) {
        return Error(absl::StrCat("unexpected '", std::string(1, c), "'"));
      }
      open->pop_back();
    }
    Emit(Token::Kind::kOperator, std::string(1, c));
    Advance(1);
    return absl::OkStatus();
  }

  const std::string source_;
  size_t at_ = 0;
  int line_ = 1;
  bool line_starting_ = true;  // what was read last ended a line
  std::vector<Token> tokens_;
};

}  // namespace

absl::StatusOr<std::vector<Token>> Tokenize(std::string_view source) { return Lexer(source).Run(); }

}  // namespace shoal::jinja
