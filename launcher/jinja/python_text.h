// Python's str, over UTF-8: lengths and positions count characters, not bytes. Bytes that are not
// UTF-8 count as one character each.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace shoal::jinja {

size_t Length(std::string_view text);
std::vector<std::string_view> Characters(std::string_view text);
// text[from:to] by characters. REQUIRES: 0 <= from <= to <= Length(text).
std::string_view Substring(std::string_view text, size_t from, size_t to);

bool IsSpace(char32_t c);  // what str.strip() and str.split() take for white space
char32_t CodePoint(std::string_view character);

std::string Upper(std::string_view text);
std::string Lower(std::string_view text);
std::string Capitalize(std::string_view text);
std::string Title(std::string_view text);  // str.title()
std::string SwapCase(std::string_view text);

enum class Side { kLeft, kRight, kBoth };
std::string_view Strip(std::string_view text, Side side);  // white space
std::string_view Strip(std::string_view text, std::string_view characters, Side side);

// `max` cuts at most, -1 for no limit.
std::vector<std::string_view> Split(std::string_view text, std::string_view separator, int64_t max);
std::vector<std::string_view> SplitRight(std::string_view text, std::string_view separator,
                                         int64_t max);
std::vector<std::string_view> SplitSpace(std::string_view text, int64_t max);
std::vector<std::string_view> SplitSpaceRight(std::string_view text, int64_t max);
std::vector<std::string_view> SplitLines(std::string_view text, bool keep_ends);

// At most `max` replacements, -1 for no limit. An empty `from` matches between all characters.
std::string Replace(std::string_view text, std::string_view from, std::string_view to, int64_t max);

// str.isdigit() and the like: not empty, and all characters of the kind.
enum class CharacterClass { kAlpha, kDigit, kAlnum, kSpace, kUpper, kLower };
bool AllAre(std::string_view text, CharacterClass kind);

std::string EscapeHtml(std::string_view text);
// With quotes, as json.dumps writes it.
std::string JsonString(std::string_view text, bool ascii_only);
std::string StringRepr(std::string_view text);

}  // namespace shoal::jinja
