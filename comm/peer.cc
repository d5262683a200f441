#include "comm/peer.h"

#include <chrono>
#include <cstdlib>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "comm/agree.h"
#include "comm/over_base.h"
#include "kernels/status_macros.h"

namespace shoal {
namespace {

using Clock = std::chrono::steady_clock;

class PeerCommunicator final : public OverBase {
 public:
  PeerCommunicator(Communicator& host, Backend& device, std::unique_ptr<PeerMailbox> mailbox)
      : host_(host), device_(device), mailbox_(std::move(mailbox)) {}

  int rank() const override { return host_.rank(); }
  int size() const override { return host_.size(); }
  std::string host(int rank) const override { return host_.host(rank); }

  absl::Status AllReduceSum(float* data, int64_t count, Wire wire) override {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(float));
    if (bytes > kPeerSumBytes) return base().AllReduceSum(data, count, wire);
    const Clock::time_point start = Clock::now();
    const absl::Status status = Exchange(data, count, bytes);
    seconds_ += std::chrono::duration<double>(Clock::now() - start).count();
    return status;
  }
  // Of the host's thread: sums go on beside it.
  double all_reduce_seconds() const override { return seconds_ + base().all_reduce_seconds(); }

  absl::Status Exchange(float* data, int64_t count, int64_t bytes) {
    // The slot is free: the peer's sum from it is behind its post of the next slot, in its queue,
    // and the sum that waited for that post is behind us in ours.
    const int slot = static_cast<int>(sums_++ % PeerMailbox::kSlots);
    SHOAL_RETURN_IF_ERROR(mailbox_->Post(slot, data, bytes));
    const int64_t mine[2] = {sums_, count};
    int64_t all[2][2] = {};
    SHOAL_RETURN_IF_ERROR(host_.AllGather(mine, sizeof mine, all));
    if (all[0][0] != all[1][0] || all[0][1] != all[1][1]) {
      return absl::InternalError(absl::StrCat("rank 0 is at sum ", all[0][0], " of ", all[0][1],
                                              " numbers, rank 1 at ", all[1][0], " of ",
                                              all[1][1]));
    }
    SHOAL_ASSIGN_OR_RETURN(const void* other, mailbox_->Read(slot));
    device_.Add(data, count, static_cast<const float*>(other), count, 1, static_cast<int>(count));
    return absl::OkStatus();
  }

 private:
  Communicator& host_;
  Backend& device_;
  const std::unique_ptr<PeerMailbox> mailbox_;
  int64_t sums_ = 0;
  double seconds_ = 0;
};

// Whether sums over both slots, and over slots used again, are right. Reads them back.
bool TrialWorks(PeerCommunicator& peer, Backend& device) {
  constexpr int kCount = 1000, kRounds = 5;
  absl::StatusOr<DeviceMemory> memory = device.Allocate(kCount * sizeof(float));
  bool right = memory.ok();
  std::vector<float> values(kCount);
  for (int round = 0; round < kRounds; ++round) {
    // Every rank takes part to the end, whatever it has seen: the other one waits for it.
    for (int i = 0; i < kCount; ++i) {
      values[i] = static_cast<float>((i + round) * (peer.rank() == 0 ? 1 : 1000));
    }
    if (!memory.ok()) return false;
    device.Copy(memory->data(), values.data(), memory->size());
    if (!peer.Exchange(memory->as<float>(), kCount, memory->size()).ok()) return false;
    device.Copy(values.data(), memory->data(), memory->size());
    for (int i = 0; i < kCount; ++i) right &= values[i] == static_cast<float>((i + round) * 1001);
  }
  return right;
}

}  // namespace

absl::StatusOr<PeerResult> MakePeerCommunicator(std::unique_ptr<Communicator> base,
                                                Communicator& host, Backend& device) {
  PeerResult result;
  if (host.size() != 2 || host.host(0) != host.host(1)) {
    result.communicator = std::move(base);
    result.why_not = "only between two ranks of one host";
    return result;
  }
  // Every step is taken by both ranks or by none.
  const char* off = std::getenv("SHOAL_PEER_SUMS");
  absl::StatusOr<std::unique_ptr<PeerMailbox>> mailbox =
      off != nullptr && std::string(off) == "0"
          ? absl::UnavailableError("switched off (SHOAL_PEER_SUMS=0)")
          : device.MakeMailbox(kPeerSumBytes);
  SHOAL_ASSIGN_OR_RETURN(bool agreed, AllAgree(host, mailbox.status(), &result.why_not));
  std::unique_ptr<PeerCommunicator> peer;
  if (agreed) {
    const MailboxAddress mine = (*mailbox)->address();
    MailboxAddress all[2];
    SHOAL_RETURN_IF_ERROR(host.AllGather(&mine, sizeof mine, all));
    SHOAL_ASSIGN_OR_RETURN(
        agreed, AllAgree(host, (*mailbox)->Connect(all[1 - host.rank()]), &result.why_not));
  }
  if (agreed) {
    peer = std::make_unique<PeerCommunicator>(host, device, *std::move(mailbox));
    const absl::Status works = TrialWorks(*peer, device)
                                   ? absl::OkStatus()
                                   : absl::UnavailableError("a trial gave wrong sums");
    SHOAL_RETURN_IF_ERROR(device.Check());
    SHOAL_ASSIGN_OR_RETURN(agreed, AllAgree(host, works, &result.why_not));
  }
  if (!agreed) {
    result.communicator = std::move(base);
    return result;
  }
  peer->SetBase(std::move(base));
  result.communicator = std::move(peer);
  return result;
}

}  // namespace shoal
