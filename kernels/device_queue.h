// The order in which a device works through its ops, for libraries that put work of their own into
// it.
#pragma once

#include <functional>
#include <string>

#include "absl/status/status.h"

namespace shoal {

// Owned by a backend and used by its thread.
class DeviceQueue {
 public:
  virtual ~DeviceQueue() = default;
  virtual void* handle() = 0;  // a cudaStream_t
  // Names the physical device among those of the host, the same in every process.
  virtual std::string device() const = 0;
  // Asked again and again while the host waits for the queue, and once when all is done. Its first
  // error ends the wait and is what Backend::Check() says from then on: so a peer that is gone
  // never becomes a hang.
  virtual void AddWatch(std::function<absl::Status()> watch) = 0;
  // Lets go of all that was recorded of the queue, also of a recording under way, and records no
  // more. For a library before it ends something that recorded work holds.
  virtual void ForgetRecordings() {}
  // What is enqueued now was meant for a recording that is lost: it goes nowhere, and a library
  // that enqueues it would meet an error.
  virtual bool recording_lost() const { return false; }
};

}  // namespace shoal
