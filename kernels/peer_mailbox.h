// Device memory that one peer, another rank of the same host, writes to in the order of its ops:
// how two ranks exchange sums without a detour through the host's memory.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace shoal {

// What a peer must know of a mailbox. Travels between ranks as it is.
struct MailboxAddress {
  uint8_t bytes[320] = {};
};

// Owned by a rank and used by its thread. Each slot has room for one message; the ranks agree by
// other means on when a message was posted and when a slot is free.
class PeerMailbox {
 public:
  static constexpr int kSlots = 2;
  virtual ~PeerMailbox() = default;
  virtual MailboxAddress address() const = 0;
  // Once. An error when this rank cannot reach the peer's memory: nothing has changed then.
  virtual absl::Status Connect(const MailboxAddress& peer) = 0;
  // Copies device memory to a slot of the peer, behind the ops enqueued so far.
  virtual absl::Status Post(int slot, const void* data, int64_t bytes) = 0;
  // What the peer posted to the slot, in a Post that has returned: ops from now on see it.
  virtual absl::StatusOr<const void*> Read(int slot) = 0;
};

}  // namespace shoal
