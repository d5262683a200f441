#include "launcher/token_text.h"

#include <array>

namespace shoal {
namespace {

int HexDigit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  return -1;
}

constexpr bool IsPrintable(int byte) {
  return (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
}

constexpr int kLetterEnd = 0x100 + 68;  // 68 bytes are not printable

struct Alphabet {
  std::array<uint16_t, 256> letter{};      // code point of each byte
  std::array<int16_t, kLetterEnd> byte{};  // byte of each code point, or -1
};

constexpr Alphabet MakeAlphabet() {
  Alphabet a;
  for (auto& byte : a.byte) byte = -1;
  int next = 0x100;
  for (int byte = 0; byte < 256; ++byte) {
    const int letter = IsPrintable(byte) ? byte : next++;
    a.letter[byte] = static_cast<uint16_t>(letter);
    a.byte[letter] = static_cast<int16_t>(byte);
  }
  return a;
}

constexpr Alphabet kAlphabet = MakeAlphabet();

}  // namespace

int ByteOfToken(std::string_view text) {
  if (text.size() != 6 || !text.starts_with("<0x") || text[5] != '>') return -1;
  const int high = HexDigit(text[3]), low = HexDigit(text[4]);
  return high < 0 || low < 0 ? -1 : high * 16 + low;
}

std::string ByteLetter(uint8_t byte) {
  const uint16_t letter = kAlphabet.letter[byte];
  if (letter < 0x80) return std::string(1, static_cast<char>(letter));
  return {static_cast<char>(0xC0 | letter >> 6), static_cast<char>(0x80 | (letter & 0x3F))};
}

std::string BytesOfLetters(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (size_t i = 0; i < text.size(); ++i) {
    int letter = static_cast<uint8_t>(text[i]);
    if (letter >= 0x80) {  // every letter of the alphabet has at most two bytes
      const bool two = letter >= 0xC2 && letter < 0xE0 && i + 1 < text.size() &&
                       (static_cast<uint8_t>(text[i + 1]) & 0xC0) == 0x80;
      if (!two) return std::string(text);
      letter = (letter & 0x1F) << 6 | (static_cast<uint8_t>(text[++i]) & 0x3F);
    }
    if (letter >= kLetterEnd || kAlphabet.byte[letter] < 0) return std::string(text);
    out.push_back(static_cast<char>(kAlphabet.byte[letter]));
  }
  return out;
}

}  // namespace shoal
