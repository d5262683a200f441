// Token-sized sums of two ranks on one host, from device memory to device memory.
//
// Each rank copies its part to a slot in the other's memory, on its own queue, tells the other that
// the copy is enqueued, and adds what came. The host waits for no copy and no sum; it exchanges one
// number with the peer, over the host communicator, whose deadlines are these sums' too. A rank
// goes when the peer's last sum has returned: ranks meet after their last batch.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "comm/communicator.h"
#include "kernels/backend.h"

namespace shoal {

inline constexpr int64_t kPeerSumBytes = 256 << 10;  // larger ones take the way they had

struct PeerResult {
  std::unique_ptr<Communicator> communicator;
  std::string why_not;  // empty: token-sized sums take the short way
};

// Collective over `host`, whose ranks all have memory of their own. What `base` does stays as it is
// but for small sums, where both ranks reach each other and a trial gave the right sums; else the
// communicator is `base`. Sums travel as f32 whatever Wire says. Borrows host and device, which
// live longer. Errors are those of `host`, and of a device that the trial has broken.
absl::StatusOr<PeerResult> MakePeerCommunicator(std::unique_ptr<Communicator> base,
                                                Communicator& host, Backend& device);

}  // namespace shoal
