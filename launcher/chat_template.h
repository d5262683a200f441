// From a conversation to the prompt a model was trained on, through the template its file carries.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "launcher/jinja/template.h"
#include "nlohmann/json.hpp"

namespace shoal {

struct ChatTemplateOptions {
  bool add_generation_prompt = true;  // end with the opening of the assistant's turn
  std::string bos_token;              // texts of the model's tokens; templates print them
  std::string eos_token;
  // Anything else the template should see, as a JSON object ({"enable_thinking": false}); null:
  // none.
  nlohmann::ordered_json extra;
  std::time_t now = 0;  // what strftime_now tells; 0: the present
};

// Immutable; usable from any number of threads at once.
class ChatTemplate {
 public:
  // kInvalidArgument with a line number for a source that is no template.
  static absl::StatusOr<ChatTemplate> Parse(const std::string& source);

  // `messages`: [{"role": ..., "content": ...}, ...]. `tools`: function descriptions, or null.
  // The template sees them as they are. kInvalidArgument when the template refuses (the message is
  // its own) or fails. Encode the result with parse_special and without add_special: templates
  // write the BOS token themselves.
  absl::StatusOr<std::string> Render(const nlohmann::ordered_json& messages,
                                     const nlohmann::ordered_json& tools,
                                     const ChatTemplateOptions& options) const;

  const std::string& source() const { return source_; }

 private:
  ChatTemplate(std::string source, jinja::Template parsed)
      : source_(std::move(source)), template_(std::move(parsed)) {}

  std::string source_;
  jinja::Template template_;
};

}  // namespace shoal
