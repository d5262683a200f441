// UTF-8 at the edges: where a character ends, and a stream that never shows half of one.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace shoal {

// Bytes of the well-formed UTF-8 character at the start of `text` (1..4), or 0 when the bytes there
// are not one (stray continuation, overlong, surrogate, cut off). REQUIRES: text is not empty.
size_t Utf8CharLength(std::string_view text);

// Turns the byte pieces of generated tokens into text that is well-formed UTF-8 at every step. A
// character whose bytes arrive in several tokens is held back until it is whole; bytes that can
// never become a character turn into U+FFFD, one for each longest prefix of a character (as
// browsers and Python's errors="replace" do). Not thread-safe: one stream has one object.
class Utf8Stream {
 public:
  // Appends bytes and returns the text that is now complete (often empty).
  std::string Push(std::string_view bytes);
  // Ends the stream: an unfinished character becomes U+FFFD. The object can then be used again.
  std::string Finish();

 private:
  std::string pending_;  // the first 1..3 bytes of a character, or empty
};

}  // namespace shoal
