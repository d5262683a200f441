// Cuts a template's source into tokens, white space control included.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace shoal::jinja {

struct Token {
  enum class Kind {
    kData,        // text to print as it is
    kPrintBegin,  // {{
    kPrintEnd,
    kBlockBegin,  // {%
    kBlockEnd,
    kName,
    kString,    // text: escapes resolved
    kInteger,   // text: decimal digits, or 0x.., 0o.., 0b..
    kFloat,     // text: for strtod
    kOperator,  // text: the operator
    kEnd,
  };
  Kind kind = Kind::kEnd;
  std::string text;
  int line = 1;

  bool Is(Kind k, std::string_view t) const { return kind == k && text == t; }
  bool IsOperator(std::string_view t) const { return Is(Kind::kOperator, t); }
  bool IsName(std::string_view t) const { return Is(Kind::kName, t); }
};

// Behaves as Jinja with trim_blocks and lstrip_blocks on, the settings of transformers: the newline
// behind a block and the blanks before it on its line vanish, and so does the source's last
// newline. Ends with a kEnd token. Errors are kInvalidArgument with a line number.
absl::StatusOr<std::vector<Token>> Tokenize(std::string_view source);

}  // namespace shoal::jinja
