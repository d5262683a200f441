// Copies between host memory and a device's, in an order of their own beside the ops.
//
// Fences tie the two orders together: a fence is marked at a place in one of them, and waited for
// in the other or by the host. Used by the rank's engine thread; what another one may call says so.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace shoal {

class CopyEngine {
 public:
  virtual ~CopyEngine() = default;
  // A fence that is passed already. It lives as long as the engine.
  virtual absl::StatusOr<int> NewFence() = 0;
  // Enqueues a copy behind the copies before it. `from` is staging memory
  // (Backend::AllocateStaging) or was pinned, and stays as it is until the copy is done.
  virtual absl::Status Copy(uint8_t* to, const uint8_t* from, int64_t bytes) = 0;
  // The same from the device to staging memory.
  virtual absl::Status CopyBack(uint8_t* to, const uint8_t* from, int64_t bytes) = 0;
  // Makes copies from this host memory as fast as from staging memory, until the engine ends. False
  // when the system refuses: then it must not be copied from directly.
  virtual bool Pin(const uint8_t* from, int64_t bytes) = 0;

  virtual absl::Status MarkCopies(int fence) = 0;  // behind the copies enqueued so far
  virtual absl::Status MarkOps(int fence) = 0;     // behind the ops enqueued so far
  virtual absl::Status OpsWaitFor(int fence) = 0;  // ops and copies that are enqueued from now on
  virtual absl::Status CopiesWaitFor(int fence) = 0;
  // The host: whichever thread calls it.
  virtual absl::Status Await(int fence) = 0;

  // A thread other than the engine's calls this before anything else. It may then use an engine
  // that is its own; others may mark fences of it meanwhile that exist already.
  virtual absl::Status EnterThread() = 0;
};

}  // namespace shoal
