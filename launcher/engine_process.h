// The engine's end of the socket to the coordinator: requests in, tokens and heartbeats out.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "launcher/session.h"

namespace shoal {

inline constexpr int kEngineProtocol = 1;

// Connects to the coordinator's Unix socket and serves it until it closes (then OK) or the engine
// fails. Three threads: the caller's runs Engine::Step and nothing else, one reads, one sends the
// heartbeat four times a second with what the engine thread is doing, so that a step that hangs is
// seen as such.
absl::Status ServeEngine(Session& session, const std::string& socket_path);

}  // namespace shoal
