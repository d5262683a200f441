#include "launcher/jinja/loop.h"

#include "launcher/jinja/operators.h"

namespace shoal::jinja {

// loop.cycle(...) and loop.changed(...)
class LoopMethod : public Object {
 public:
  LoopMethod(std::shared_ptr<const LoopObject> loop, bool cycle)
      : loop_(std::move(loop)), cycle_(cycle) {}
  std::string_view kind() const override { return "builtin function"; }
  bool callable() const override { return true; }
  Value Call(Runtime& rt, const Arguments& arguments) const override {
    const auto& given = arguments.positional;
    if (cycle_) {
      if (given.empty()) return rt.Fail("loop.cycle() needs values");
      return given[loop_->index_ % given.size()];
    }
    bool same = loop_->saw_any_ && given.size() == loop_->changed_.size();
    for (size_t i = 0; same && i < given.size(); ++i) same = Equal(given[i], loop_->changed_[i]);
    loop_->saw_any_ = true;
    loop_->changed_ = given;
    return !same;
  }

 private:
  const std::shared_ptr<const LoopObject> loop_;
  const bool cycle_;
};

Value LoopObject::Call(Runtime& rt, const Arguments& arguments) const {
  Parameters p(rt, "loop()", arguments, {"items"}, 1);
  return p.ok() ? interpreter_.CallLoop(stmt_, scope_, p[0], depth_ + 1) : Value();
}

Value LoopObject::GetAttribute(std::string_view name) const {
  const auto index = static_cast<int64_t>(index_), length = static_cast<int64_t>(items_.size());
  if (name == "index") return index + 1;
  if (name == "index0") return index;
  if (name == "revindex") return length - index;
  if (name == "revindex0") return length - index - 1;
  if (name == "first") return index == 0;
  if (name == "last") return index + 1 == length;
  if (name == "length") return length;
  if (name == "depth") return depth_ + 1;
  if (name == "depth0") return depth_;
  if (name == "previtem") {
    return index > 0 ? items_[index_ - 1] : Value::MakeUndefined("there is no previous item");
  }
  if (name == "nextitem") {
    return index + 1 < length ? items_[index_ + 1] : Value::MakeUndefined("there is no next item");
  }
  if (name == "cycle" || name == "changed") {
    return ObjectPtr(std::make_shared<LoopMethod>(shared_from_this(), name == "cycle"));
  }
  return {};
}

}  // namespace shoal::jinja
