// Token-sized sums of ranks on one host that have a GPU each, by a kernel that exchanges the terms
// itself: no message of the host for a sum, so steps with such sums can be recorded and replayed.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>

#include "absl/status/status.h"
#include "absl/types/span.h"

namespace shoal {

// Where terms lie while they are under way: in the reader's device memory, which its peers write
// to, or in host memory that all ranks map.
enum class PeerMemory : uint8_t { kDevice, kHost };

// What ranks must know of each other. Travels between them as it is.
struct PeerSumsAddress {
  uint8_t bytes[192] = {};
};

// Owned by a rank and used by its thread. Between ranks of the same process it keeps what peers may
// still write to.
class PeerSums {
 public:
  static constexpr int kMostRanks = 8;
  static constexpr int64_t kMostNumbers = 64 << 10;  // of one sum
  virtual ~PeerSums() = default;

  virtual PeerSumsAddress address() const = 0;
  // Once, with the addresses by rank, this one's among them. An error when this rank cannot reach
  // the others: nothing has changed then. The peers must not be gone yet.
  virtual absl::Status Connect(absl::Span<const PeerSumsAddress> ranks) = 0;
  // How long a kernel waits for a peer without a Vouch(), and in all. Of sums enqueued from now on.
  virtual void SetPatience(std::chrono::nanoseconds silence, std::chrono::nanoseconds stall) = 0;

  // Enqueues a sum in place, terms added in the order of the ranks: the same bits on all. REQUIRES:
  // all ranks enqueue (or replay) sums of the same counts in the same order; 0 < count <=
  // kMostNumbers.
  virtual void Enqueue(float* data, int64_t count) = 0;
  // The rank for which a kernel waited in vain: sums since then are garbage.
  virtual std::optional<int> Missing() const = 0;
  // The peers are known to be alive: kernels that wait go on waiting.
  virtual void Vouch() = 0;
  // Kernels that wait give up, now and from now on.
  virtual void Abort() = 0;
};

}  // namespace shoal
