// Collectives on the memory of a device that the inner communicator cannot reach: through staging
// in host memory. What two ranks on one GPU use, and a GPU rank beside a CPU rank.
#pragma once

#include <memory>

#include "comm/communicator.h"
#include "kernels/backend.h"

namespace shoal {

// Borrows both, which live longer. Pointers in its calls are memory of `device`, or of the host.
// Called by the thread that calls `device`.
std::unique_ptr<Communicator> MakeStagedCommunicator(Communicator& inner, Backend& device);

}  // namespace shoal
