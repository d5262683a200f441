#include "kernels/cuda/mailbox.h"

#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "kernels/status_macros.h"

namespace shoal::cuda {
namespace {

// Of smaller allocations CUDA would share what lies beside them too.
constexpr int64_t kSharedBytes = int64_t{2} << 20;

}  // namespace

struct CudaMailbox::Address {
  uint64_t process = 0;
  int32_t device = 0;
  int32_t shareable = 0;  // between processes
  int64_t slot_bytes = 0;
  uint8_t* memory = nullptr;
  cudaEvent_t posted[kSlots] = {};
  cudaIpcMemHandle_t memory_handle = {};
  cudaIpcEventHandle_t posted_handle[kSlots] = {};
};

absl::StatusOr<std::unique_ptr<CudaMailbox>> CudaMailbox::Create(int64_t slot_bytes,
                                                                 cudaStream_t stream) {
  std::unique_ptr<CudaMailbox> m(new CudaMailbox(slot_bytes, stream));
  SHOAL_RETURN_IF_ERROR(ToStatus(cudaGetDevice(&m->device_), "asking for the current GPU"));
  const int64_t bytes = (slot_bytes * kSlots + kSharedBytes - 1) / kSharedBytes * kSharedBytes;
  SHOAL_ASSIGN_OR_RETURN(m->memory_, AllocateDevice(bytes));
  for (OwnedEvent& e : m->posted_) {
    SHOAL_ASSIGN_OR_RETURN(e, OwnedEvent::CreateShared());
  }
  return m;
}

CudaMailbox::~CudaMailbox() {
  cudaStreamSynchronize(stream_);  // copies to the peer, sums that read the slots
  if (!opened_) return;
  for (const cudaEvent_t e : peer_posted_) {
    if (e != nullptr) cudaEventDestroy(e);
  }
  if (peer_memory_ != nullptr) cudaIpcCloseMemHandle(peer_memory_);
  cudaGetLastError();  // the peer may have gone first
}

MailboxAddress CudaMailbox::address() const {
  static_assert(sizeof(Address) <= sizeof(MailboxAddress));
  Address a;
  a.process = ThisProcess();
  a.device = device_;
  a.slot_bytes = slot_bytes_;
  a.memory = memory_.data();
  bool shareable = cudaIpcGetMemHandle(&a.memory_handle, memory_.data()) == cudaSuccess;
  for (int i = 0; i < kSlots; ++i) {
    a.posted[i] = posted_[i].get();
    shareable =
        shareable && cudaIpcGetEventHandle(&a.posted_handle[i], posted_[i].get()) == cudaSuccess;
  }
  a.shareable = shareable ? 1 : 0;
  cudaGetLastError();  // what a system refuses (WSL, some containers) is no error of later calls
  MailboxAddress out;
  std::memcpy(out.bytes, &a, sizeof a);
  return out;
}

absl::Status CudaMailbox::Connect(const MailboxAddress& peer) {
  SHOAL_CHECK(peer_memory_ == nullptr, "a mailbox has one peer");
  Address a;
  std::memcpy(&a, peer.bytes, sizeof a);
  if (a.slot_bytes != slot_bytes_) return absl::InternalError("the peer's slots have another size");
  if (a.process == ThisProcess()) {
    if (a.device != device_) {
      return absl::UnimplementedError("ranks of one process on two GPUs exchange through the host");
    }
    peer_memory_ = a.memory;
    std::copy(a.posted, a.posted + kSlots, peer_posted_);
    return absl::OkStatus();
  }
  if (a.shareable == 0) {
    return absl::UnavailableError("the system does not share GPU memory between processes");
  }
  absl::Status opened = Open(a);
  if (!opened.ok()) cudaGetLastError();  // said here
  return opened;
}

absl::Status CudaMailbox::Open(const Address& peer) {
  void* memory = nullptr;
  SHOAL_RETURN_IF_ERROR(
      ToStatus(cudaIpcOpenMemHandle(&memory, peer.memory_handle, cudaIpcMemLazyEnablePeerAccess),
               "opening a peer's memory"));
  opened_ = true;
  peer_memory_ = static_cast<uint8_t*>(memory);
  for (int i = 0; i < kSlots; ++i) {
    SHOAL_RETURN_IF_ERROR(ToStatus(cudaIpcOpenEventHandle(&peer_posted_[i], peer.posted_handle[i]),
                                   "opening a peer's event"));
  }
  return absl::OkStatus();
}

absl::Status CudaMailbox::Post(int slot, const void* data, int64_t bytes) {
  SHOAL_CHECK(slot >= 0 && slot < kSlots && bytes <= slot_bytes_, "a message fits its slot");
  SHOAL_RETURN_IF_ERROR(ToStatus(cudaMemcpyAsync(peer_memory_ + slot * slot_bytes_, data, bytes,
                                                 cudaMemcpyDeviceToDevice, stream_),
                                 "copying to a peer"));
  return ToStatus(cudaEventRecord(posted_[slot].get(), stream_), "copying to a peer");
}

absl::StatusOr<const void*> CudaMailbox::Read(int slot) {
  SHOAL_CHECK(slot >= 0 && slot < kSlots, "there are two slots");
  SHOAL_RETURN_IF_ERROR(
      ToStatus(cudaStreamWaitEvent(stream_, peer_posted_[slot], 0), "waiting for a peer's copy"));
  return memory_.data() + slot * slot_bytes_;
}

}  // namespace shoal::cuda
