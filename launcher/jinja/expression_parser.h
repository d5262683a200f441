// The part of the template parser that reads expressions: `{{ here }}`, and what tags take.
#pragma once

#include <initializer_list>
#include <string>
#include <string_view>

#include "launcher/jinja/ast.h"
#include "launcher/jinja/token_cursor.h"

namespace shoal::jinja {

// By recursive descent: a function for each level of binding. Errors stay in the cursor, which must
// outlive the parser.
class ExpressionParser {
 public:
  explicit ExpressionParser(TokenCursor& in) : in_(in) {}

  ExprPtr ParseExpression();
  // One expression, or several with commas between them as a tuple. with_if: `a if b else c` counts
  // as one; the list of a `for` leaves the "if" to the loop.
  ExprPtr ParseTuple(bool with_if);
  // `| filter`, `is test` and calls behind an operand; behind nothing (null) filters alone.
  ExprPtr ParseFilters(ExprPtr expr);
  // Behind the '|'.
  ExprPtr ParseFilter(ExprPtr operand);

 private:
  ExprPtr Make(Expr::Kind kind, int line);
  ExprPtr Make(Expr::Kind kind, int line, ExprPtr first);
  void NoteChild(Expr& parent, const ExprPtr& child);
  void Add(Expr& parent, ExprPtr child);
  ExprPtr Constant(Value value, int line);

  // From the loosest binding to the tightest.
  ExprPtr ParseOr();
  ExprPtr ParseAnd();
  ExprPtr ParseNot();
  std::string TakeComparison();
  ExprPtr ParseCompare();
  template <typename Operand>
  ExprPtr ParseBinary(std::initializer_list<std::string_view> ops, const Operand& operand);
  ExprPtr ParseSum();
  ExprPtr ParseConcat();
  ExprPtr ParseProduct();
  ExprPtr ParseUnary(bool with_filters);
  ExprPtr ParsePrimary();
  ExprPtr ParseInteger(const Token& token);
  ExprPtr ParseParentheses(int at);
  ExprPtr ParseList(int at);
  ExprPtr ParseDict(int at);

  // Behind an operand.
  ExprPtr ParsePostfix(ExprPtr expr);
  ExprPtr ParseAttribute(ExprPtr object);
  ExprPtr ParseSubscript(ExprPtr object);
  ExprPtr ParseIndex();
  ExprPtr ParseCall(ExprPtr callee);
  void SetArguments(Expr& expr);
  CallArguments ParseArguments();
  ExprPtr ParseTest(ExprPtr operand);  // at "is"

  TokenCursor& in_;
};

}  // namespace shoal::jinja
