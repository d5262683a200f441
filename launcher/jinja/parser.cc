#include "launcher/jinja/parser.h"

#include <initializer_list>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "launcher/jinja/expression_parser.h"
#include "launcher/jinja/lexer.h"
#include "launcher/jinja/token_cursor.h"

namespace shoal::jinja {
namespace {

constexpr int kMaxElifs = 500;

// Text, `{{ }}` and the tags. Errors stay in the cursor until Run() returns them.
class StatementParser {
 public:
  explicit StatementParser(std::vector<Token> tokens) : in_(std::move(tokens)) {}

  absl::StatusOr<Body> Run() {
    Body body = ParseBody({});
    if (!in_.failed() && in_.Current().kind != Token::Kind::kEnd) in_.Fail("unexpected end tag");
    if (in_.failed()) return in_.status();
    return body;
  }

 private:
  // Until a block that begins with one of `ends` (left unread behind its '{%'), or the end.
  Body ParseBody(std::initializer_list<std::string_view> ends) {
    Nested nested(in_);
    Body body;
    while (!in_.failed() && in_.Current().kind != Token::Kind::kEnd) {
      Stmt stmt;
      stmt.line = in_.line();
      if (in_.Current().kind == Token::Kind::kData) {
        stmt.kind = Stmt::Kind::kData;
        stmt.text = in_.Next().text;
      } else if (in_.Current().kind == Token::Kind::kPrintBegin) {
        in_.Next();
        stmt.kind = Stmt::Kind::kPrint;
        stmt.expr = expressions_.ParseTuple(/*with_if=*/true);
        in_.Expect(Token::Kind::kPrintEnd);
      } else if (in_.Current().kind == Token::Kind::kBlockBegin) {
        for (const std::string_view end : ends) {
          if (in_.Ahead().IsName(end)) return body;
        }
        in_.Next();
        ParseBlock(stmt);
      } else {
        in_.Unexpected("text or a tag");
      }
      body.push_back(std::move(stmt));
    }
    return body;
  }

  bool AtTag(std::string_view name) const {
    return in_.Current().kind == Token::Kind::kBlockBegin && in_.Ahead().IsName(name);
  }

  // `{% name %}` that ends a body; the body left it behind its '{%'.
  void EndTag(std::string_view name) {
    if (AtTag(name)) {
      in_.Next();
      in_.Next();
      in_.Expect(Token::Kind::kBlockEnd);
    } else {
      in_.Fail(absl::StrCat("missing '{% ", std::string(name), " %}'"));
    }
  }

  void ParseBlock(Stmt& stmt) {
    const std::string tag = in_.ExpectName();
    if (tag == "if") return ParseIf(stmt);
    if (tag == "for") return ParseFor(stmt);
    if (tag == "set") return ParseSet(stmt);
    if (tag == "macro") return ParseMacro(stmt);
    if (tag == "call") return ParseCallBlock(stmt);
    if (tag == "with") return ParseWith(stmt);
    if (tag == "filter") return ParseFilterBlock(stmt);
    if (tag == "generation") {
      in_.Expect(Token::Kind::kBlockEnd);
      stmt.kind = Stmt::Kind::kScope;
      stmt.body = ParseBody({"endgeneration"});
      return EndTag("endgeneration");
    }
    if (tag == "break" || tag == "continue") {
      if (loops_ == 0) in_.Fail(absl::StrCat("'", tag, "' outside a loop"));
      stmt.kind = tag == "break" ? Stmt::Kind::kBreak : Stmt::Kind::kContinue;
      return in_.Expect(Token::Kind::kBlockEnd);
    }
    in_.Fail(absl::StrCat("tag '", tag, "' is not known here"));
  }

  // Behind "if", up to and with endif.
  void ParseIf(Stmt& stmt) {
    Nested nested(in_);
    // A chain of elif is flat to a reader: a loop, so that it does not run into the nesting limit.
    Stmt* branch = &stmt;
    while (true) {
      branch->kind = Stmt::Kind::kIf;
      branch->expr = expressions_.ParseTuple(/*with_if=*/false);
      in_.Expect(Token::Kind::kBlockEnd);
      branch->body = ParseBody({"elif", "else", "endif"});
      if (!AtTag("elif")) break;
      in_.Next();
      in_.Next();
      if (++elifs_ > kMaxElifs) in_.Fail("too many elif in a template");
      branch = &branch->otherwise.emplace_back();
      branch->line = in_.line();
    }
    if (AtTag("else")) {
      EndTag("else");
      branch->otherwise = ParseBody({"endif"});
    }
    EndTag("endif");
  }

  void ParseFor(Stmt& stmt) {
    stmt.kind = Stmt::Kind::kFor;
    stmt.target = ParseTarget(/*with_attribute=*/false);
    if (!in_.SkipName("in")) in_.Unexpected("'in'");
    stmt.expr = expressions_.ParseTuple(/*with_if=*/false);
    if (in_.SkipName("if")) stmt.condition = expressions_.ParseExpression();
    stmt.recursive = in_.SkipName("recursive");
    in_.Expect(Token::Kind::kBlockEnd);
    ++loops_;
    const size_t begin = in_.position();
    stmt.body = ParseBody({"else", "endfor"});
    stmt.uses_loop = in_.NamedSince(begin, "loop");
    --loops_;
    if (AtTag("else")) {
      EndTag("else");
      stmt.otherwise = ParseBody({"endfor"});
    }
    EndTag("endfor");
  }

  Target ParseOneTarget(bool with_attribute) {
    Nested nested(in_);
    Target target;
    if (in_.SkipOperator("(")) {
      target = ParseTarget(false);
      in_.ExpectOperator(")");
      return target;
    }
    target.name = in_.ExpectName();
    if (with_attribute && in_.SkipOperator(".")) target.attribute = in_.ExpectName();
    return target;
  }

  Target ParseTarget(bool with_attribute) {
    Target first = ParseOneTarget(with_attribute);
    if (!in_.Current().IsOperator(",")) return first;
    Target tuple;
    tuple.parts.push_back(std::move(first));
    while (in_.SkipOperator(",")) {
      if (in_.Current().kind != Token::Kind::kName && !in_.Current().IsOperator("(")) break;
      if (in_.Current().IsName("in")) break;
      tuple.parts.push_back(ParseOneTarget(with_attribute));
    }
    return tuple;
  }

  void ParseSet(Stmt& stmt) {
    stmt.target = ParseTarget(/*with_attribute=*/true);
    if (in_.SkipOperator("=")) {
      stmt.kind = Stmt::Kind::kSet;
      stmt.expr = expressions_.ParseTuple(/*with_if=*/true);
      return in_.Expect(Token::Kind::kBlockEnd);
    }
    stmt.kind = Stmt::Kind::kSetBlock;
    if (in_.Current().IsOperator("|")) stmt.expr = expressions_.ParseFilters(nullptr);
    in_.Expect(Token::Kind::kBlockEnd);
    stmt.body = ParseBody({"endset"});
    EndTag("endset");
  }

  std::vector<Parameter> ParseParameters() {
    std::vector<Parameter> parameters;
    in_.ExpectOperator("(");
    while (!in_.failed() && !in_.Current().IsOperator(")")) {
      if (!parameters.empty()) in_.ExpectOperator(",");
      if (in_.Current().IsOperator(")")) break;
      Parameter& parameter = parameters.emplace_back();
      parameter.name = in_.ExpectName();
      if (in_.SkipOperator("=")) {
        parameter.fallback = expressions_.ParseExpression();
      } else if (parameters.size() > 1 && parameters[parameters.size() - 2].fallback != nullptr) {
        in_.Fail("a parameter without a default behind one with a default");
      }
    }
    in_.ExpectOperator(")");
    return parameters;
  }

  // The body of a macro up to its end tag. What it names decides which extra arguments it takes.
  std::shared_ptr<const Macro> MacroBody(std::string name, std::vector<Parameter> parameters,
                                         std::string_view end) {
    in_.Expect(Token::Kind::kBlockEnd);
    auto macro = std::make_shared<Macro>();
    macro->name = std::move(name);
    macro->parameters = std::move(parameters);
    const int loops = std::exchange(loops_, 0);
    const size_t begin = in_.position();
    macro->body = ParseBody({end});
    loops_ = loops;
    macro->uses_varargs = in_.NamedSince(begin, "varargs");
    macro->uses_kwargs = in_.NamedSince(begin, "kwargs");
    macro->uses_caller = in_.NamedSince(begin, "caller");
    EndTag(end);
    return macro;
  }

  void ParseMacro(Stmt& stmt) {
    stmt.kind = Stmt::Kind::kMacro;
    std::string name = in_.ExpectName();
    auto parameters = ParseParameters();
    stmt.macro = MacroBody(std::move(name), std::move(parameters), "endmacro");
  }

  void ParseCallBlock(Stmt& stmt) {
    stmt.kind = Stmt::Kind::kCall;
    std::vector<Parameter> parameters;
    if (in_.Current().IsOperator("(")) parameters = ParseParameters();
    stmt.expr = expressions_.ParseExpression();
    if (!in_.failed() && stmt.expr->kind != Expr::Kind::kCall) in_.Fail("'call' needs a call");
    stmt.macro = MacroBody("caller", std::move(parameters), "endcall");
  }

  void ParseWith(Stmt& stmt) {
    stmt.kind = Stmt::Kind::kWith;
    while (!in_.failed() && in_.Current().kind != Token::Kind::kBlockEnd) {
      if (!stmt.assignments.empty()) in_.ExpectOperator(",");
      Target target = ParseOneTarget(false);
      in_.ExpectOperator("=");
      stmt.assignments.emplace_back(std::move(target), expressions_.ParseExpression());
    }
    in_.Expect(Token::Kind::kBlockEnd);
    stmt.body = ParseBody({"endwith"});
    EndTag("endwith");
  }

  void ParseFilterBlock(Stmt& stmt) {
    stmt.kind = Stmt::Kind::kFilter;
    stmt.expr = expressions_.ParseFilters(expressions_.ParseFilter(nullptr));
    in_.Expect(Token::Kind::kBlockEnd);
    stmt.body = ParseBody({"endfilter"});
    EndTag("endfilter");
  }

  TokenCursor in_;
  ExpressionParser expressions_{in_};
  int loops_ = 0;  // open loops of this macro
  int elifs_ = 0;
};

}  // namespace

absl::StatusOr<Body> ParseTemplate(std::string_view source) {
  auto tokens = Tokenize(source);
  if (!tokens.ok()) return tokens.status();
  return StatementParser(*std::move(tokens)).Run();
}

}  // namespace shoal::jinja
