#include "offload/kv_transfers.h"

#include <utility>

#include "kernels/check.h"
#include "kernels/status_macros.h"

namespace shoal {

absl::StatusOr<std::unique_ptr<KvTransfers>> KvTransfers::Create(Backend& backend) {
  std::unique_ptr<KvTransfers> t(new KvTransfers(backend));
  SHOAL_ASSIGN_OR_RETURN(t->engine_, backend.MakeCopies());
  SHOAL_ASSIGN_OR_RETURN(t->other_, backend.MakeCopies());
  for (int* fence : {&t->ops_, &t->window_read_, &t->window_filled_}) {
    SHOAL_ASSIGN_OR_RETURN(*fence, t->engine_->NewFence());
  }
  for (int* fence : {&t->before_in_, &t->in_}) {
    SHOAL_ASSIGN_OR_RETURN(*fence, t->other_->NewFence());
  }
  return t;
}

absl::StatusOr<DeviceMemory> KvTransfers::AllocateStaging(int64_t bytes) {
  return backend_.AllocateStaging(bytes);
}

absl::Status KvTransfers::UseBuffers(int buffers) {
  SHOAL_CHECK(out_.empty(), "staging is made once");
  out_.resize(buffers);
  for (int& fence : out_) {
    SHOAL_ASSIGN_OR_RETURN(fence, engine_->NewFence());
  }
  return absl::OkStatus();
}

void KvTransfers::Out(uint8_t* to, const uint8_t* from, int64_t bytes) {
  if (!out_open_) {
    out_open_ = true;
    out_status_ = engine_->MarkOps(ops_);
    out_status_.Update(engine_->CopiesWaitFor(ops_));
  }
  if (out_status_.ok()) out_status_ = engine_->CopyBack(to, from, bytes);
}

absl::Status KvTransfers::EndOut(int buffer) {
  out_open_ = false;
  out_status_.Update(engine_->MarkCopies(out_[buffer]));
  out_status_.Update(engine_->OpsWaitFor(out_[buffer]));
  return std::exchange(out_status_, absl::OkStatus());
}

absl::Status KvTransfers::BeginIn() { return other_->MarkOps(before_in_); }

absl::Status KvTransfers::ToWindow(uint8_t* to, const uint8_t* from, int64_t bytes) {
  SHOAL_RETURN_IF_ERROR(engine_->CopiesWaitFor(window_read_));
  SHOAL_RETURN_IF_ERROR(engine_->Copy(to, from, bytes));
  SHOAL_RETURN_IF_ERROR(engine_->MarkCopies(window_filled_));
  SHOAL_RETURN_IF_ERROR(engine_->OpsWaitFor(window_filled_));
  return engine_->Await(window_filled_);
}

absl::Status KvTransfers::WindowIsRead() { return engine_->MarkOps(window_read_); }

absl::Status KvTransfers::EnterThread() { return other_->EnterThread(); }

absl::Status KvTransfers::AwaitOut(int buffer) { return engine_->Await(out_[buffer]); }

absl::Status KvTransfers::In(absl::Span<const Move> moves) {
  {
    const MutexLock lock(&mu_);
    SHOAL_RETURN_IF_ERROR(other_->CopiesWaitFor(before_in_));
    for (const Move& m : moves) SHOAL_RETURN_IF_ERROR(other_->Copy(m.to, m.from, m.bytes));
    SHOAL_RETURN_IF_ERROR(other_->MarkCopies(in_));
  }
  // Marked again meanwhile, it is passed later.
  return other_->Await(in_);
}

}  // namespace shoal
