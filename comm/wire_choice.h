// Which wire format suits the network that a job's sums travel over.
#pragma once

#include "absl/status/statusor.h"
#include "comm/communicator.h"

namespace shoal {

struct WireChoice {
  Wire wire = Wire::kF32;
  // Of the slowest link between two hosts of one group, GB/s one way; 0: no group spans hosts, and
  // nothing was measured.
  double link_gbps = 0;
};

// f32 from 25 Gbit/s on, f16 from 5 Gbit/s on, else q8. Far from what networks carry (1, 2.5, 10,
// 40 Gbit/s), so that one network always gets the same answer.
Wire WireForLink(double gbps);

// Collective. Groups are `tp` neighbouring ranks of the world, which it is a multiple of. Sends 5
// MB from each rank to the next one of its group where that is on another host; every rank gets the
// same answer.
absl::StatusOr<WireChoice> ChooseWire(Communicator& world, int tp);

}  // namespace shoal
