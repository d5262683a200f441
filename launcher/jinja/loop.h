// The `loop` variable.
#pragma once

#include <memory>
#include <vector>

#include "launcher/jinja/interpreter.h"

namespace shoal::jinja {

class LoopObject : public Object, public std::enable_shared_from_this<LoopObject> {
 public:
  LoopObject(Interpreter& interpreter, const Stmt& stmt, std::shared_ptr<Scope> scope,
             std::vector<Value> items, int depth)
      : interpreter_(interpreter),
        stmt_(stmt),
        scope_(std::move(scope)),
        items_(std::move(items)),
        depth_(depth) {}

  void MoveTo(size_t index) { index_ = index; }

  std::string_view kind() const override { return "loop"; }
  bool callable() const override { return stmt_.recursive; }
  Value Call(Runtime& rt, const Arguments& arguments) const override;
  Value GetAttribute(std::string_view name) const override;

 private:
  friend class LoopMethod;

  Interpreter& interpreter_;
  const Stmt& stmt_;
  const std::shared_ptr<Scope> scope_;
  const std::vector<Value> items_;
  const int depth_;
  size_t index_ = 0;
  mutable std::vector<Value> changed_;  // what changed() saw last
  mutable bool saw_any_ = false;
};

}  // namespace shoal::jinja
