#include "launcher/jinja/python_text.h"

#include <utf8proc.h>

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "launcher/utf8_stream.h"

namespace shoal::jinja {
namespace {

size_t CharacterSize(std::string_view text) { return std::max<size_t>(Utf8CharLength(text), 1); }

void Append(std::string& out, char32_t c) {
  utf8proc_uint8_t buffer[4];
  const auto n = utf8proc_encode_char(static_cast<utf8proc_int32_t>(c), buffer);
  out.append(reinterpret_cast<const char*>(buffer), n);
}

bool IsBadByte(std::string_view character) {
  return character.size() == 1 && static_cast<uint8_t>(character[0]) >= 0x80;
}

utf8proc_category_t Category(std::string_view character) {
  if (IsBadByte(character)) return UTF8PROC_CATEGORY_CN;
  return utf8proc_category(static_cast<utf8proc_int32_t>(CodePoint(character)));
}

bool IsLetter(std::string_view character) {
  const auto category = Category(character);
  return category >= UTF8PROC_CATEGORY_LU && category <= UTF8PROC_CATEGORY_LO;
}

bool IsCased(std::string_view character) {
  const auto category = Category(character);
  return category >= UTF8PROC_CATEGORY_LU && category <= UTF8PROC_CATEGORY_LT;
}

void AppendUpper(std::string& out, std::string_view character) {
  if (IsBadByte(character)) {
    out.append(character);
  } else if (const char32_t c = CodePoint(character); c == 0xDF) {
    out.append("SS");  // the one full case mapping that ordinary text has
  } else {
    Append(out, utf8proc_toupper(static_cast<utf8proc_int32_t>(c)));
  }
}

void AppendTitle(std::string& out, std::string_view character) {
  if (IsBadByte(character)) {
    out.append(character);
  } else if (const char32_t c = CodePoint(character); c == 0xDF) {
    out.append("Ss");
  } else {
    Append(out, utf8proc_totitle(static_cast<utf8proc_int32_t>(c)));
  }
}

void AppendLower(std::string& out, std::string_view character) {
  if (IsBadByte(character)) {
    out.append(character);
  } else {
    Append(out, utf8proc_tolower(static_cast<utf8proc_int32_t>(CodePoint(character))));
  }
}

template <typename Visit>
void ForEach(std::string_view text, const Visit& visit) {
  while (!text.empty()) {
    const size_t n = CharacterSize(text);
    visit(text.substr(0, n));
    text.remove_prefix(n);
  }
}

// The last character of a text that is not empty.
std::string_view LastCharacter(std::string_view text) {
  for (size_t n = 4; n > 1; --n) {
    if (text.size() >= n && Utf8CharLength(text.substr(text.size() - n)) == n) {
      return text.substr(text.size() - n);
    }
  }
  return text.substr(text.size() - 1);
}

template <typename Drop>
std::string_view StripIf(std::string_view text, Side side, const Drop& drop) {
  while (side != Side::kRight && !text.empty()) {
    const std::string_view first = text.substr(0, CharacterSize(text));
    if (!drop(first)) break;
    text.remove_prefix(first.size());
  }
  while (side != Side::kLeft && !text.empty()) {
    const std::string_view last = LastCharacter(text);
    if (!drop(last)) break;
    text.remove_suffix(last.size());
  }
  return text;
}

bool IsSpaceCharacter(std::string_view character) {
  return !IsBadByte(character) && IsSpace(CodePoint(character));
}

bool IsLineEnd(char32_t c) {
  return (c >= 0x0A && c <= 0x0D) || (c >= 0x1C && c <= 0x1E) || c == 0x85 || c == 0x2028 ||
         c == 0x2029;
}

}  // namespace

char32_t CodePoint(std::string_view character) {
  const auto byte = [&](size_t i) {
    return static_cast<char32_t>(static_cast<uint8_t>(character[i]));
  };
  switch (character.size()) {
    case 1:
      return byte(0);
    case 2:
      return (byte(0) & 0x1F) << 6 | (byte(1) & 0x3F);
    case 3:
      return (byte(0) & 0x0F) << 12 | (byte(1) & 0x3F) << 6 | (byte(2) & 0x3F);
    default:
      return (byte(0) & 0x07) << 18 | (byte(1) & 0x3F) << 12 | (byte(2) & 0x3F) << 6 |
             (byte(3) & 0x3F);
  }
}

size_t Length(std::string_view text) {
  size_t n = 0;
  ForEach(text, [&](std::string_view) { ++n; });
  return n;
}

std::vector<std::string_view> Characters(std::string_view text) {
  std::vector<std::string_view> out;
  out.reserve(text.size());
  ForEach(text, [&](std::string_view c) { out.push_back(c); });
  return out;
}

std::string_view Substring(std::string_view text, size_t from, size_t to) {
  size_t begin = 0;
  for (size_t i = 0; i < from; ++i) begin += CharacterSize(text.substr(begin));
  size_t end = begin;
  for (size_t i = from; i < to; ++i) end += CharacterSize(text.substr(end));
  return text.substr(begin, end - begin);
}

bool IsSpace(char32_t c) {
  return (c >= 9 && c <= 13) || (c >= 28 && c <= 32) || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
         c == 0x3000;
}

std::string Upper(std::string_view text) {
  std::string out;
  ForEach(text, [&](std::string_view c) { AppendUpper(out, c); });
  return out;
}

std::string Lower(std::string_view text) {
  std::string out;
  ForEach(text, [&](std::string_view c) { AppendLower(out, c); });
  return out;
}

std::string Capitalize(std::string_view text) {
  std::string out;
  ForEach(text, [&](std::string_view c) {
    if (out.empty()) {
      AppendTitle(out, c);
    } else {
      AppendLower(out, c);
    }
  });
  return out;
}

std::string Title(std::string_view text) {
  std::string out;
  bool in_word = false;
  ForEach(text, [&](std::string_view c) {
    if (in_word) {
      AppendLower(out, c);
    } else {
      AppendTitle(out, c);
    }
    in_word = IsCased(c);
  });
  return out;
}

std::string SwapCase(std::string_view text) {
  std::string out;
  ForEach(text, [&](std::string_view c) {
    if (Category(c) == UTF8PROC_CATEGORY_LU) {
      AppendLower(out, c);
    } else {
      AppendUpper(out, c);
    }
  });
  return out;
}

std::string_view Strip(std::string_view text, Side side) {
  return StripIf(text, side, IsSpaceCharacter);
}

std::string_view Strip(std::string_view text, std::string_view characters, Side side) {
  const auto set = Characters(characters);
  return StripIf(text, side, [&](std::string_view c) {
    return std::find(set.begin(), set.end(), c) != set.end();
  });
}

std::vector<std::string_view> Split(std::string_view text, std::string_view separator,
                                    int64_t max) {
  std::vector<std::string_view> out;
  while (max < 0 || static_cast<int64_t>(out.size()) < max) {
    const size_t at = text.find(separator);
    if (at == std::string_view::npos) break;
    out.push_back(text.substr(0, at));
    text.remove_prefix(at + separator.size());
  }
  out.push_back(text);
  return out;
}

std::vector<std::string_view> SplitRight(std::string_view text, std::string_view separator,
                                         int64_t max) {
  std::vector<std::string_view> out;
  while (max < 0 || static_cast<int64_t>(out.size()) < max) {
    const size_t at = text.rfind(separator);
    if (at == std::string_view::npos) break;
    out.push_back(text.substr(at + separator.size()));
    text = text.substr(0, at);
  }
  out.push_back(text);
  std::reverse(out.begin(), out.end());
  return out;
}

std::vector<std::string_view> SplitSpace(std::string_view text, int64_t max) {
  std::vector<std::string_view> out;
  for (text = Strip(text, Side::kLeft); !text.empty(); text = Strip(text, Side::kLeft)) {
    if (max >= 0 && static_cast<int64_t>(out.size()) == max) {
      out.push_back(text);
      break;
    }
    size_t n = 0;
    while (n < text.size() && !IsSpaceCharacter(text.substr(n, CharacterSize(text.substr(n))))) {
      n += CharacterSize(text.substr(n));
    }
    out.push_back(text.substr(0, n));
    text.remove_prefix(n);
  }
  return out;
}

std::vector<std::string_view> SplitSpaceRight(std::string_view text, int64_t max) {
  std::vector<std::string_view> out;
  for (text = Strip(text, Side::kRight); !text.empty(); text = Strip(text, Side::kRight)) {
    if (max >= 0 && static_cast<int64_t>(out.size()) == max) {
      out.push_back(text);
      break;
    }
    size_t begin = text.size();
    while (begin > 0) {
      const std::string_view last = LastCharacter(text.substr(0, begin));
      if (IsSpaceCharacter(last)) break;
      begin -= last.size();
    }
    out.push_back(text.substr(begin));
    text = text.substr(0, begin);
  }
  std::reverse(out.begin(), out.end());
  return out;
}

std::vector<std::string_view> SplitLines(std::string_view text, bool keep_ends) {
  std::vector<std::string_view> out;
  while (!text.empty()) {
    size_t end = 0, next = text.size();
    while (end < text.size()) {
      const std::string_view c = text.substr(end, CharacterSize(text.substr(end)));
      if (!IsBadByte(c) && IsLineEnd(CodePoint(c))) {
        next = end + c.size();
        if (c == "\r" && text.substr(next).starts_with('\n')) ++next;
        break;
      }
      end += c.size();
    }
    out.push_back(text.substr(0, keep_ends ? next : end));
    text.remove_prefix(next);
  }
  return out;
}

std::string Replace(std::string_view text, std::string_view from, std::string_view to,
                    int64_t max) {
  std::string out;
  int64_t done = 0;
  const auto more = [&] { return max < 0 || done < max; };
  if (from.empty()) {
    ForEach(text, [&](std::string_view c) {
      if (more()) out.append(to), ++done;
      out.append(c);
    });
    if (more()) out.append(to);
    return out;
  }
  while (more()) {
    const size_t at = text.find(from);
    if (at == std::string_view::npos) break;
    out.append(text.substr(0, at)).append(to);
    text.remove_prefix(at + from.size());
    ++done;
  }
  return out.append(text);
}

bool AllAre(std::string_view text, CharacterClass kind) {
  if (text.empty()) return false;
  bool cased = false, all = true;
  ForEach(text, [&](std::string_view c) {
    const auto category = Category(c);
    switch (kind) {
      case CharacterClass::kAlpha:
        all &= IsLetter(c);
        break;
      case CharacterClass::kDigit:
        all &= category == UTF8PROC_CATEGORY_ND;
        break;
      case CharacterClass::kAlnum:
        all &=
            IsLetter(c) || (category >= UTF8PROC_CATEGORY_ND && category <= UTF8PROC_CATEGORY_NO);
        break;
      case CharacterClass::kSpace:
        all &= IsSpaceCharacter(c);
        break;
      case CharacterClass::kUpper:
        cased |= IsCased(c);
        all &= category != UTF8PROC_CATEGORY_LL && category != UTF8PROC_CATEGORY_LT;
        break;
      case CharacterClass::kLower:
        cased |= IsCased(c);
        all &= category != UTF8PROC_CATEGORY_LU && category != UTF8PROC_CATEGORY_LT;
        break;
    }
  });
  const bool needs_case = kind == CharacterClass::kUpper || kind == CharacterClass::kLower;
  return all && (cased || !needs_case);
}

std::string EscapeHtml(std::string_view text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&#34;";
        break;
      case '\'':
        out += "&#39;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

std::string JsonString(std::string_view text, bool ascii_only) {
  std::string out = "\"";
  ForEach(text, [&](std::string_view character) {
    const char32_t c = IsBadByte(character) ? 0xFFFD : CodePoint(character);
    switch (c) {
      case '"':
        out += "\\\"";
        return;
      case '\\':
        out += "\\\\";
        return;
      case '\n':
        out += "\\n";
        return;
      case '\r':
        out += "\\r";
        return;
      case '\t':
        out += "\\t";
        return;
      case '\b':
        out += "\\b";
        return;
      case '\f':
        out += "\\f";
        return;
      default:
        break;
    }
    if (c < 0x20 || (ascii_only && c >= 0x7F && c < 0x10000)) {
      absl::StrAppendFormat(&out, "\\u%04x", static_cast<unsigned>(c));
    } else if (ascii_only && c >= 0x10000) {
      absl::StrAppendFormat(&out, "\\u%04x\\u%04x",
                            static_cast<unsigned>(0xD800 + ((c - 0x10000) >> 10)),
                            static_cast<unsigned>(0xDC00 + ((c - 0x10000) & 0x3FF)));
    } else {
      Append(out, c);
    }
  });
  return out + "\"";
}

std::string StringRepr(std::string_view text) {
  const bool double_quotes =
      text.find('\'') != std::string_view::npos && text.find('"') == std::string_view::npos;
  const char quote = double_quotes ? '"' : '\'';
  std::string out(1, quote);
  ForEach(text, [&](std::string_view character) {
    const char32_t c = CodePoint(character);
    if (IsBadByte(character)) {
      absl::StrAppendFormat(&out, "\\x%02x", static_cast<unsigned>(c));
    } else if (c == static_cast<char32_t>(quote) || c == '\\') {
      out += '\\';
      out += static_cast<char>(c);
    } else if (c == '\n') {
      out += "\\n";
    } else if (c == '\r') {
      out += "\\r";
    } else if (c == '\t') {
      out += "\\t";
    } else {
      // Python shows what is printable: no "other" characters, and of separators only the space.
      const auto category = Category(character);
      const bool hidden =
          (category >= UTF8PROC_CATEGORY_ZS && c != ' ') || category == UTF8PROC_CATEGORY_CN;
      if (!hidden) {
        out.append(character);
      } else if (c <= 0xFF) {
        absl::StrAppendFormat(&out, "\\x%02x", static_cast<unsigned>(c));
      } else if (c <= 0xFFFF) {
        absl::StrAppendFormat(&out, "\\u%04x", static_cast<unsigned>(c));
      } else {
        absl::StrAppendFormat(&out, "\\U%08x", static_cast<unsigned>(c));
      }
    }
  });
  return out + quote;
}

}  // namespace shoal::jinja
