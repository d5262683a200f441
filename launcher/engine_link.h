// What the coordinator knows of the engine: a link that is up or down, and what comes over it.
#pragma once

#include <string>

#include "launcher/proto/engine.pb.h"

namespace shoal {

// Calls come on the coordinator's thread.
class EngineListener {
 public:
  virtual ~EngineListener() = default;
  // Loaded and empty: it knows nothing of what an earlier one was given.
  virtual void OnEngineUp(const engine::v1::Hello& hello) = 0;
  virtual void OnEngineEvents(const engine::v1::Events& events) = 0;
  virtual void OnEngineHeartbeat(const engine::v1::Heartbeat& heartbeat) = 0;
  virtual void OnEngineStats(const engine::v1::Stats& stats) = 0;
  // It died, hung or broke; another is being started.
  virtual void OnEngineDown(const std::string& reason) = 0;
  // Restarting did not help for a while; it goes on, but nobody should wait for it.
  virtual void OnEngineFailed(const std::string& reason) = 0;
  // The first start failed in a way that no restart can mend (a bad flag, no such file, too little
  // memory): the exit code to leave with.
  virtual void OnEngineImpossible(int exit_code, const std::string& reason) = 0;
};

class EngineLink {
 public:
  virtual ~EngineLink() = default;
  // Lost when the link is down.
  virtual void Send(const engine::v1::ToEngine& message) = 0;
};

}  // namespace shoal
