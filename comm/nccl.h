// Collectives between GPUs by NCCL: device memory, on the device's own queue.
//
// A call returns when its work is enqueued (Backend ops behind it see the result). NCCL's
// communicators are made non-blocking, so that no call of the library can hang: every wait of the
// host asks for errors and has a deadline. A peer that died is noticed by the host communicator's
// heartbeat, by NCCL itself, or by the stall limit; the NCCL communicator is then aborted, which
// ends its kernels on the device.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "comm/communicator.h"
#include "comm/nccl_api.h"
#include "kernels/device_queue.h"

namespace shoal {

struct NcclOptions {
  absl::Duration start = absl::Seconds(60);  // for all ranks to find each other
  absl::Duration call = absl::Seconds(60);   // for the library to take one call
};

// Collective over `host`, whose ranks have a GPU each, no two the same. Borrows host and queue,
// which live longer; the unique id travels over host. Sums travel as f32 whatever Wire says:
// between GPUs the link is not what bounds.
absl::StatusOr<std::unique_ptr<Communicator>> MakeNcclCommunicator(
    std::shared_ptr<const nccl::Api> api, Communicator& host, DeviceQueue& queue,
    const NcclOptions& options = {});

}  // namespace shoal
