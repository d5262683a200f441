// From generated tokens to the text a client may see: whole characters, cut at stop strings.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "launcher/tokenizer.h"
#include "launcher/utf8_stream.h"

namespace shoal {

// One generation has one object. Text that may yet turn out to be the start of a stop string is
// held back.
class TextStream {
 public:
  // The tokenizer must outlive the object.
  TextStream(const Tokenizer& tokenizer, std::vector<std::string> stops, bool render_special);

  // The text that is certain now. After a stop string (which is not shown itself) nothing follows.
  std::string Push(int32_t token);
  // The generation ended by itself: what was held back.
  std::string Finish();
  bool stopped() const { return stopped_; }

 private:
  std::string Cut(const std::string& text);

  const Tokenizer& tokenizer_;
  const std::vector<std::string> stops_;
  const bool render_special_;
  Utf8Stream utf8_;
  std::string held_;
  bool stopped_ = false;
};

}  // namespace shoal
