#include "launcher/utf8_stream.h"

#include <algorithm>
#include <cstdint>

namespace shoal {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

struct Prefix {
  size_t expected = 0;  // bytes of the character that the first byte announces; 0: not a first byte
  size_t valid = 0;     // how many of the bytes present can begin such a character
};

// Table 3-7 of the Unicode standard: the second byte's range depends on the first byte.
Prefix Classify(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t first = byte(0);
  if (first < 0x80) return {1, 1};
  if (first < 0xC2 || first > 0xF4) return {};
  const size_t expected = first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
  uint8_t low = 0x80, high = 0xBF;
  if (first == 0xE0) low = 0xA0;
  if (first == 0xED) high = 0x9F;  // surrogates
  if (first == 0xF0) low = 0x90;
  if (first == 0xF4) high = 0x8F;  // above U+10FFFF
  size_t valid = 1;
  while (valid < expected && valid < text.size() && byte(valid) >= low && byte(valid) <= high) {
    ++valid;
    low = 0x80;
    high = 0xBF;
  }
  return {expected, valid};
}

}  // namespace

size_t Utf8CharLength(std::string_view text) {
  const Prefix prefix = Classify(text);
  return prefix.valid == prefix.expected ? prefix.expected : 0;
}

std::string Utf8Stream::Push(std::string_view bytes) {
  std::string joined = std::move(pending_);
  pending_.clear();
  joined.append(bytes);
  std::string_view rest = joined;
  std::string out;
  out.reserve(joined.size());
  while (!rest.empty()) {
    const Prefix prefix = Classify(rest);
    if (prefix.expected != 0 && prefix.valid == prefix.expected) {
      out.append(rest.substr(0, prefix.expected));
      rest.remove_prefix(prefix.expected);
    } else if (prefix.valid == rest.size()) {
      pending_ = rest;  // may yet be completed
      break;
    } else {
      out.append(kReplacement);
      rest.remove_prefix(std::max<size_t>(prefix.valid, 1));
    }
  }
  return out;
}

std::string Utf8Stream::Finish() {
  const bool unfinished = !pending_.empty();
  pending_.clear();
  return unfinished ? std::string(kReplacement) : std::string();
}

}  // namespace shoal
