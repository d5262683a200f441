// Builds the syntax tree of a template.
#pragma once

#include <string_view>

#include "absl/status/statusor.h"
#include "launcher/jinja/ast.h"

namespace shoal::jinja {

// kInvalidArgument with a line number for what is not a template, nests deeper than the limit, or
// uses a tag that chat templates have no use for (include, import, extends, block, ...).
absl::StatusOr<Body> ParseTemplate(std::string_view source);

}  // namespace shoal::jinja
