#include "launcher/jinja/parser.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <initializer_list>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "launcher/jinja/lexer.h"

namespace shoal::jinja {
namespace {

// Of expressions and blocks within each other; a frame of the parser is a few hundred bytes.
constexpr int kMaxNesting = 150;
// `a + b + c + ...` nests to the left without recursion here, but is walked recursively later.
constexpr int kMaxTreeDepth = 500;
constexpr int kMaxElifs = 500;

// The first error sticks; from then on every token reads as the end and nodes are empty shells,
// which Run() throws away.
class Parser {
 public:
  explicit Parser(std::vector<Token> tokens) : tokens_(std::move(tokens)) {}

  absl::StatusOr<Body> Run() {
    Body body = ParseBody({});
    if (status_.ok() && Current().kind != Token::Kind::kEnd) Fail("unexpected end tag");
    if (!status_.ok()) return status_;
    return body;
  }

 private:
  class Nested {
   public:
    explicit Nested(Parser& parser) : parser_(parser) {
      if (++parser_.depth_ > kMaxNesting) parser_.Fail("expressions or blocks nest too deep");
    }
    ~Nested() { --parser_.depth_; }
    Nested(const Nested&) = delete;
    Nested& operator=(const Nested&) = delete;

   private:
    Parser& parser_;
  };

  // --- tokens

  bool failed() const { return !status_.ok(); }
  const Token& Current() const { return failed() ? tokens_.back() : tokens_[at_]; }
  const Token& Ahead() const {
    return failed() || at_ + 1 >= tokens_.size() ? tokens_.back() : tokens_[at_ + 1];
  }
  int line() const { return tokens_[at_].line; }
  Token Next() {
    Token token = Current();
    if (at_ + 1 < tokens_.size()) ++at_;
    return token;
  }

  void Fail(std::string_view what) {
    if (failed()) return;
    status_ = absl::InvalidArgumentError(
        absl::StrCat("chat template line ", line(), ": ", std::string(what)));
  }

  static std::string Describe(const Token& token) {
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

  void Unexpected(std::string_view expected) {
    Fail(absl::StrCat("found ", Describe(Current()), "; expected ", std::string(expected)));
  }

  bool SkipOperator(std::string_view op) {
    if (!Current().IsOperator(op)) return false;
    Next();
    return true;
  }
  bool SkipName(std::string_view name) {
    if (!Current().IsName(name)) return false;
    Next();
    return true;
  }
  void ExpectOperator(std::string_view op) {
    if (!SkipOperator(op)) Unexpected(absl::StrCat("'", std::string(op), "'"));
  }
  std::string ExpectName() {
    if (Current().kind == Token::Kind::kName) return Next().text;
    Unexpected("a name");
    return {};
  }
  void ExpectBlockEnd() {
    if (Current().kind == Token::Kind::kBlockEnd) {
      Next();
    } else {
      Unexpected("'%}'");
    }
  }

  ExprPtr Make(Expr::Kind kind, int line) {
    auto expr = std::make_unique<Expr>();
    expr->kind = kind;
    expr->line = line;
    return expr;
  }
  ExprPtr Make(Expr::Kind kind, int line, ExprPtr first) {
    auto expr = Make(kind, line);
    Add(*expr, std::move(first));
    return expr;
  }
  void NoteChild(Expr& parent, const ExprPtr& child) {
    if (child == nullptr) return;
    parent.depth = std::max(parent.depth, child->depth + 1);
    if (parent.depth > kMaxTreeDepth) Fail("an expression chains too many operators");
  }
  void Add(Expr& parent, ExprPtr child) {
    NoteChild(parent, child);
    parent.items.push_back(std::move(child));
  }
  ExprPtr Constant(Value value, int line) {
    auto expr = Make(Expr::Kind::kConstant, line);
    expr->value = std::move(value);
    return expr;
  }

  // --- statements

  // Until a block that begins with one of `ends` (left unread behind its '{%'), or the end.
  Body ParseBody(std::initializer_list<std::string_view> ends) {
    Nested nested(*this);
    Body body;
    while (!failed() && Current().kind != Token::Kind::kEnd) {
      Stmt stmt;
      stmt.line = line();
      if (Current().kind == Token::Kind::kData) {
        stmt.kind = Stmt::Kind::kData;
        stmt.text = Next().text;
      } else if (Current().kind == Token::Kind::kPrintBegin) {
        Next();
        stmt.kind = Stmt::Kind::kPrint;
        stmt.expr = ParseTuple(/*with_if=*/true);
        if (Current().kind == Token::Kind::kPrintEnd) {
          Next();
        } else {
          Unexpected("'}}'");
        }
      } else if (Current().kind == Token::Kind::kBlockBegin) {
        for (const std::string_view end : ends) {
          if (Ahead().IsName(end)) return body;
        }
        Next();
        ParseBlock(stmt);
      } else {
        Unexpected("text or a tag");
      }
      body.push_back(std::move(stmt));
    }
    return body;
  }

  // `{% name %}` that ends a body; the body left it behind its '{%'.
  void EndTag(std::string_view name) {
    if (Current().kind == Token::Kind::kBlockBegin && Ahead().IsName(name)) {
      Next();
      Next();
      ExpectBlockEnd();
    } else {
      Fail(absl::StrCat("missing '{% ", std::string(name), " %}'"));
    }
  }

  void ParseBlock(Stmt& stmt) {
    const std::string tag = ExpectName();
    if (tag == "if") return ParseIf(stmt);
    if (tag == "for") return ParseFor(stmt);
    if (tag == "set") return ParseSet(stmt);
    if (tag == "macro") return ParseMacro(stmt);
    if (tag == "call") return ParseCallBlock(stmt);
    if (tag == "with") return ParseWith(stmt);
    if (tag == "filter") return ParseFilterBlock(stmt);
    if (tag == "generation") {
      ExpectBlockEnd();
      stmt.kind = Stmt::Kind::kScope;
      stmt.body = ParseBody({"endgeneration"});
      return EndTag("endgeneration");
    }
    if (tag == "break" || tag == "continue") {
      if (loops_ == 0) Fail(absl::StrCat("'", tag, "' outside a loop"));
      stmt.kind = tag == "break" ? Stmt::Kind::kBreak : Stmt::Kind::kContinue;
      return ExpectBlockEnd();
    }
    Fail(absl::StrCat("tag '", tag, "' is not known here"));
  }

  // Behind "if" or "elif", up to and with endif.
  void ParseIf(Stmt& stmt) {
    Nested nested(*this);
    stmt.kind = Stmt::Kind::kIf;
    stmt.expr = ParseTuple(/*with_if=*/false);
    ExpectBlockEnd();
    stmt.body = ParseBody({"elif", "else", "endif"});
    if (Current().kind == Token::Kind::kBlockBegin && Ahead().IsName("elif")) {
      // A chain of elif is flat to a reader; it must not run into the nesting limit.
      --depth_;
      Next();
      Next();
      Stmt& other = stmt.otherwise.emplace_back();
      other.line = line();
      if (++elifs_ > kMaxElifs) Fail("too many elif in a template");
      ParseIf(other);
      ++depth_;
      return;
    }
    if (Current().kind == Token::Kind::kBlockBegin && Ahead().IsName("else")) {
      EndTag("else");
      stmt.otherwise = ParseBody({"endif"});
    }
    EndTag("endif");
  }

  void ParseFor(Stmt& stmt) {
    stmt.kind = Stmt::Kind::kFor;
    stmt.target = ParseTarget(/*with_attribute=*/false);
    if (!SkipName("in")) Unexpected("'in'");
    stmt.expr = ParseTuple(/*with_if=*/false);
    if (SkipName("if")) stmt.condition = ParseExpression();
    stmt.recursive = SkipName("recursive");
    ExpectBlockEnd();
    ++loops_;
    const size_t begin = at_;
    stmt.body = ParseBody({"else", "endfor"});
    for (size_t i = begin; i < at_; ++i) stmt.uses_loop |= tokens_[i].IsName("loop");
    --loops_;
    if (Current().kind == Token::Kind::kBlockBegin && Ahead().IsName("else")) {
      EndTag("else");
      stmt.otherwise = ParseBody({"endfor"});
    }
    EndTag("endfor");
  }

  Target ParseOneTarget(bool with_attribute) {
    Nested nested(*this);
    Target target;
    if (SkipOperator("(")) {
      target = ParseTarget(false);
      ExpectOperator(")");
      return target;
    }
    target.name = ExpectName();
    if (with_attribute && SkipOperator(".")) target.attribute = ExpectName();
    return target;
  }

  Target ParseTarget(bool with_attribute) {
    Target first = ParseOneTarget(with_attribute);
    if (!Current().IsOperator(",")) return first;
    Target tuple;
    tuple.parts.push_back(std::move(first));
    while (SkipOperator(",")) {
      if (Current().kind != Token::Kind::kName && !Current().IsOperator("(")) break;
      if (Current().IsName("in")) break;
      tuple.parts.push_back(ParseOneTarget(with_attribute));
    }
    return tuple;
  }

  void ParseSet(Stmt& stmt) {
    stmt.target = ParseTarget(/*with_attribute=*/true);
    if (SkipOperator("=")) {
      stmt.kind = Stmt::Kind::kSet;
      stmt.expr = ParseTuple(/*with_if=*/true);
      return ExpectBlockEnd();
    }
    stmt.kind = Stmt::Kind::kSetBlock;
    if (Current().IsOperator("|")) stmt.expr = ParseFilters(nullptr);
    ExpectBlockEnd();
    stmt.body = ParseBody({"endset"});
    EndTag("endset");
  }

  std::vector<Parameter> ParseParameters() {
    std::vector<Parameter> parameters;
    ExpectOperator("(");
    while (!failed() && !Current().IsOperator(")")) {
      if (!parameters.empty()) ExpectOperator(",");
      if (Current().IsOperator(")")) break;
      Parameter& parameter = parameters.emplace_back();
      parameter.name = ExpectName();
      if (SkipOperator("=")) {
        parameter.fallback = ParseExpression();
      } else if (parameters.size() > 1 && parameters[parameters.size() - 2].fallback != nullptr) {
        Fail("a parameter without a default behind one with a default");
      }
    }
    ExpectOperator(")");
    return parameters;
  }

  // The body of a macro up to its end tag. What it names decides which extra arguments it takes.
  std::shared_ptr<const Macro> MacroBody(std::string name, std::vector<Parameter> parameters,
                                         std::string_view end) {
    ExpectBlockEnd();
    auto macro = std::make_shared<Macro>();
    macro->name = std::move(name);
    macro->parameters = std::move(parameters);
    const int loops = std::exchange(loops_, 0);
    const size_t begin = at_;
    macro->body = ParseBody({end});
    loops_ = loops;
    for (size_t i = begin; i < at_; ++i) {
      macro->uses_varargs |= tokens_[i].IsName("varargs");
      macro->uses_kwargs |= tokens_[i].IsName("kwargs");
      macro->uses_caller |= tokens_[i].IsName("caller");
    }
    EndTag(end);
    return macro;
  }

  void ParseMacro(Stmt& stmt) {
    stmt.kind = Stmt::Kind::kMacro;
    std::string name = ExpectName();
    auto parameters = ParseParameters();
    stmt.macro = MacroBody(std::move(name), std::move(parameters), "endmacro");
  }

  void ParseCallBlock(Stmt& stmt) {
    stmt.kind = Stmt::Kind::kCall;
    std::vector<Parameter> parameters;
    if (Current().IsOperator("(")) parameters = ParseParameters();
    stmt.expr = ParseExpression();
    if (!failed() && stmt.expr->kind != Expr::Kind::kCall) Fail("'call' needs a call");
    stmt.macro = MacroBody("caller", std::move(parameters), "endcall");
  }

  void ParseWith(Stmt& stmt) {
    stmt.kind = Stmt::Kind::kWith;
    while (!failed() && Current().kind != Token::Kind::kBlockEnd) {
      if (!stmt.assignments.empty()) ExpectOperator(",");
      Target target = ParseOneTarget(false);
      ExpectOperator("=");
      stmt.assignments.emplace_back(std::move(target), ParseExpression());
    }
    ExpectBlockEnd();
    stmt.body = ParseBody({"endwith"});
    EndTag("endwith");
  }

  void ParseFilterBlock(Stmt& stmt) {
    stmt.kind = Stmt::Kind::kFilter;
    stmt.expr = ParseFilters(ParseFilter(nullptr));
    ExpectBlockEnd();
    stmt.body = ParseBody({"endfilter"});
    EndTag("endfilter");
  }

  // --- expressions, from the loosest binding to the tightest

  ExprPtr ParseTuple(bool with_if) {
    const int at = line();
    ExprPtr first = with_if ? ParseExpression() : ParseOr();
    if (!Current().IsOperator(",")) return first;
    auto tuple = Make(Expr::Kind::kTuple, at, std::move(first));
    while (SkipOperator(",")) {
      const Token& next = Current();
      if (next.kind == Token::Kind::kPrintEnd || next.kind == Token::Kind::kBlockEnd ||
          next.IsOperator(")") || next.kind == Token::Kind::kEnd) {
        break;
      }
      Add(*tuple, with_if ? ParseExpression() : ParseOr());
    }
    return tuple;
  }

  ExprPtr ParseExpression() {
    Nested nested(*this);
    const int at = line();
    ExprPtr expr = ParseOr();
    while (SkipName("if")) {
      auto choice = Make(Expr::Kind::kIf, at, std::move(expr));
      Add(*choice, ParseOr());
      Add(*choice, SkipName("else") ? ParseExpression() : nullptr);
      expr = std::move(choice);
    }
    return expr;
  }

  ExprPtr ParseOr() {
    Nested nested(*this);
    ExprPtr left = ParseAnd();
    while (!failed() && Current().IsName("or")) {
      auto expr = Make(Expr::Kind::kOr, Next().line, std::move(left));
      Add(*expr, ParseAnd());
      left = std::move(expr);
    }
    return left;
  }

  ExprPtr ParseAnd() {
    ExprPtr left = ParseNot();
    while (!failed() && Current().IsName("and")) {
      auto expr = Make(Expr::Kind::kAnd, Next().line, std::move(left));
      Add(*expr, ParseNot());
      left = std::move(expr);
    }
    return left;
  }

  ExprPtr ParseNot() {
    if (!Current().IsName("not")) return ParseCompare();
    Nested nested(*this);
    const int at = Next().line;
    return Make(Expr::Kind::kNot, at, ParseNot());
  }

  std::string TakeComparison() {
    static constexpr std::string_view kOps[] = {"==", "!=", "<", "<=", ">", ">="};
    for (const std::string_view op : kOps) {
      if (SkipOperator(op)) return std::string(op);
    }
    if (SkipName("in")) return "in";
    if (Current().IsName("not") && Ahead().IsName("in")) {
      Next();
      Next();
      return "not in";
    }
    return {};
  }

  ExprPtr ParseCompare() {
    const int at = line();
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
  ExprPtr ParseBinary(std::initializer_list<std::string_view> ops, const Operand& operand) {
    ExprPtr left = operand();
    while (!failed()) {
      std::string_view found;
      for (const std::string_view op : ops) {
        if (Current().IsOperator(op)) found = op;
      }
      if (found.empty()) break;
      auto expr = Make(Expr::Kind::kBinary, Next().line, std::move(left));
      expr->name = found;
      Add(*expr, operand());
      left = std::move(expr);
    }
    return left;
  }

  ExprPtr ParseSum() {
    return ParseBinary({"+", "-"}, [this] { return ParseConcat(); });
  }

  ExprPtr ParseConcat() {
    const int at = line();
    ExprPtr first = ParseProduct();
    if (!Current().IsOperator("~")) return first;
    auto expr = Make(Expr::Kind::kConcat, at, std::move(first));
    while (SkipOperator("~")) Add(*expr, ParseProduct());
    return expr;
  }

  ExprPtr ParseProduct() {
    return ParseBinary({"*", "/", "//", "%"}, [this] {
      return ParseBinary({"**"}, [this] { return ParseUnary(/*with_filters=*/true); });
    });
  }

  ExprPtr ParseUnary(bool with_filters) {
    Nested nested(*this);
    ExprPtr expr;
    const int at = line();
    if (SkipOperator("-")) {
      expr = Make(Expr::Kind::kNegate, at, ParseUnary(false));
    } else if (SkipOperator("+")) {
      expr = Make(Expr::Kind::kPlus, at, ParseUnary(false));
    } else {
      expr = ParsePrimary();
    }
    expr = ParsePostfix(std::move(expr));
    return with_filters ? ParseFilters(std::move(expr)) : std::move(expr);
  }

  ExprPtr ParsePrimary() {
    const Token token = Next();
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
        while (Current().kind == Token::Kind::kString) text += Next().text;
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
    Fail(absl::StrCat("found ", Describe(token), "; expected a value"));
    return Constant(None{}, token.line);
  }

  ExprPtr ParseInteger(const Token& token) {
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
      Fail(absl::StrCat("'", token.text, "' is not a 64-bit integer"));
    }
    return Constant(value, token.line);
  }

  ExprPtr ParseParentheses(int at) {
    if (SkipOperator(")")) return Make(Expr::Kind::kTuple, at);
    ExprPtr expr = ParseTuple(/*with_if=*/true);
    ExpectOperator(")");
    return expr;
  }

  ExprPtr ParseList(int at) {
    auto list = Make(Expr::Kind::kList, at);
    while (!failed() && !Current().IsOperator("]")) {
      if (!list->items.empty()) ExpectOperator(",");
      if (Current().IsOperator("]")) break;
      Add(*list, ParseExpression());
    }
    ExpectOperator("]");
    return list;
  }

  ExprPtr ParseDict(int at) {
    auto dict = Make(Expr::Kind::kDict, at);
    while (!failed() && !Current().IsOperator("}")) {
      if (!dict->items.empty()) ExpectOperator(",");
      if (Current().IsOperator("}")) break;
      Add(*dict, ParseExpression());
      ExpectOperator(":");
      Add(*dict, ParseExpression());
    }
    ExpectOperator("}");
    return dict;
  }

  ExprPtr ParsePostfix(ExprPtr expr) {
    while (true) {
      if (Current().IsOperator(".")) {
        expr = ParseAttribute(std::move(expr));
      } else if (Current().IsOperator("[")) {
        expr = ParseSubscript(std::move(expr));
      } else if (Current().IsOperator("(")) {
        expr = ParseCall(std::move(expr));
      } else {
        return expr;
      }
    }
  }

  ExprPtr ParseAttribute(ExprPtr object) {
    const int at = Next().line;
    if (Current().kind == Token::Kind::kInteger) {
      auto expr = Make(Expr::Kind::kSubscript, at, std::move(object));
      Add(*expr, ParseInteger(Next()));
      return expr;
    }
    auto expr = Make(Expr::Kind::kAttribute, at, std::move(object));
    expr->name = ExpectName();
    return expr;
  }

  ExprPtr ParseSubscript(ExprPtr object) {
    auto expr = Make(Expr::Kind::kSubscript, Next().line, std::move(object));
    Add(*expr, ParseIndex());
    ExpectOperator("]");
    return expr;
  }

  ExprPtr ParseIndex() {
    const int at = line();
    ExprPtr first = Current().IsOperator(":") ? nullptr : ParseExpression();
    if (!Current().IsOperator(":")) return first;
    auto slice = Make(Expr::Kind::kSlice, at, std::move(first));
    while (slice->items.size() < 3 && SkipOperator(":")) {
      const bool given = !Current().IsOperator(":") && !Current().IsOperator("]");
      Add(*slice, given ? ParseExpression() : nullptr);
    }
    slice->items.resize(3);
    return slice;
  }

  ExprPtr ParseCall(ExprPtr callee) {
    auto expr = Make(Expr::Kind::kCall, line(), std::move(callee));
    SetArguments(*expr);
    return expr;
  }

  void SetArguments(Expr& expr) {
    expr.arguments = ParseArguments();
    for (const ExprPtr& argument : expr.arguments.positional) NoteChild(expr, argument);
    for (const auto& [name, argument] : expr.arguments.keyword) NoteChild(expr, argument);
    NoteChild(expr, expr.arguments.star);
    NoteChild(expr, expr.arguments.double_star);
  }

  CallArguments ParseArguments() {
    CallArguments arguments;
    ExpectOperator("(");
    for (bool first = true; !failed() && !Current().IsOperator(")"); first = false) {
      if (!first) ExpectOperator(",");
      if (Current().IsOperator(")")) break;
      if (SkipOperator("**")) {
        if (arguments.double_star != nullptr) Fail("a second '**' argument");
        arguments.double_star = ParseExpression();
      } else if (SkipOperator("*")) {
        if (arguments.star != nullptr) Fail("a second '*' argument");
        arguments.star = ParseExpression();
      } else if (Current().kind == Token::Kind::kName && Ahead().IsOperator("=")) {
        std::string name = Next().text;
        Next();
        arguments.keyword.emplace_back(std::move(name), ParseExpression());
      } else {
        if (!arguments.keyword.empty()) Fail("a positional argument behind a named one");
        arguments.positional.push_back(ParseExpression());
      }
    }
    ExpectOperator(")");
    return arguments;
  }

  ExprPtr ParseFilters(ExprPtr expr) {
    while (true) {
      if (SkipOperator("|")) {
        expr = ParseFilter(std::move(expr));
      } else if (expr != nullptr && Current().IsName("is")) {
        expr = ParseTest(std::move(expr));
      } else if (expr != nullptr && Current().IsOperator("(")) {
        expr = ParseCall(std::move(expr));
      } else {
        return expr;
      }
    }
  }

  // Behind the '|'.
  ExprPtr ParseFilter(ExprPtr operand) {
    auto expr = Make(Expr::Kind::kFilter, line(), std::move(operand));
    expr->name = ExpectName();
    if (Current().IsOperator("(")) SetArguments(*expr);
    return expr;
  }

  // At "is".
  ExprPtr ParseTest(ExprPtr operand) {
    const int at = Next().line;
    const bool negated = SkipName("not");
    auto test = Make(Expr::Kind::kTest, at, std::move(operand));
    test->name = ExpectName();
    const Token& next = Current();
    const bool one_argument =
        next.kind == Token::Kind::kString || next.kind == Token::Kind::kInteger ||
        next.kind == Token::Kind::kFloat || next.IsOperator("[") || next.IsOperator("{") ||
        (next.kind == Token::Kind::kName && !next.IsName("else") && !next.IsName("or") &&
         !next.IsName("and") && !next.IsName("if") && !next.IsName("is"));
    if (next.IsOperator("(")) {
      SetArguments(*test);
    } else if (next.IsName("is")) {
      Fail("tests cannot be chained with 'is'");
    } else if (one_argument) {
      test->arguments.positional.push_back(ParsePostfix(ParsePrimary()));
      NoteChild(*test, test->arguments.positional.back());
    }
    return negated ? Make(Expr::Kind::kNot, at, std::move(test)) : std::move(test);
  }

  const std::vector<Token> tokens_;
  size_t at_ = 0;
  int depth_ = 0;
  int loops_ = 0;  // open loops of this macro
  int elifs_ = 0;
  absl::Status status_;
};

}  // namespace

absl::StatusOr<Body> ParseTemplate(std::string_view source) {
  auto tokens = Tokenize(source);
  if (!tokens.ok()) return tokens.status();
  return Parser(*std::move(tokens)).Run();
}

}  // namespace shoal::jinja
