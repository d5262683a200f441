// How vocabularies spell bytes: <0x0A> in SentencePiece's, one printable letter per byte in
// GPT-2's.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace shoal {

// The byte that "<0xHH>" (upper or lower case digits) stands for, or -1 for any other text.
int ByteOfToken(std::string_view text);

// GPT-2's alphabet: 188 printable Latin-1 characters stand for themselves, the other 68 bytes for
// U+0100 upwards in rising order. Returns the UTF-8 of the letter for `byte`.
std::string ByteLetter(uint8_t byte);

// The bytes that `text` spells in that alphabet. Text with any other character is no spelling
// (an added token, say) and comes back as it is.
std::string BytesOfLetters(std::string_view text);

}  // namespace shoal
