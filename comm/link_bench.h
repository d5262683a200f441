// Latency and bandwidth between each two ranks of a job, one pair at a time.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "comm/communicator.h"

namespace shoal {

struct LinkSpeed {
  int from = 0, to = 0;
  std::string from_host, to_host;
  double latency_us = 0;      // half of a round trip of 4 bytes, the median
  double bandwidth_gbps = 0;  // GB/s of large messages, one way
};

// Collective. All pairs up to 8 ranks, beyond that those of rank 0; filled on rank 0, empty on the
// others.
absl::StatusOr<std::vector<LinkSpeed>> RunLinkBench(Communicator& comm);

}  // namespace shoal
