// The model that the binary carries: what `shoal run` uses when no -m is given.
#pragma once

#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace shoal {

// The GGUF file's bytes (deploy/demo_model/README.md says what they are). Valid for the life of the
// process.
std::string_view DemoModelBytes();

// A path that holds the demo model and can be opened like any file. It names an anonymous in-memory
// file of this process: it costs the model's 4 MB, leaves nothing on disk and goes with the
// process, so other processes must call for their own. An error says what the system refused.
absl::StatusOr<std::string> DemoModelPath();

}  // namespace shoal
