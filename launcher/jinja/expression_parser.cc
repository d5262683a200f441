#include "launcher/jinja/expression_parser.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"

namespace shoal::jinja {
namespace {

// `a + b + c + ...` nests to the left without recursion here, but is walked recursively later.
constexpr int kMaxTreeDepth = 500;

}  // namespace

ExprPtr ExpressionParser::Make(Expr::Kind kind, int line) {
  auto expr = std::make_unique<Expr>();
  expr->kind = kind;
  expr->line = line;
  return expr;
}

ExprPtr ExpressionParser::Make(Expr::Kind kind, int line, ExprPtr first) {
  auto expr = Make(kind, line);
  Add(*expr, std::move(first));
  return expr;
}

void ExpressionParser::NoteChild(Expr& parent, const ExprPtr& child) {
  if (child == nullptr) return;
  parent.depth = std::max(parent.depth, child->depth + 1);
  if (parent.depth > kMaxTreeDepth) in_.Fail("an expression chains too many operators");
}

void ExpressionParser::Add(Expr& parent, ExprPtr child) {
  NoteChild(parent, child);
  parent.items.push_back(std::move(child));
}

ExprPtr ExpressionParser::Constant(Value value, int line) {
  auto expr = Make(Expr::Kind::kConstant, line);
  expr->value = std::move(value);
  return expr;
}

ExprPtr ExpressionParser::ParseTuple(bool with_if) {
  const int at = in_.line();
  ExprPtr first = with_if ? ParseExpression() : ParseOr();
  if (!in_.Current().IsOperator(",")) return first;
  auto tuple = Make(Expr::Kind::kTuple, at, std::move(first));
  while (in_.SkipOperator(",")) {
    const Token& next = in_.Current();
    if (next.kind == Token::Kind::kPrintEnd || next.kind == Token::Kind::kBlockEnd ||
        next.IsOperator(")") || next.kind == Token::Kind::kEnd) {
      break;
    }
    Add(*tuple, with_if ? ParseExpression() : ParseOr());
  }
  return tuple;
}

ExprPtr ExpressionParser::ParseExpression() {
  Nested nested(in_);
  const int at = in_.line();
  ExprPtr expr = ParseOr();
  while (in_.SkipName("if")) {
    auto choice = Make(Expr::Kind::kIf, at, std::move(expr));
    Add(*choice, ParseOr());
    Add(*choice, in_.SkipName("else") ? ParseExpression() : nullptr);
    expr = std::move(choice);
  }
  return expr;
}

ExprPtr ExpressionParser::ParseOr() {
  Nested nested(in_);
  ExprPtr left = ParseAnd();
  while (!in_.failed() && in_.Current().IsName("or")) {
    auto expr = Make(Expr::Kind::kOr, in_.Next().line, std::move(left));
    Add(*expr, ParseAnd());
    left = std::move(expr);
  }
  return left;
}

ExprPtr ExpressionParser::ParseAnd() {
  ExprPtr left = ParseNot();
  while (!in_.failed() && in_.Current().IsName("and")) {
    auto expr = Make(Expr::Kind::kAnd, in_.Next().line, std::move(left));
    Add(*expr, ParseNot());
    left = std::move(expr);
  }
  return left;
}

ExprPtr ExpressionParser::ParseNot() {
  if (!in_.Current().IsName("not")) return ParseCompare();
  Nested nested(in_);
  const int at = in_.Next().line;
  return Make(Expr::Kind::kNot, at, ParseNot());
}

std::string ExpressionParser::TakeComparison() {
  static constexpr std::string_view kOps[] = {"==", "!=", "<", "<=", ">", ">="};
  for (const std::string_view op : kOps) {
    if (in_.SkipOperator(op)) return std::string(op);
  }
  if (in_.SkipName("in")) return "in";
  if (in_.Current().IsName("not") && in_.Ahead().IsName("in")) {
    in_.Next();
    in_.Next();
    return "not in";
  }
  return {};
}

ExprPtr ExpressionParser::ParseCompare() {
  const int at = in_.line();
  ExprPtr left = ParseSum();
  std::string op = TakeComparison();
  if (op.empty()) return left;
  auto expr = Make(Expr::Kind::kCompare, at, std::move(left));
  for (; !op.empty(); op = TakeComparison()) {
    expr->ops.push_back(std::move(op));
    Add(*expr, ParseSum());
  }
  return expr;
}

template <typename Operand>
ExprPtr ExpressionParser::ParseBinary(std::initializer_list<std::string_view> ops,
                                      const Operand& operand) {
  ExprPtr left = operand();
  while (!in_.failed()) {
    std::string_view found;
    for (const std::string_view op : ops) {
      if (in_.Current().IsOperator(op)) found = op;
    }
    if (found.empty()) break;
    auto expr = Make(Expr::Kind::kBinary, in_.Next().line, std::move(left));
    expr->name = found;
    Add(*expr, operand());
    left = std::move(expr);
  }
  return left;
}

ExprPtr ExpressionParser::ParseSum() {
  return ParseBinary({"+", "-"}, [this] { return ParseConcat(); });
}

ExprPtr ExpressionParser::ParseConcat() {
  const int at = in_.line();
  ExprPtr first = ParseProduct();
  if (!in_.Current().IsOperator("~")) return first;
  auto expr = Make(Expr::Kind::kConcat, at, std::move(first));
  while (in_.SkipOperator("~")) Add(*expr, ParseProduct());
  return expr;
}

ExprPtr ExpressionParser::ParseProduct() {
  return ParseBinary({"*", "/", "//", "%"}, [this] {
    return ParseBinary({"**"}, [this] { return ParseUnary(/*with_filters=*/true); });
  });
}

ExprPtr ExpressionParser::ParseUnary(bool with_filters) {
  Nested nested(in_);
  ExprPtr expr;
  const int at = in_.line();
  if (in_.SkipOperator("-")) {
    expr = Make(Expr::Kind::kNegate, at, ParseUnary(false));
  } else if (in_.SkipOperator("+")) {
    expr = Make(Expr::Kind::kPlus, at, ParseUnary(false));
  } else {
    expr = ParsePrimary();
  }
  expr = ParsePostfix(std::move(expr));
  return with_filters ? ParseFilters(std::move(expr)) : std::move(expr);
}

ExprPtr ExpressionParser::ParsePrimary() {
  const Token token = in_.Next();
  switch (token.kind) {
    case Token::Kind::kName: {
      const std::string& t = token.text;
      if (t == "true" || t == "True") return Constant(true, token.line);
      if (t == "false" || t == "False") return Constant(false, token.line);
      if (t == "none" || t == "None") return Constant(None{}, token.line);
      auto expr = Make(Expr::Kind::kName, token.line);
      expr->name = t;
      return expr;
    }
    case Token::Kind::kString: {
      std::string text = token.text;
      while (in_.Current().kind == Token::Kind::kString) text += in_.Next().text;
      return Constant(std::move(text), token.line);
    }
    case Token::Kind::kInteger:
      return ParseInteger(token);
    case Token::Kind::kFloat:
      return Constant(std::strtod(token.text.c_str(), nullptr), token.line);
    default:
      break;
  }
  if (token.IsOperator("(")) return ParseParentheses(token.line);
  if (token.IsOperator("[")) return ParseList(token.line);
  if (token.IsOperator("{")) return ParseDict(token.line);
  in_.Fail(absl::StrCat("found ", Describe(token), "; expected a value"));
  return Constant(None{}, token.line);
}

ExprPtr ExpressionParser::ParseInteger(const Token& token) {
  std::string_view text = token.text;
  int base = 10;
  if (text.size() > 1 && text[0] == '0') {
    const char kind = static_cast<char>(text[1] | 0x20);
    if (kind == 'x') base = 16;
    if (kind == 'o') base = 8;
    if (kind == 'b') base = 2;
    if (base != 10) text.remove_prefix(2);
  }
  int64_t value = 0;
  const auto result = std::from_chars(text.data(), text.data() + text.size(), value, base);
  if (result.ec != std::errc() || result.ptr != text.data() + text.size()) {
    in_.Fail(absl::StrCat("'", token.text, "' is not a 64-bit integer"));
  }
  return Constant(value, token.line);
}

ExprPtr ExpressionParser::ParseParentheses(int at) {
  if (in_.SkipOperator(")")) return Make(Expr::Kind::kTuple, at);
  ExprPtr expr = ParseTuple(/*with_if=*/true);
  in_.ExpectOperator(")");
  return expr;
}

ExprPtr ExpressionParser::ParseList(int at) {
  auto list = Make(Expr::Kind::kList, at);
  while (!in_.failed() && !in_.Current().IsOperator("]")) {
    if (!list->items.empty()) in_.ExpectOperator(",");
    if (in_.Current().IsOperator("]")) break;
    Add(*list, ParseExpression());
  }
  in_.ExpectOperator("]");
  return list;
}

ExprPtr ExpressionParser::ParseDict(int at) {
  auto dict = Make(Expr::Kind::kDict, at);
  while (!in_.failed() && !in_.Current().IsOperator("}")) {
    if (!dict->items.empty()) in_.ExpectOperator(",");
    if (in_.Current().IsOperator("}")) break;
    Add(*dict, ParseExpression());
    in_.ExpectOperator(":");
    Add(*dict, ParseExpression());
  }
  in_.ExpectOperator("}");
  return dict;
}

ExprPtr ExpressionParser::ParsePostfix(ExprPtr expr) {
  while (true) {
    if (in_.Current().IsOperator(".")) {
      expr = ParseAttribute(std::move(expr));
    } else if (in_.Current().IsOperator("[")) {
      expr = ParseSubscript(std::move(expr));
    } else if (in_.Current().IsOperator("(")) {
      expr = ParseCall(std::move(expr));
    } else {
      return expr;
    }
  }
}

ExprPtr ExpressionParser::ParseAttribute(ExprPtr object) {
  const int at = in_.Next().line;
  if (in_.Current().kind == Token::Kind::kInteger) {
    auto expr = Make(Expr::Kind::kSubscript, at, std::move(object));
    Add(*expr, ParseInteger(in_.Next()));
    return expr;
  }
  auto expr = Make(Expr::Kind::kAttribute, at, std::move(object));
  expr->name = in_.ExpectName();
  return expr;
}

ExprPtr ExpressionParser::ParseSubscript(ExprPtr object) {
  auto expr = Make(Expr::Kind::kSubscript, in_.Next().line, std::move(object));
  Add(*expr, ParseIndex());
  in_.ExpectOperator("]");
  return expr;
}

ExprPtr ExpressionParser::ParseIndex() {
  const int at = in_.line();
  ExprPtr first = in_.Current().IsOperator(":") ? nullptr : ParseExpression();
  if (!in_.Current().IsOperator(":")) return first;
  auto slice = Make(Expr::Kind::kSlice, at, std::move(first));
  while (slice->items.size() < 3 && in_.SkipOperator(":")) {
    const bool given = !in_.Current().IsOperator(":") && !in_.Current().IsOperator("]");
    Add(*slice, given ? ParseExpression() : nullptr);
  }
  slice->items.resize(3);
  return slice;
}

ExprPtr ExpressionParser::ParseCall(ExprPtr callee) {
  auto expr = Make(Expr::Kind::kCall, in_.line(), std::move(callee));
  SetArguments(*expr);
  return expr;
}

void ExpressionParser::SetArguments(Expr& expr) {
  expr.arguments = ParseArguments();
  for (const ExprPtr& argument : expr.arguments.positional) NoteChild(expr, argument);
  for (const auto& [name, argument] : expr.arguments.keyword) NoteChild(expr, argument);
  NoteChild(expr, expr.arguments.star);
  NoteChild(expr, expr.arguments.double_star);
}

CallArguments ExpressionParser::ParseArguments() {
  CallArguments arguments;
  in_.ExpectOperator("(");
  for (bool first = true; !in_.failed() && !in_.Current().IsOperator(")"); first = false) {
    if (!first) in_.ExpectOperator(",");
    if (in_.Current().IsOperator(")")) break;
    if (in_.SkipOperator("**")) {
      if (arguments.double_star != nullptr) in_.Fail("a second '**' argument");
      arguments.double_star = ParseExpression();
    } else if (in_.SkipOperator("*")) {
      if (arguments.star != nullptr) in_.Fail("a second '*' argument");
      arguments.star = ParseExpression();
    } else if (in_.Current().kind == Token::Kind::kName && in_.Ahead().IsOperator("=")) {
      std::string name = in_.Next().text;
      in_.Next();
      arguments.keyword.emplace_back(std::move(name), ParseExpression());
    } else {
      if (!arguments.keyword.empty()) in_.Fail("a positional argument behind a named one");
      arguments.positional.push_back(ParseExpression());
    }
  }
  in_.ExpectOperator(")");
  return arguments;
}

ExprPtr ExpressionParser::ParseFilters(ExprPtr expr) {
  while (true) {
    if (in_.SkipOperator("|")) {
      expr = ParseFilter(std::move(expr));
    } else if (expr != nullptr && in_.Current().IsName("is")) {
      expr = ParseTest(std::move(expr));
    } else if (expr != nullptr && in_.Current().IsOperator("(")) {
      expr = ParseCall(std::move(expr));
    } else {
      return expr;
    }
  }
}

ExprPtr ExpressionParser::ParseFilter(ExprPtr operand) {
  auto expr = Make(Expr::Kind::kFilter, in_.line(), std::move(operand));
  expr->name = in_.ExpectName();
  if (in_.Current().IsOperator("(")) SetArguments(*expr);
  return expr;
}

ExprPtr ExpressionParser::ParseTest(ExprPtr operand) {
  const int at = in_.Next().line;
  const bool negated = in_.SkipName("not");
  auto test = Make(Expr::Kind::kTest, at, std::move(operand));
  test->name = in_.ExpectName();
  const Token& next = in_.Current();
  const bool one_argument =
      next.kind == Token::Kind::kString || next.kind == Token::Kind::kInteger ||
      next.kind == Token::Kind::kFloat || next.IsOperator("[") || next.IsOperator("{") ||
      (next.kind == Token::Kind::kName && !next.IsName("else") && !next.IsName("or") &&
       !next.IsName("and") && !next.IsName("if") && !next.IsName("is"));
  if (next.IsOperator("(")) {
    SetArguments(*test);
  } else if (next.IsName("is")) {
    in_.Fail("tests cannot be chained with 'is'");
  } else if (one_argument) {
    test->arguments.positional.push_back(ParsePostfix(ParsePrimary()));
    NoteChild(*test, test->arguments.positional.back());
  }
  return negated ? Make(Expr::Kind::kNot, at, std::move(test)) : std::move(test);
}

}  // namespace shoal::jinja
