// From flags to a running engine: reads the model, starts or joins the ranks, and runs a command on
// rank 0 while the other ranks work for it.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "launcher/flags.h"
#include "launcher/tokenizer.h"
#include "parallel/engine.h"
#include "shard/checkpoint.h"
#include "shard/model_config.h"

namespace shoal {

// What a rank says about itself when the work is done.
struct RankReport {
  char host[64] = {};
  char backend[64] = {};
  char transport[256] = {};  // Mesh::transport()
  int64_t peak_bytes = 0;    // VmHWM of the process
  RankMemory memory;
  int layer_begin = 0, layer_end = 0;
  // Streaming from disk: zeros when everything is in memory.
  int64_t read_bytes = 0;
  double read_seconds = 0;  // reads were in flight
  double wait_seconds = 0;  // the forward pass waited for them
  double read_cpu_seconds = 0;
  int read_depth = 0;
  // KV pages to and from disk.
  int64_t pages_out = 0, pages_in = 0, pages_failed = 0;
  int64_t page_bytes_in = 0;
  double page_read_seconds = 0;  // reads of pages were in flight
  char reader[96] = {};          // "io_uring with registered buffers, direct"
};

// Rank 0's view; lives while the command runs.
struct Session {
  const Checkpoint& checkpoint;
  const ModelConfig& config;
  const EngineOptions& options;  // resolved
  const Tokenizer* tokenizer;    // null when the session was opened without one
  Engine& engine;
  double load_seconds = 0;
};

struct SessionOptions {
  int argc = 0;
  char** argv = nullptr;
  int sequences = 1;
  bool prefix_cache = true;
  bool needs_tokenizer = true;
  bool quiet = false;  // no progress, no report
  // Changes the options when the model is known, before memory is sized.
  std::function<absl::Status(const Checkpoint&, const ModelConfig&, EngineOptions&)> adjust;
  // Called for rank 0 before the weights are loaded, with the resolved options: reads the files
  // that the command works on, so that what is wrong with them is said at once.
  std::function<absl::Status(const ModelConfig&, const EngineOptions&, const Tokenizer*)> prepare;
};

// Runs `body` on rank 0 and returns the exit code of this process. Every error is printed once, by
// rank 0 or by the process that started the ranks.
int RunSession(const ModelFlags& flags, const SessionOptions& options,
               const std::function<absl::Status(Session&)>& body,
               const std::function<void(const std::vector<RankReport>&)>& report);

// Speed-independent lines about each rank, for stderr.
std::string FormatReports(const std::vector<RankReport>& reports);

}  // namespace shoal
