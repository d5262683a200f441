// Reading a template's tokens one by one: what the parsers of expressions and statements share.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "launcher/jinja/lexer.h"

namespace shoal::jinja {

// The first error sticks: from then on every token reads as the end, so that parsers need no checks
// of their own and return empty shells, which nobody looks at. Not for several threads.
class TokenCursor {
 public:
  // `tokens` end with a kEnd, as Tokenize leaves them.
  explicit TokenCursor(std::vector<Token> tokens) : tokens_(std::move(tokens)) {}

  bool failed() const { return !status_.ok(); }
  const absl::Status& status() const { return status_; }
  // kInvalidArgument with the line at hand, unless an error came before.
  void Fail(std::string_view what);
  // Fails with what was found in place of `expected`.
  void Unexpected(std::string_view expected);

  const Token& Current() const { return failed() ? tokens_.back() : tokens_[at_]; }
  const Token& Ahead() const {
    return failed() || at_ + 1 >= tokens_.size() ? tokens_.back() : tokens_[at_ + 1];
  }
  int line() const { return tokens_[at_].line; }
  size_t position() const { return at_; }
  // Whether `name` stands between position `begin` and here.
  bool NamedSince(size_t begin, std::string_view name) const;

  // Returns the current token and goes on to the next.
  Token Next();
  bool Skip(Token::Kind kind);
  bool SkipOperator(std::string_view op);
  bool SkipName(std::string_view name);
  void Expect(Token::Kind kind);
  void ExpectOperator(std::string_view op);
  std::string ExpectName();

 private:
  friend class Nested;

  const std::vector<Token> tokens_;
  size_t at_ = 0;
  int depth_ = 0;  // expressions and blocks that are open
  absl::Status status_;
};

// A level of recursion: fails instead of running out of stack.
class Nested {
 public:
  explicit Nested(TokenCursor& cursor);
  ~Nested() { --cursor_.depth_; }
  Nested(const Nested&) = delete;
  Nested& operator=(const Nested&) = delete;

 private:
  TokenCursor& cursor_;
};

// For messages: the token as a reader of the template knows it.
std::string Describe(const Token& token);

}  // namespace shoal::jinja
