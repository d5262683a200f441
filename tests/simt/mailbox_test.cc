// Mailboxes of two ranks on the stand-in's device, as ranks of one process and as if of two.
#include "kernels/cuda/mailbox.h"

#include <gtest/gtest.h>

#include <cstring>
#include <thread>
#include <vector>

#include "comm/communicator.h"
#include "comm/peer.h"
#include "cuda_runtime.h"
#include "kernels/cuda/backend.h"

namespace shoal::cuda {
namespace {

// The first 8 bytes of an address name its process.
MailboxAddress OfAnotherProcess(MailboxAddress a) {
  a.bytes[0] ^= 0xFF;
  return a;
}

// Two ranks that add and overwrite in turn; a missing wait would show, as streams run in any order.
void ExchangeBetween(bool processes) {
  constexpr int kCount = 300, kBytes = kCount * 4;
  auto a = *CudaBackend::Create(0), b = *CudaBackend::Create(0);
  CudaBackend* const ranks[2] = {a.get(), b.get()};
  std::unique_ptr<PeerMailbox> boxes[2];
  DeviceMemory data[2];
  for (int r = 0; r < 2; ++r) {
    boxes[r] = *ranks[r]->MakeMailbox(kBytes);
    data[r] = *ranks[r]->Allocate(kBytes);
  }
  for (int r = 0; r < 2; ++r) {
    const MailboxAddress other = boxes[1 - r]->address();
    ASSERT_TRUE(boxes[r]->Connect(processes ? OfAnotherProcess(other) : other).ok());
  }
  std::vector<float> host(kCount);
  for (int round = 0; round < 40; ++round) {
    for (int r = 0; r < 2; ++r) {
      std::fill(host.begin(), host.end(), static_cast<float>(round * (r == 0 ? 1 : 1000)));
      ranks[r]->Copy(data[r].data(), host.data(), kBytes);
    }
    for (int r = 0; r < 2; ++r) {
      ASSERT_TRUE(boxes[r]->Post(round % PeerMailbox::kSlots, data[r].data(), kBytes).ok());
    }
    for (int r = 0; r < 2; ++r) {
      const auto other = boxes[r]->Read(round % PeerMailbox::kSlots);
      ASSERT_TRUE(other.ok());
      ranks[r]->Add(data[r].as<float>(), kCount, static_cast<const float*>(*other), kCount, 1,
                    kCount);
    }
    for (int r = 0; r < 2; ++r) {
      ranks[r]->Copy(host.data(), data[r].data(), kBytes);
      for (const float v : host) ASSERT_EQ(v, static_cast<float>(round * 1001)) << round;
    }
  }
  boxes[0].reset();
  boxes[1].reset();
}

TEST(CudaMailbox, RanksOfOneProcess) { ExchangeBetween(false); }
TEST(CudaMailbox, RanksOfTwoProcesses) { ExchangeBetween(true); }

TEST(CudaMailbox, ASystemThatSharesNothingIsSaidWhenItMatters) {
  simt::RefuseIpc(true);
  auto gpu = *CudaBackend::Create(0);
  const auto mine = *gpu->MakeMailbox(256), other = *gpu->MakeMailbox(256);
  const MailboxAddress address = other->address();
  simt::RefuseIpc(false);
  const absl::Status s = mine->Connect(OfAnotherProcess(address));
  EXPECT_EQ(s.code(), absl::StatusCode::kUnavailable) << s;
  EXPECT_TRUE(gpu->Check().ok());  // no error of later calls
  EXPECT_TRUE(mine->Connect(address).ok());
}

TEST(CudaMailbox, SumsOfTwoRanksGoThroughThem) {
  auto worlds = MakeInProcessCommunicators(2);
  const auto rank = [&worlds](int r) {
    auto gpu = *CudaBackend::Create(0);
    auto peer = MakePeerCommunicator(MakeSelfCommunicator(), *worlds[r], *gpu);
    ASSERT_TRUE(peer.ok()) << peer.status();
    EXPECT_EQ(peer->why_not, "");
    constexpr int kCount = 5000;
    const DeviceMemory data = *gpu->Allocate(kCount * 4);
    std::vector<float> host(kCount);
    for (int round = 0; round < 6; ++round) {
      for (int i = 0; i < kCount; ++i) host[i] = static_cast<float>(i + round + r * 7);
      gpu->Copy(data.data(), host.data(), data.size());
      ASSERT_TRUE(peer->communicator->AllReduceSum(data.as<float>(), kCount, Wire::kF32).ok());
      gpu->Copy(host.data(), data.data(), data.size());
      for (int i = 0; i < kCount; ++i) ASSERT_EQ(host[i], static_cast<float>(2 * (i + round) + 7));
    }
    ASSERT_TRUE(worlds[r]->Barrier().ok());
  };
  std::thread other(rank, 1);
  rank(0);
  other.join();
}

}  // namespace
}  // namespace shoal::cuda
