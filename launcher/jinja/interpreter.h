// Walks a template's syntax tree and writes its text.
#pragma once

#include <ctime>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "launcher/jinja/ast.h"
#include "launcher/jinja/runtime.h"
#include "launcher/jinja/value.h"

namespace shoal::jinja {

// Variables of a template, macro call, loop turn or with block. Reads go up to the parents, writes
// stay: what a loop sets is gone with its turn. Scopes are shared because a macro keeps the one it
// was defined in; Clear() when a scope ends, so that the two cannot keep each other alive.
struct Scope {
  explicit Scope(std::shared_ptr<Scope> parent) : parent(std::move(parent)) {}
  const std::shared_ptr<Scope> parent;
  absl::flat_hash_map<std::string, Value> variables;
};

// One rendering; one thread.
class Interpreter {
 public:
  // `now` is what strftime_now tells.
  Interpreter(Runtime& rt, std::time_t now);
  ~Interpreter();
  Interpreter(const Interpreter&) = delete;
  Interpreter& operator=(const Interpreter&) = delete;

  void SetVariable(const std::string& name, Value value);
  // The text, or the part that was made before an error (see Runtime::status).
  std::string Run(const Body& body);

  // For macros and recursive loops.
  Value CallMacro(const Macro& macro, const std::shared_ptr<Scope>& scope,
                  const Arguments& arguments);
  Value CallLoop(const Stmt& stmt, const std::shared_ptr<Scope>& scope, const Value& items,
                 int depth);

 private:
  enum class Flow { kNext, kBreak, kContinue };
  class NewScope;
  class Capture;

  Flow ExecBody(const Body& body);
  Flow Exec(const Stmt& stmt);
  Flow ExecIf(const Stmt& stmt);
  void ExecFor(const Stmt& stmt, const Value& items, int depth);
  void ExecSetBlock(const Stmt& stmt);
  Flow ExecWith(const Stmt& stmt);
  void ExecCallBlock(const Stmt& stmt);
  void ExecFilterBlock(const Stmt& stmt);
  void Write(std::string_view text);
  void Assign(const Target& target, const Value& value);

  Value Eval(const Expr& expr);
  Value EvalOr(const ExprPtr& expr, Value fallback) {
    return expr == nullptr ? std::move(fallback) : Eval(*expr);
  }
  Value EvalName(const Expr& expr);
  Value EvalSequence(const Expr& expr);
  Value EvalDict(const Expr& expr);
  Value EvalSubscript(const Expr& expr);
  Value EvalCompare(const Expr& expr);
  Value EvalConcat(const Expr& expr);
  Value EvalCall(const Expr& expr, const Value* caller);
  Value EvalFilters(const Expr& expr, const Value& input);  // a chain whose innermost item is null
  Arguments EvalArguments(const CallArguments& arguments);
  Value MakeMacro(std::shared_ptr<const Macro> macro);

  Runtime& rt_;
  absl::flat_hash_map<std::string, Value> globals_;
  std::shared_ptr<Scope> scope_;
  std::string output_;
  std::string* out_ = &output_;  // where text goes: the output, or what a block captures
};

// Functions that every template can call: range, dict, namespace, raise_exception, strftime_now and
// joiner.
absl::flat_hash_map<std::string, Value> Globals(std::time_t now);

}  // namespace shoal::jinja
