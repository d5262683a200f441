// Collectives and point-to-point among the ranks of one job.
//
// Backends: in process (ranks are threads), MPI (host memory), NCCL (device memory). Blocking
// calls; one thread per rank calls at a time. Every wait has a deadline: a call returns
// kUnavailable, naming the rank, when a peer died, hung past the deadline or aborted. Broadcast and
// Recv wait for work to come, so they last as long as the peer is alive. After an error the
// communicator, and every other that was split off the same job, is broken and every call says so.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"

namespace shoal {

// How partial sums travel. f32 is exact; q8 is blocks of 32 with one f16 scale.
enum class Wire : uint8_t { kF32, kF16, kQ8 };

class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  virtual std::string host(int rank) const = 0;

  // In place, every rank ends with the same bits. Among host arrays an element's sum (in q8 that of
  // its block of 32) does not depend on the others.
  virtual absl::Status AllReduceSum(float* data, int64_t count, Wire wire) = 0;
  // Numbers of the largest sum that only enqueues work on the device's queue, which may be recorded
  // and replayed, by all ranks alike; 0: sums do more.
  virtual int64_t recordable_sum() const { return 0; }
  // How long this rank has been in AllReduceSum so far, waiting for the others included.
  virtual double all_reduce_seconds() const = 0;
  // out holds size() * bytes, rank r's part at r * bytes.
  virtual absl::Status AllGather(const void* data, int64_t bytes, void* out) = 0;
  virtual absl::Status Broadcast(void* data, int64_t bytes, int root) = 0;
  // Messages between two ranks with the same tag (0 to 32767) arrive in order. Lengths must agree.
  // Send copies the data and returns; it waits only while too much is under way.
  virtual absl::Status Send(const void* data, int64_t bytes, int dest, int tag) = 0;
  virtual absl::Status Recv(void* data, int64_t bytes, int source, int tag) = 0;
  virtual absl::Status Barrier() = 0;
  // Ranks of the same color form a new communicator, ordered by (key, rank). Collective over all
  // ranks.
  virtual absl::StatusOr<std::unique_ptr<Communicator>> Split(int color, int key) = 0;
  // What broke it so far, a peer's end among it, without waiting. Some only learn of it in a call.
  virtual absl::Status broken() const { return absl::OkStatus(); }
  // Breaks the communicator for every rank: their pending and later calls fail with this reason.
  virtual void Abort(const absl::Status& reason) = 0;
};

// A world of one: every call succeeds at once and copies nothing.
std::unique_ptr<Communicator> MakeSelfCommunicator();

// `size` communicators that share memory, one for each thread that plays a rank. `stall` as below.
std::vector<std::unique_ptr<Communicator>> MakeInProcessCommunicators(
    int size, absl::Duration stall = absl::Minutes(10));

struct MpiOptions {
  absl::Duration deadline = absl::Seconds(4);  // silence of a peer's heartbeat that counts as death
  absl::Duration stall = absl::Minutes(10);  // a step of work for which a living peer does not come
  absl::Duration start = absl::Seconds(30);  // for all ranks to start and find each other
  std::string net;                           // network card: a name, address or subnet; "" chooses
  // Called once, from another thread, when a rank died or hung; `reporter` on the one rank that
  // should tell the user. Calls of the communicator fail with the same status once it returned.
  std::function<void(const absl::Status& loss, bool reporter)> on_peer_lost;
  // A process that is still there this long after a loss or an abort is ended, with exit code 69,
  // as its main thread may be deep in a computation.
  absl::Duration exit_after = absl::Seconds(2);
};
// An on_peer_lost that ends this process with exit code 69, whatever its main thread does: at once
// on the reporter, after it printed "shoal: rank 1 on host b was lost: ..." to stderr; a moment
// later on the others, so that the launcher does not kill the reporter before it spoke.
[[noreturn]] void EndProcessOnPeerLoss(const absl::Status& loss, bool reporter);

// The world communicator of an MPI job; initializes MPI (which can be done once in a process) and
// finalizes it when it and all that were split off are destroyed. After an error MPI is not
// finalized, as that would wait for the dead: leave the process with a nonzero exit code. If the
// job fails while this rank waits for the others to be done too, the destructor ends the process
// (69).
absl::StatusOr<std::unique_ptr<Communicator>> MakeMpiCommunicator(const MpiOptions& options);

}  // namespace shoal
