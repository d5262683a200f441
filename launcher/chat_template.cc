#include "launcher/chat_template.h"

#include <ctime>

#include "absl/strings/str_cat.h"

namespace shoal {

absl::StatusOr<ChatTemplate> ChatTemplate::Parse(const std::string& source) {
  auto parsed = jinja::Template::Parse(source);
  if (!parsed.ok()) return parsed.status();
  return ChatTemplate(source, *std::move(parsed));
}

absl::StatusOr<std::string> ChatTemplate::Render(const nlohmann::ordered_json& messages,
                                                 const nlohmann::ordered_json& tools,
                                                 const ChatTemplateOptions& options) const {
  if (!messages.is_array()) {
    return absl::InvalidArgumentError(
        absl::StrCat("messages: expected a JSON array, found ", messages.type_name()));
  }
  nlohmann::ordered_json variables = options.extra;
  if (!variables.is_null() && !variables.is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "chat template arguments: expected a JSON object, found ", variables.type_name()));
  }
  variables["messages"] = messages;
  // As transformers passes them: always there, none when there are none.
  variables["tools"] = tools;
  if (!variables.contains("documents")) variables["documents"] = nullptr;
  variables["add_generation_prompt"] = options.add_generation_prompt;
  variables["bos_token"] = options.bos_token;
  variables["eos_token"] = options.eos_token;
  return template_.Render(variables, jinja::Limits{},
                          options.now == 0 ? std::time(nullptr) : options.now);
}

}  // namespace shoal
