// Moves KV blocks between a device's own memory and pinned staging, beside the ops.
//
// Three orders: the device's ops, copies that the engine thread asks for, copies that the pager's
// threads ask for. The engine thread never waits for what is written out: the ops that come behind
// wait for the copy, and the pager's thread does before it looks at the bytes.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/backend.h"
#include "kernels/mutex.h"

namespace shoal {

class KvTransfers {
 public:
  // The backend, which must have copies(), lives longer.
  static absl::StatusOr<std::unique_ptr<KvTransfers>> Create(Backend& backend);

  // ---- Engine thread

  // Pinned; lives no longer than this.
  absl::StatusOr<DeviceMemory> AllocateStaging(int64_t bytes);
  // How many staging buffers there are, once, before they are used.
  absl::Status UseBuffers(int buffers);
  // Device to staging, behind the ops enqueued so far.
  void Out(uint8_t* to, const uint8_t* from, int64_t bytes);
  // Ends what goes to `buffer` and says the first error of it. Ops from now on may overwrite what
  // was read.
  absl::Status EndOut(int buffer);
  // Ops enqueued so far are done before what In() writes from now on.
  absl::Status BeginIn();
  // Staging to a window that attention reads; `from` may change when this returns. Ops from now on
  // see it, those before WindowIsRead() have read what was there.
  absl::Status ToWindow(uint8_t* to, const uint8_t* from, int64_t bytes);
  absl::Status WindowIsRead();

  // ---- The pager's threads

  absl::Status EnterThread();  // the first call of each
  // Until what was ended with EndOut is there.
  absl::Status AwaitOut(int buffer);
  // Staging to device; it is there when this returns.
  struct Move {
    uint8_t* to;
    const uint8_t* from;
    int64_t bytes;
  };
  absl::Status In(absl::Span<const Move> moves);

 private:
  explicit KvTransfers(Backend& backend) : backend_(backend) {}

  Backend& backend_;
  std::unique_ptr<CopyEngine> engine_;  // the engine thread's
  Mutex mu_;
  std::unique_ptr<CopyEngine> other_;  // the others', who hold mu_ while they ask for copies
  bool out_open_ = false;
  absl::Status out_status_;
  int ops_ = 0;            // of engine_: ops that Out comes behind
  std::vector<int> out_;   // of engine_, [buffers]: the bytes are there
  int window_read_ = 0;    // of engine_: ops that read the window
  int window_filled_ = 0;  // of engine_
  int before_in_ = 0;      // of other_: ops that In comes behind; marked by the engine thread
  int in_ = 0;             // of other_
};

}  // namespace shoal
