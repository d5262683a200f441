// All-reduce latency and bandwidth by message size, in the columns of nccl-tests.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "comm/communicator.h"

namespace shoal {

struct CommBenchOptions {
  int64_t bytes_min = 4;
  int64_t bytes_max = 64 << 20;
  int factor = 4;  // from one size to the next
  Wire wire = Wire::kF32;
  absl::Duration time_per_size = absl::Milliseconds(200);
};

// One size. Bandwidths count the f32 bytes of the array, whatever the wire format makes of them.
struct CommBenchRow {
  int64_t bytes;
  int64_t count;
  Wire wire;
  double micros;      // one all-reduce, mean over the ranks
  double algbw_gbps;  // GB/s: bytes / time
  double
      busbw_gbps;  // algbw * 2 (ranks-1) / ranks: what each rank's link would show in an ideal ring
  int64_t wrong;   // elements off by more than the wire's error, over all ranks
};

// Collective over all ranks; `on_row` is called on rank 0.
absl::Status RunCommBench(Communicator& comm, const CommBenchOptions& options,
                          const std::function<void(const CommBenchRow&)>& on_row);

// Two comment lines, and one line for a row; without line ends.
std::string CommBenchHeader();
std::string FormatCommBenchRow(const CommBenchRow& row);

}  // namespace shoal
