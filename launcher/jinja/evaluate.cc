// Expressions.
#include "absl/strings/str_cat.h"
#include "launcher/jinja/filters.h"
#include "launcher/jinja/interpreter.h"
#include "launcher/jinja/operators.h"

namespace shoal::jinja {

Value Interpreter::Eval(const Expr& expr) {
  if (!rt_.Step()) return {};
  DepthGuard guard(rt_);
  if (rt_.failed()) return {};
  rt_.line = expr.line;
  switch (expr.kind) {
    case Expr::Kind::kConstant:
      return expr.value;
    case Expr::Kind::kName:
      return EvalName(expr);
    case Expr::Kind::kList:
    case Expr::Kind::kTuple:
      return EvalSequence(expr);
    case Expr::Kind::kDict:
      return EvalDict(expr);
    case Expr::Kind::kAttribute: {
      const Value object = Eval(*expr.items[0]);
      return rt_.failed() ? Value() : GetAttribute(rt_, object, expr.name);
    }
    case Expr::Kind::kSubscript:
      return EvalSubscript(expr);
    case Expr::Kind::kSlice:
      return rt_.Fail("a slice stands alone");
    case Expr::Kind::kCall:
      return EvalCall(expr, nullptr);
    case Expr::Kind::kFilter:
      return EvalFilters(expr, {});
    case Expr::Kind::kTest: {
      const Value value = Eval(*expr.items[0]);
      const Arguments arguments = EvalArguments(expr.arguments);
      return rt_.failed() ? Value() : Value(ApplyTest(rt_, expr.name, value, arguments));
    }
    case Expr::Kind::kNot:
      return !Truth(Eval(*expr.items[0]));
    case Expr::Kind::kNegate:
      return Negate(rt_, Eval(*expr.items[0]));
    case Expr::Kind::kPlus: {
      const Value value = Eval(*expr.items[0]);
      return value.is_number() ? value : rt_.Fail("'+' works on numbers");
    }
    case Expr::Kind::kAnd: {
      Value left = Eval(*expr.items[0]);
      return Truth(left) ? Eval(*expr.items[1]) : left;
    }
    case Expr::Kind::kOr: {
      Value left = Eval(*expr.items[0]);
      return Truth(left) ? left : Eval(*expr.items[1]);
    }
    case Expr::Kind::kBinary: {
      const Value left = Eval(*expr.items[0]), right = Eval(*expr.items[1]);
      rt_.line = expr.line;
      return rt_.failed() ? Value() : BinaryOperator(rt_, expr.name, left, right);
    }
    case Expr::Kind::kConcat:
      return EvalConcat(expr);
    case Expr::Kind::kCompare:
      return EvalCompare(expr);
    case Expr::Kind::kIf:
      if (Truth(Eval(*expr.items[1]))) return Eval(*expr.items[0]);
      return EvalOr(expr.items[2], rt_.Missing("the inline if has no else and its test failed"));
  }
  return {};
}

Value Interpreter::EvalName(const Expr& expr) {
  for (const Scope* scope = scope_.get(); scope != nullptr; scope = scope->parent.get()) {
    const auto found = scope->variables.find(expr.name);
    if (found != scope->variables.end()) return found->second;
  }
  const auto found = globals_.find(expr.name);
  if (found != globals_.end()) return found->second;
  return rt_.Missing(absl::StrCat("'", expr.name, "' is undefined"));
}

Value Interpreter::EvalSequence(const Expr& expr) {
  std::vector<Value> items;
  for (const ExprPtr& item : expr.items) items.push_back(Eval(*item));
  return rt_.failed() ? Value() : rt_.NewList(std::move(items), expr.kind == Expr::Kind::kTuple);
}

Value Interpreter::EvalDict(const Expr& expr) {
  Dict* dict = rt_.NewDict();
  for (size_t i = 0; i + 1 < expr.items.size(); i += 2) {
    const Value key = Eval(*expr.items[i]);
    Value value = Eval(*expr.items[i + 1]);
    if (rt_.failed()) return {};
    rt_.SetItem(*dict, key, std::move(value));
  }
  return dict;
}

Value Interpreter::EvalSubscript(const Expr& expr) {
  const Value object = Eval(*expr.items[0]);
  const Expr& index = *expr.items[1];
  if (index.kind != Expr::Kind::kSlice) {
    const Value key = Eval(index);
    rt_.line = expr.line;
    return rt_.failed() ? Value() : GetItem(rt_, object, key);
  }
  const Value from = EvalOr(index.items[0], None{});
  const Value to = EvalOr(index.items[1], None{});
  const Value step = EvalOr(index.items[2], None{});
  return rt_.failed() ? Value() : GetSlice(rt_, object, from, to, step);
}

Value Interpreter::EvalCompare(const Expr& expr) {
  Value left = Eval(*expr.items[0]);
  for (size_t i = 0; i < expr.ops.size(); ++i) {
    Value right = Eval(*expr.items[i + 1]);
    rt_.line = expr.line;
    if (!CompareOperator(rt_, expr.ops[i], left, right))
      return rt_.failed() ? Value() : Value(false);
    left = std::move(right);
  }
  return true;
}

Value Interpreter::EvalConcat(const Expr& expr) {
  std::string out;
  for (const ExprPtr& item : expr.items) {
    out += rt_.Text(Eval(*item));
    if (rt_.failed() || !rt_.AllowString(out.size())) return {};
  }
  return out;
}

Arguments Interpreter::EvalArguments(const CallArguments& arguments) {
  Arguments out;
  for (const ExprPtr& expr : arguments.positional) out.positional.push_back(Eval(*expr));
  for (const auto& [name, expr] : arguments.keyword) out.keyword.emplace_back(name, Eval(*expr));
  if (arguments.star != nullptr) {
    std::vector<Value> items;
    if (rt_.Items(Eval(*arguments.star), &items)) {
      out.positional.insert(out.positional.end(), items.begin(), items.end());
    }
  }
  if (arguments.double_star != nullptr) {
    const Value more = Eval(*arguments.double_star);
    if (more.is_dict()) {
      for (const auto& [key, value] : more.dict().items) out.keyword.emplace_back(Str(key), value);
    } else {
      rt_.Fail(absl::StrCat("'**' takes a dict, not a ", TypeName(more)));
    }
  }
  return out;
}

Value Interpreter::EvalCall(const Expr& expr, const Value* caller) {
  const Value callee = Eval(*expr.items[0]);
  Arguments arguments = EvalArguments(expr.arguments);
  if (rt_.failed()) return {};
  if (caller != nullptr) arguments.keyword.emplace_back("caller", *caller);
  rt_.line = expr.line;
  return Call(rt_, callee, arguments);
}

// A filter without an operand of its own begins the chain of a filter or set block.
Value Interpreter::EvalFilters(const Expr& expr, const Value& input) {
  Value operand = input;
  if (expr.items[0] != nullptr) {
    // Of such a chain, only filters lie between here and its beginning.
    const Expr* first = expr.items[0].get();
    while (first->kind == Expr::Kind::kFilter && first->items[0] != nullptr) {
      first = first->items[0].get();
    }
    const bool in_block = first->kind == Expr::Kind::kFilter;
    operand = in_block ? EvalFilters(*expr.items[0], input) : Eval(*expr.items[0]);
  }
  const Arguments arguments = EvalArguments(expr.arguments);
  rt_.line = expr.line;
  return rt_.failed() ? Value() : ApplyFilter(rt_, expr.name, operand, arguments);
}

}  // namespace shoal::jinja
