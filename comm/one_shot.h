// Token-sized sums of ranks on one host with a GPU each, by a kernel that exchanges the terms
// (kernels/peer_sums.h): through the peers' memory where GPUs reach each other, else through host
// memory that all map.
//
// A sum is one launch, which may be recorded and replayed; the host sends no message for it. A peer
// that dies is noticed by the host communicator while this rank waits for its queue, or by the
// kernel, which waits no longer than kPeerSilence for a peer when nobody says that it is alive.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "comm/communicator.h"
#include "kernels/backend.h"

namespace shoal {

// Below the 10 seconds after which a dead rank is an error.
inline constexpr absl::Duration kPeerSilence = absl::Seconds(8);

// Bytes of the largest sum that goes this way. One-shot, a rank sends all it has to each peer, so
// with more ranks the bytes that leave it stay the same: over peer memory 256 KiB, 10 us of a PCIe
// link of 25 GB/s, about what a launch and the steps of a ring cost otherwise. Over host memory
// each byte crosses the bus once to get there and once for each reader, who waits: half of it.
int64_t OneShotBytes(PeerMemory memory, int ranks);

struct OneShotOptions {
  absl::Duration silence = kPeerSilence;
  absl::Duration stall = absl::Minutes(10);  // for a peer that lives but does not come
  absl::Duration trial = absl::Seconds(5);   // for a sum of the trial at the start
  int64_t bytes = 256 << 10;                 // of the largest sum, if OneShotBytes allows
  // Whether it is taken only where it is faster than `base` for a token's sum.
  bool measure = true;
};

struct OneShotResult {
  std::unique_ptr<Communicator> communicator;
  std::string way;      // "peer memory (9 us, otherwise 21)" where sums go this way, else empty
  std::string why_not;  // and why they do not
};

// Collective over `host`, whose ranks have a GPU each, no two the same. What `base` does stays as
// it is but for small sums, where all ranks are on one host, reach each other, a trial gave the
// right sums and they came sooner; else the communicator is `base`. SHOAL_PEER_SUMS=0 on any rank
// leaves it at `base`, 1 takes it without measuring. Sums travel as f32 whatever Wire says. Borrows
// host and device, which live longer. Errors are those of `host` and `base`, and of a device that
// the trial has broken.
absl::StatusOr<OneShotResult> MakeOneShotCommunicator(std::unique_ptr<Communicator> base,
                                                      Communicator& host, Backend& device,
                                                      OneShotOptions options = {});

}  // namespace shoal
