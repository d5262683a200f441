// The syntax tree of a template. Immutable once parsed; shared by renderings.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "launcher/jinja/value.h"

namespace shoal::jinja {

struct Expr;
using ExprPtr = std::unique_ptr<Expr>;

struct CallArguments {
  std::vector<ExprPtr> positional;
  std::vector<std::pair<std::string, ExprPtr>> keyword;
  ExprPtr star;         // f(*x), or null
  ExprPtr double_star;  // f(**x), or null
};

struct Expr {
  enum class Kind {
    kConstant,   // value
    kName,       // name
    kList,       // items
    kTuple,      // items
    kDict,       // items: key, value, key, value, ...
    kAttribute,  // items[0].name
    kSubscript,  // items[0][items[1]]
    kSlice,      // items[0..2]: from, to, step, each may be null; only inside kSubscript
    kCall,       // items[0](arguments)
    kFilter,     // items[0] | name(arguments); items[0] is null in a filter block
    kTest,       // items[0] is name(arguments)
    kNot,
    kNegate,
    kPlus,
    kAnd,
    kOr,
    kBinary,   // name: + - * / // % **
    kConcat,   // items joined with ~
    kCompare,  // items[0] ops[0] items[1] ops[1] items[2] ...
    kIf,       // items[0] if items[1] else items[2] (may be null)
  };
  Kind kind = Kind::kConstant;
  int line = 0;
  int depth = 1;  // of the tree below, this node included
  std::string name;
  Value value;  // constants are numbers, strings, booleans and none: they need no heap
  std::vector<ExprPtr> items;
  std::vector<std::string> ops;
  CallArguments arguments;
};

struct Stmt;
using Body = std::vector<Stmt>;

// Where an assignment goes: a name, a namespace's attribute (name.attribute), or several of them.
struct Target {
  std::string name;
  std::string attribute;      // empty: the name itself
  std::vector<Target> parts;  // not empty: a tuple to unpack into
};

struct Parameter {
  std::string name;
  ExprPtr fallback;  // null: undefined when not given
};

struct Macro {
  std::string name;
  std::vector<Parameter> parameters;
  std::vector<Stmt> body;
  bool uses_varargs = false;  // the body names `varargs`
  bool uses_kwargs = false;
  bool uses_caller = false;
};

struct Stmt {
  enum class Kind {
    kData,      // text
    kPrint,     // expr
    kIf,        // expr, body, otherwise
    kFor,       // target in expr if condition: body, otherwise
    kSet,       // target = expr
    kSetBlock,  // target = body, through the filters of expr (may be null)
    kWith,      // assignments, body
    kMacro,     // macro
    kCall,      // macro (the caller), expr: the call
    kFilter,    // body through the filters of expr
    kScope,     // body in a scope of its own ({% generation %})
    kBreak,
    kContinue,
  };
  Kind kind = Kind::kData;
  int line = 0;
  std::string text;
  ExprPtr expr;
  ExprPtr condition;
  Target target;
  bool recursive = false;
  bool uses_loop = false;  // the loop's body names `loop`
  std::vector<std::pair<Target, ExprPtr>> assignments;
  std::shared_ptr<const Macro> macro;
  Body body;
  Body otherwise;
};

}  // namespace shoal::jinja
