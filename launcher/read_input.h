// A file that a person named, whole.
#pragma once

#include <cstddef>
#include <string>

#include "absl/status/statusor.h"

namespace shoal {

constexpr size_t kMaxInputBytes = 256u << 20;

// `what` names its purpose in messages ("the prompt"); `path` "-" is stdin. kNotFound with the
// system's reason when it cannot be read (a directory cannot), a usage error beyond kMaxInputBytes.
absl::StatusOr<std::string> ReadInput(const std::string& path, const std::string& what);

}  // namespace shoal
