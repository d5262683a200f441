// A parsed template, ready to be rendered: see README.md for what of Jinja it knows.
#pragma once

#include <ctime>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "launcher/jinja/ast.h"
#include "launcher/jinja/runtime.h"
#include "nlohmann/json_fwd.hpp"

namespace shoal::jinja {

// Immutable; any number of threads may render one at once. Cheap to copy.
class Template {
 public:
  static constexpr size_t kMaxSourceBytes = 4 << 20;

  // kInvalidArgument with a line number.
  static absl::StatusOr<Template> Parse(std::string_view source);

  // `variables` is a JSON object; null stands for none. kInvalidArgument when the template fails,
  // calls raise_exception (the message is then the template's own) or reaches a limit.
  absl::StatusOr<std::string> Render(const nlohmann::ordered_json& variables, const Limits& limits,
                                     std::time_t now) const;

 private:
  explicit Template(std::shared_ptr<const Body> body) : body_(std::move(body)) {}

  std::shared_ptr<const Body> body_;
};

}  // namespace shoal::jinja
