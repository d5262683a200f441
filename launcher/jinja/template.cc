#include "launcher/jinja/template.h"

#include "absl/strings/str_cat.h"
#include "launcher/jinja/interpreter.h"
#include "launcher/jinja/json_text.h"
#include "launcher/jinja/parser.h"
#include "nlohmann/json.hpp"

namespace shoal::jinja {

absl::StatusOr<Template> Template::Parse(std::string_view source) {
  if (source.size() > kMaxSourceBytes) {
    return absl::InvalidArgumentError(absl::StrCat(
        "chat template of ", source.size(), " bytes; at most ", kMaxSourceBytes, " are accepted"));
  }
  auto body = ParseTemplate(source);
  if (!body.ok()) return body.status();
  return Template(std::make_shared<const Body>(*std::move(body)));
}

absl::StatusOr<std::string> Template::Render(const nlohmann::ordered_json& variables,
                                             const Limits& limits, std::time_t now) const {
  Runtime rt(limits);
  Interpreter interpreter(rt, now);
  for (const auto& [name, value] : variables.items()) {
    interpreter.SetVariable(name, FromJson(rt, value));
  }
  std::string text = interpreter.Run(*body_);
  if (rt.failed()) return rt.status();
  return text;
}

}  // namespace shoal::jinja
