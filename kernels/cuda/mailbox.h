// PeerMailbox by CUDA's memory and events of other processes (cudaIpc*), for ranks of one process
// by their pointers.
#pragma once

#include <memory>

#include "kernels/cuda/device.h"
#include "kernels/peer_mailbox.h"

namespace shoal::cuda {

class CudaMailbox final : public PeerMailbox {
 public:
  // On the current device. `stream` is that of the ops, and lives longer.
  static absl::StatusOr<std::unique_ptr<CudaMailbox>> Create(int64_t slot_bytes,
                                                             cudaStream_t stream);
  ~CudaMailbox() override;

  MailboxAddress address() const override;
  absl::Status Connect(const MailboxAddress& peer) override;
  absl::Status Post(int slot, const void* data, int64_t bytes) override;
  absl::StatusOr<const void*> Read(int slot) override;

 private:
  struct Address;
  CudaMailbox(int64_t slot_bytes, cudaStream_t stream) : slot_bytes_(slot_bytes), stream_(stream) {}
  absl::Status Open(const Address& peer);

  const int64_t slot_bytes_;
  const cudaStream_t stream_;
  int device_ = 0;
  DeviceMemory memory_;
  OwnedEvent posted_[kSlots];  // marked behind the copy to the peer's slot
  uint8_t* peer_memory_ = nullptr;
  cudaEvent_t peer_posted_[kSlots] = {};
  bool opened_ = false;  // the peer's are another process's
};

}  // namespace shoal::cuda
