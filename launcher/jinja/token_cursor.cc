#include "launcher/jinja/token_cursor.h"

#include "absl/strings/str_cat.h"

namespace shoal::jinja {
namespace {

// Of expressions and blocks within each other; a frame of the parser is a few hundred bytes.
constexpr int kMaxNesting = 150;

}  // namespace

std::string Describe(const Token& token) {
  switch (token.kind) {
    case Token::Kind::kData:
      return "text";
    case Token::Kind::kPrintBegin:
      return "'{{'";
    case Token::Kind::kPrintEnd:
      return "'}}'";
    case Token::Kind::kBlockBegin:
      return "'{%'";
    case Token::Kind::kBlockEnd:
      return "'%}'";
    case Token::Kind::kEnd:
      return "the end of the template";
    default:
      return absl::StrCat("'", token.text, "'");
  }
}

void TokenCursor::Fail(std::string_view what) {
  if (failed()) return;
  status_ = absl::InvalidArgumentError(
      absl::StrCat("chat template line ", line(), ": ", std::string(what)));
}

void TokenCursor::Unexpected(std::string_view expected) {
  Fail(absl::StrCat("found ", Describe(Current()), "; expected ", std::string(expected)));
}

bool TokenCursor::NamedSince(size_t begin, std::string_view name) const {
  for (size_t i = begin; i < at_; ++i) {
    if (tokens_[i].IsName(name)) return true;
  }
  return false;
}

Token TokenCursor::Next() {
  Token token = Current();
  if (at_ + 1 < tokens_.size()) ++at_;
  return token;
}

bool TokenCursor::Skip(Token::Kind kind) {
  if (Current().kind != kind) return false;
  Next();
  return true;
}

bool TokenCursor::SkipOperator(std::string_view op) {
  if (!Current().IsOperator(op)) return false;
  Next();
  return true;
}

bool TokenCursor::SkipName(std::string_view name) {
  if (!Current().IsName(name)) return false;
  Next();
  return true;
}

void TokenCursor::Expect(Token::Kind kind) {
  if (!Skip(kind)) Unexpected(Describe({kind, "", 0}));
}

void TokenCursor::ExpectOperator(std::string_view op) {
  if (!SkipOperator(op)) Unexpected(absl::StrCat("'", std::string(op), "'"));
}

std::string TokenCursor::ExpectName() {
  if (Current().kind == Token::Kind::kName) return Next().text;
  Unexpected("a name");
  return {};
}

Nested::Nested(TokenCursor& cursor) : cursor_(cursor) {
  if (++cursor_.depth_ > kMaxNesting) cursor_.Fail("expressions or blocks nest too deep");
}

}  // namespace shoal::jinja
