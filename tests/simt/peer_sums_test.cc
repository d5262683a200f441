// One-shot sums of two ranks in one process, on one device: on a GPU too (tests/cuda), where both
// kernels are there at the same time, as they are small, or give up.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <vector>

#include "kernels/cuda/backend.h"
#include "kernels/peer_sums.h"

namespace shoal::cuda {
namespace {

constexpr int kRanks = 2, kCount = 3001;

float Term(int rank, int round, int i) {
  return static_cast<float>((i * 7919 + round * 104729 + rank * 1299709) % 65537) * 1e-3f;
}

class TwoRanks {
 public:
  // other_process: reach each other as ranks of two processes do. The first bytes of an address
  // name its process.
  TwoRanks(PeerMemory memory, bool other_process) {
    std::vector<PeerSumsAddress> all(kRanks);
    for (int r = 0; r < kRanks; ++r) {
      gpus_[r] = *CudaBackend::Create(0);
      sums_[r] = *gpus_[r]->MakePeerSums(memory, r, kRanks);
      sums_[r]->SetPatience(std::chrono::seconds(20), std::chrono::seconds(20));
      all[r] = sums_[r]->address();
      if (other_process) all[r].bytes[0] ^= 0xFF;
      data_[r] = *gpus_[r]->Allocate(kCount * 4);
    }
    for (int r = 0; r < kRanks; ++r) {
      const absl::Status s = sums_[r]->Connect(all);
      EXPECT_TRUE(s.ok()) << s;
    }
  }

  void Enqueue(int rank) { sums_[rank]->Enqueue(data_[rank].as<float>(), kCount); }
  cudaStream_t stream(int rank) {
    return static_cast<cudaStream_t>(gpus_[rank]->queue()->handle());
  }
  template <typename Sum>
  void ExpectSums(int round, const Sum& sum) {
    std::vector<float> host(kCount);
    for (int r = 0; r < kRanks; ++r) {
      for (int i = 0; i < kCount; ++i) host[i] = Term(r, round, i);
      gpus_[r]->Copy(data_[r].data(), host.data(), kCount * 4);
    }
    for (int r = 0; r < kRanks; ++r) sum(r);
    for (int r = 0; r < kRanks; ++r) {
      gpus_[r]->Copy(host.data(), data_[r].data(), kCount * 4);
      ASSERT_FALSE(sums_[r]->Missing().has_value());
      for (int i = 0; i < kCount; ++i) {
        ASSERT_EQ(host[i], Term(0, round, i) + Term(1, round, i)) << round << ": " << i;
      }
    }
  }

 private:
  std::unique_ptr<CudaBackend> gpus_[kRanks];
  std::unique_ptr<PeerSums> sums_[kRanks];
  DeviceMemory data_[kRanks];
};

void ExpectRightAgainAndAgain(PeerMemory memory, bool other_process) {
  TwoRanks two(memory, other_process);
  for (int round = 0; round < 7; ++round) {
    two.ExpectSums(round, [&](int r) { two.Enqueue(r); });
  }
}

TEST(PeerSums, ThroughDeviceMemory) { ExpectRightAgainAndAgain(PeerMemory::kDevice, false); }
TEST(PeerSums, ThroughHostMemory) { ExpectRightAgainAndAgain(PeerMemory::kHost, false); }
#if defined(SHOAL_SIMT)  // CUDA opens no handle of its own process
TEST(PeerSums, ThroughDeviceMemoryOfAnotherProcess) {
  ExpectRightAgainAndAgain(PeerMemory::kDevice, true);
}
#endif
TEST(PeerSums, ThroughHostMemoryOfAnotherProcess) {
  ExpectRightAgainAndAgain(PeerMemory::kHost, true);
}

TEST(PeerSums, ReplayedSumsAreThoseOfTheirRound) {
  TwoRanks two(PeerMemory::kDevice, false);
  two.ExpectSums(0, [&](int r) { two.Enqueue(r); });
  cudaGraphExec_t replay[kRanks] = {};
  for (int r = 0; r < kRanks; ++r) {
    cudaGraph_t graph = nullptr;
    ASSERT_EQ(cudaStreamBeginCapture(two.stream(r), cudaStreamCaptureModeThreadLocal), cudaSuccess);
    two.Enqueue(r);
    ASSERT_EQ(cudaStreamEndCapture(two.stream(r), &graph), cudaSuccess);
    ASSERT_EQ(cudaGraphInstantiate(&replay[r], graph, 0), cudaSuccess);
    cudaGraphDestroy(graph);
  }
  for (int round = 1; round < 6; ++round) {
    two.ExpectSums(round, [&](int r) { cudaGraphLaunch(replay[r], two.stream(r)); });
  }
  for (const cudaGraphExec_t r : replay) cudaGraphExecDestroy(r);
}

}  // namespace
}  // namespace shoal::cuda
