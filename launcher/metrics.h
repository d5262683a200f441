// Counters and histograms for Prometheus, under vLLM's names with the prefix shoal_.
#pragma once

#include <memory>
#include <string>

#include "launcher/proto/engine.pb.h"

namespace shoal {

// Thread-safe.
class Metrics {
 public:
  Metrics();
  ~Metrics();

  void FirstToken(double seconds, int prompt_tokens, int cached_tokens);
  void NextToken(double seconds);
  // reason: stop, length, abort or error. seconds < 0: not measured.
  void RequestEnded(const std::string& reason, double seconds);
  void HttpAnswered(int status);
  void EngineRestarted();
  void Heartbeat(const engine::v1::Heartbeat& heartbeat);
  void Ranks(const engine::v1::Stats& stats);
  void Streams(int open);

  // The text exposition format, version 0.0.4.
  std::string Text() const;

 private:
  struct Families;
  std::unique_ptr<Families> f_;
};

}  // namespace shoal
