#include "launcher/jinja/interpreter.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "launcher/jinja/filters.h"
#include "launcher/jinja/loop.h"
#include "launcher/jinja/operators.h"

namespace shoal::jinja {
namespace {

class MacroObject : public Object {
 public:
  MacroObject(Interpreter& interpreter, std::shared_ptr<const Macro> macro,
              std::shared_ptr<Scope> scope)
      : interpreter_(interpreter), macro_(std::move(macro)), scope_(std::move(scope)) {}
  std::string_view kind() const override { return "macro"; }
  bool callable() const override { return true; }
  Value Call(Runtime&, const Arguments& arguments) const override {
    return interpreter_.CallMacro(*macro_, scope_, arguments);
  }
  Value GetAttribute(std::string_view name) const override {
    return name == "name" ? Value(macro_->name) : Value();
  }

 private:
  Interpreter& interpreter_;
  const std::shared_ptr<const Macro> macro_;
  const std::shared_ptr<Scope> scope_;
};

}  // namespace

// Puts a scope under `parent` in front for as long as it lives.
class Interpreter::NewScope {
 public:
  NewScope(Interpreter& in, const std::shared_ptr<Scope>& parent)
      : in_(in), before_(std::exchange(in.scope_, std::make_shared<Scope>(parent))) {}
  ~NewScope() {
    in_.scope_->variables.clear();
    in_.scope_ = std::move(before_);
  }
  NewScope(const NewScope&) = delete;
  NewScope& operator=(const NewScope&) = delete;

 private:
  Interpreter& in_;
  std::shared_ptr<Scope> before_;
};

// Collects what is written for as long as it lives.
class Interpreter::Capture {
 public:
  explicit Capture(Interpreter& in) : in_(in), before_(std::exchange(in.out_, &text_)) {}
  ~Capture() { in_.out_ = before_; }
  Capture(const Capture&) = delete;
  Capture& operator=(const Capture&) = delete;
  Value Take() { return in_.rt_.NewString(std::move(text_)); }

 private:
  Interpreter& in_;
  std::string* const before_;
  std::string text_;
};

Interpreter::Interpreter(Runtime& rt, std::time_t now)
    : rt_(rt), globals_(Globals(now)), scope_(std::make_shared<Scope>(nullptr)) {}

Interpreter::~Interpreter() { scope_->variables.clear(); }

void Interpreter::SetVariable(const std::string& name, Value value) {
  scope_->variables[name] = std::move(value);
}

std::string Interpreter::Run(const Body& body) {
  ExecBody(body);
  return std::move(output_);
}

void Interpreter::Write(std::string_view text) {
  if (out_->size() + text.size() > rt_.limits().output_bytes) {
    rt_.Fail(absl::StrCat("the output is longer than the limit of ", rt_.limits().output_bytes,
                          " bytes"));
  } else if (rt_.AllowString(text.size())) {
    out_->append(text);
  }
}

Interpreter::Flow Interpreter::ExecBody(const Body& body) {
  DepthGuard guard(rt_);
  for (const Stmt& stmt : body) {
    if (!rt_.Step()) return Flow::kBreak;
    if (const Flow flow = Exec(stmt); flow != Flow::kNext) return flow;
  }
  return Flow::kNext;
}

Interpreter::Flow Interpreter::Exec(const Stmt& stmt) {
  rt_.line = stmt.line;
  switch (stmt.kind) {
    case Stmt::Kind::kData:
      Write(stmt.text);
      break;
    case Stmt::Kind::kPrint: {
      const Value value = Eval(*stmt.expr);
      if (value.is_string()) {
        Write(value.str());
      } else {
        Write(rt_.Text(value));
      }
      break;
    }
    case Stmt::Kind::kIf:
      return ExecIf(stmt);
    case Stmt::Kind::kFor:
      ExecFor(stmt, Eval(*stmt.expr), 0);
      break;
    case Stmt::Kind::kSet:
      Assign(stmt.target, Eval(*stmt.expr));
      break;
    case Stmt::Kind::kSetBlock:
      ExecSetBlock(stmt);
      break;
    case Stmt::Kind::kWith:
      return ExecWith(stmt);
    case Stmt::Kind::kMacro:
      SetVariable(stmt.macro->name, MakeMacro(stmt.macro));
      break;
    case Stmt::Kind::kCall:
      ExecCallBlock(stmt);
      break;
    case Stmt::Kind::kFilter:
      ExecFilterBlock(stmt);
      break;
    case Stmt::Kind::kScope: {
      NewScope scope(*this, scope_);
      return ExecBody(stmt.body);
    }
    case Stmt::Kind::kBreak:
      return Flow::kBreak;
    case Stmt::Kind::kContinue:
      return Flow::kContinue;
  }
  return Flow::kNext;
}

// A chain of elif is walked here, not by recursion.
Interpreter::Flow Interpreter::ExecIf(const Stmt& stmt) {
  const Stmt* branch = &stmt;
  while (true) {
    const bool holds = Truth(Eval(*branch->expr));
    if (rt_.failed()) return Flow::kBreak;
    if (holds) return ExecBody(branch->body);
    const Body& otherwise = branch->otherwise;
    if (otherwise.size() != 1 || otherwise[0].kind != Stmt::Kind::kIf) return ExecBody(otherwise);
    branch = &otherwise[0];
    rt_.line = branch->line;
    if (!rt_.Step()) return Flow::kBreak;
  }
}

void Interpreter::ExecFor(const Stmt& stmt, const Value& sequence, int depth) {
  std::vector<Value> items;
  if (!rt_.Items(sequence, &items)) return;
  const auto wanted = [&](const Value& item) {
    if (stmt.condition == nullptr) return true;
    NewScope scope(*this, scope_);
    Assign(stmt.target, item);
    return Truth(Eval(*stmt.condition)) && !rt_.failed();
  };
  // `loop` knows how many turns there are, so then all items are asked before the first turn;
  // otherwise each when its turn comes, when the turns before may have changed the answer.
  if (stmt.uses_loop && stmt.condition != nullptr) {
    std::vector<Value> kept;
    for (const Value& item : items) {
      if (wanted(item)) kept.push_back(item);
      if (rt_.failed()) return;
    }
    items = std::move(kept);
  }
  bool any = false;  // As in Jinja, a turn that was left by break or continue does not count.
  const auto loop = std::make_shared<LoopObject>(*this, stmt, scope_, items, depth);
  for (size_t i = 0; i < items.size(); ++i) {
    if (!rt_.Step(4)) return;
    if (!stmt.uses_loop && !wanted(items[i])) continue;
    loop->MoveTo(i);
    NewScope scope(*this, scope_);
    Assign(stmt.target, items[i]);
    if (stmt.uses_loop) SetVariable("loop", ObjectPtr(loop));
    const Flow flow = ExecBody(stmt.body);
    if (flow == Flow::kBreak) break;
    any |= flow == Flow::kNext;
  }
  if (!any && !rt_.failed()) {
    NewScope scope(*this, scope_);
    ExecBody(stmt.otherwise);
  }
}

void Interpreter::ExecSetBlock(const Stmt& stmt) {
  Value value;
  {
    Capture capture(*this);
    NewScope scope(*this, scope_);
    ExecBody(stmt.body);
    value = capture.Take();
  }
  if (stmt.expr != nullptr) value = EvalFilters(*stmt.expr, value);
  if (!rt_.failed()) Assign(stmt.target, value);
}

Interpreter::Flow Interpreter::ExecWith(const Stmt& stmt) {
  std::vector<Value> values;  // all are evaluated outside the new scope
  for (const auto& [target, expr] : stmt.assignments) values.push_back(Eval(*expr));
  NewScope scope(*this, scope_);
  for (size_t i = 0; i < values.size(); ++i) Assign(stmt.assignments[i].first, values[i]);
  return ExecBody(stmt.body);
}

void Interpreter::ExecCallBlock(const Stmt& stmt) {
  const Value caller = MakeMacro(stmt.macro);
  const Value result = EvalCall(*stmt.expr, &caller);
  if (!rt_.failed()) Write(rt_.Text(result));
}

void Interpreter::ExecFilterBlock(const Stmt& stmt) {
  Value value;
  {
    Capture capture(*this);
    NewScope scope(*this, scope_);
    ExecBody(stmt.body);
    value = capture.Take();
  }
  const Value result = EvalFilters(*stmt.expr, value);
  if (!rt_.failed()) Write(rt_.Text(result));
}

void Interpreter::Assign(const Target& target, const Value& value) {
  if (rt_.failed()) return;
  if (!target.parts.empty()) {
    std::vector<Value> items;
    if (!rt_.Items(value, &items)) return;
    if (items.size() != target.parts.size()) {
      rt_.Fail(absl::StrCat("cannot unpack ", items.size(), " values into ", target.parts.size(),
                            " names"));
      return;
    }
    for (size_t i = 0; i < items.size(); ++i) Assign(target.parts[i], items[i]);
  } else if (target.attribute.empty()) {
    if (rt_.AllowValues(scope_->variables.contains(target.name) ? 0 : 1)) {
      SetVariable(target.name, value);
    }
  } else {
    Expr name;
    name.name = target.name;
    const Value object = EvalName(name);
    const bool set =
        object.is<ObjectPtr>() && object.object().SetAttribute(rt_, target.attribute, value);
    if (!set)
      rt_.Fail(absl::StrCat("cannot set '", target.name, ".", target.attribute, "': '", target.name,
                            "' is not a namespace"));
  }
}

Value Interpreter::MakeMacro(std::shared_ptr<const Macro> macro) {
  return ObjectPtr(std::make_shared<MacroObject>(*this, std::move(macro), scope_));
}

Value Interpreter::CallMacro(const Macro& macro, const std::shared_ptr<Scope>& defined_in,
                             const Arguments& arguments) {
  const int line = rt_.line;
  Capture capture(*this);
  NewScope scope(*this, defined_in);
  std::vector<Value> extra;
  for (size_t i = 0; i < arguments.positional.size(); ++i) {
    if (i < macro.parameters.size()) {
      SetVariable(macro.parameters[i].name, arguments.positional[i]);
    } else {
      extra.push_back(arguments.positional[i]);
    }
  }
  if (!extra.empty() && !macro.uses_varargs) {
    return rt_.Fail(absl::StrCat("macro '", macro.name, "' takes at most ", macro.parameters.size(),
                                 " arguments"));
  }
  Dict* named = rt_.NewDict();
  Value caller;
  for (const auto& [name, value] : arguments.keyword) {
    bool known = false;
    for (const Parameter& parameter : macro.parameters) known |= parameter.name == name;
    if (known && scope_->variables.contains(name)) {
      return rt_.Fail(absl::StrCat("macro '", macro.name, "' was given '", name, "' twice"));
    }
    if (known) {
      SetVariable(name, value);
    } else if (name == "caller" && macro.uses_caller) {
      caller = value;
    } else if (macro.uses_kwargs) {
      rt_.SetItem(*named, Value(name), value);
    } else {
      return rt_.Fail(absl::StrCat("macro '", macro.name, "' has no parameter '", name, "'"));
    }
  }
  for (const Parameter& parameter : macro.parameters) {
    if (scope_->variables.contains(parameter.name)) continue;
    SetVariable(parameter.name,
                EvalOr(parameter.fallback, rt_.Missing(absl::StrCat("parameter '", parameter.name,
                                                                    "' was not provided"))));
  }
  if (macro.uses_varargs) SetVariable("varargs", rt_.NewList(std::move(extra), /*tuple=*/true));
  if (macro.uses_kwargs) SetVariable("kwargs", named);
  if (macro.uses_caller && !scope_->variables.contains("caller")) SetVariable("caller", caller);
  ExecBody(macro.body);
  if (!rt_.failed()) rt_.line = line;
  return capture.Take();
}

Value Interpreter::CallLoop(const Stmt& stmt, const std::shared_ptr<Scope>& scope,
                            const Value& items, int depth) {
  Capture capture(*this);
  NewScope inner(*this, scope);
  ExecFor(stmt, items, depth);
  return capture.Take();
}

}  // namespace shoal::jinja
