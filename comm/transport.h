// Point-to-point messages among all ranks of a job: the small surface on which every collective is
// written once.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "absl/status/status.h"

namespace shoal {

// How long a wait may last.
enum class Patience : uint8_t {
  kWork,  // a step of work: a peer that computes on and on without coming counts as hung in the end
  kIdle,  // waiting to be told what to do: lasts as long as the peer is alive
};

// Messages in flight. Filled by StartSend and StartRecv, emptied by Wait. The buffers that were
// given stay untouched until Wait returned.
struct Pending {
  struct Op {
    void* handle;  // the transport's own request
    int64_t bytes;
    int peer;
    bool is_recv;
  };
  absl::InlinedVector<Op, 16> ops;
};

// One rank's end. Used by one thread at a time, except Break and broken, which any thread may call.
class Transport {
 public:
  virtual ~Transport() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  virtual std::string host(int rank) const = 0;

  // Messages of one (sender, receiver, tag) are matched in the order in which both sides posted
  // them, and must be waited for in that order. 0 <= tag < kTagEnd, bytes > 0, peer is not this
  // rank.
  virtual void StartSend(const void* data, int64_t bytes, int peer, int tag, Pending* pending) = 0;
  virtual void StartRecv(void* data, int64_t bytes, int peer, int tag, Pending* pending) = 0;
  // Waits for all. An error is final: the transport is broken from then on, for this rank at
  // least. A broken transport withdraws the messages at once, so after an error the other Pendings
  // must be waited for too before their buffers go away.
  virtual absl::Status Wait(Pending* pending, Patience patience) = 0;
  // Copies the message and returns; `tag` is shared with StartSend. Waits while too much is in
  // flight.
  virtual absl::Status SendCopy(const void* data, int64_t bytes, int peer, int tag) = 0;

  // Makes every rank's pending and later waits fail with `reason`.
  virtual void Break(const absl::Status& reason) = 0;
  virtual absl::Status broken() const = 0;

  // The first context (tag range) that no communicator of this rank has used yet.
  int next_context = 1;
};

inline constexpr int kTagsPerContext = 1 << 16;
inline constexpr int kContexts = 1 << 12;
inline constexpr int kTagEnd =
    kTagsPerContext * kContexts;  // 2^28: MPICH's limit; Open MPI's is higher

}  // namespace shoal
