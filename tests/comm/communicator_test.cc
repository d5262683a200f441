// Communicators of threads: all-reduce against a serial reference, the other collectives, faults.
#include "comm/communicator.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "comm/group.h"
#include "comm/wire.h"
#include "comm/wire_choice.h"
#include "tests/comm/all_reduce_check.h"

namespace shoal {
namespace {

using ::testing::HasSubstr;

// Runs `body` as every rank of a world and returns when all are done.
void RunRanks(int size, const std::function<void(Communicator&)>& body,
              absl::Duration stall = absl::Seconds(60)) {
  auto ranks = MakeInProcessCommunicators(size, stall);
  std::vector<std::thread> threads;
  for (auto& rank : ranks) {
    threads.emplace_back([&body, comm = std::move(rank)]() { body(*comm); });
  }
  for (std::thread& thread : threads) thread.join();
}

// One all-reduce on every rank; returns rank 0's result after checking that all ranks have its
// bits.
std::vector<float> AllReduce(int size, int64_t count, Wire wire, AllReduceAlgorithm algorithm) {
  std::vector<std::vector<float>> results(size);
  RunRanks(size, [&](Communicator& comm) {
    if (size > 1) dynamic_cast<GroupCommunicator&>(comm).set_algorithm(algorithm);
    std::vector<float> data = Contribution(comm.rank(), count);
    const absl::Status status = comm.AllReduceSum(data.data(), count, wire);
    EXPECT_TRUE(status.ok()) << status;
    results[comm.rank()] = std::move(data);
  });
  for (int r = 1; r < size; ++r) {
    EXPECT_EQ(std::memcmp(results[0].data(), results[r].data(), count * sizeof(float)), 0)
        << "rank " << r << " of " << size << " has other bits, count " << count;
  }
  return results[0];
}

class AllReduceTest : public ::testing::TestWithParam<std::tuple<Wire, AllReduceAlgorithm>> {};

TEST_P(AllReduceTest, MatchesTheSerialSumForEveryWorldAndSize) {
  const auto [wire, algorithm] = GetParam();
  for (int size = 1; size <= 8; ++size) {
    for (int64_t count : {1, 2, 31, 32, 33, 255, 1000, 4096, 70001}) {
      const std::vector<float> result = AllReduce(size, count, wire, algorithm);
      EXPECT_EQ(CompareToSerial(size, wire, result), "") << size << " ranks";
    }
  }
}

TEST_P(AllReduceTest, MatchesTheSerialSumAt64MegabytesAndManyPieces) {
  const auto [wire, algorithm] = GetParam();
  // 64 MB. One-shot keeps every rank's array on every rank, so its world is the small one.
  constexpr int64_t kLargest = 16 << 20;
  const bool one_shot = algorithm == AllReduceAlgorithm::kOneShot;
  for (auto [size, count] : {std::pair{one_shot ? 2 : 8, kLargest}, {3, (1 << 20) + 77}}) {
    const std::vector<float> result = AllReduce(size, count, wire, algorithm);
    EXPECT_EQ(CompareToSerial(size, wire, result), "") << size << " ranks";
  }
}

INSTANTIATE_TEST_SUITE_P(, AllReduceTest,
                         ::testing::Combine(::testing::Values(Wire::kF32, Wire::kF16, Wire::kQ8),
                                            ::testing::Values(AllReduceAlgorithm::kOneShot,
                                                              AllReduceAlgorithm::kTwoPhase)),
                         [](const auto& info) {
                           const bool one_shot =
                               std::get<1>(info.param) == AllReduceAlgorithm::kOneShot;
                           return std::string(WireName(std::get<0>(info.param))) +
                                  (one_shot ? "_one_shot" : "_two_phase");
                         });

TEST(Communicator, ChosenAlgorithmDependsOnSizeAndSumsRight) {
  EXPECT_EQ(ChooseAllReduce(4, 4096, Wire::kF32), AllReduceAlgorithm::kOneShot);
  EXPECT_EQ(ChooseAllReduce(4, 1 << 20, Wire::kF32), AllReduceAlgorithm::kTwoPhase);
  for (int64_t count : {100, 1 << 18}) {
    const std::vector<float> result = AllReduce(4, count, Wire::kF32, AllReduceAlgorithm::kAuto);
    EXPECT_EQ(CompareToSerial(4, Wire::kF32, result), "");
  }
}

TEST(Communicator, F32SumIsTheSumInRankOrder) {
  constexpr int64_t kCount = 1000;
  std::vector<float> expected = Contribution(0, kCount);
  for (int r = 1; r < 5; ++r) {
    const std::vector<float> term = Contribution(r, kCount);
    for (int64_t i = 0; i < kCount; ++i) expected[i] += term[i];
  }
  EXPECT_EQ(AllReduce(5, kCount, Wire::kF32, AllReduceAlgorithm::kOneShot), expected);
  EXPECT_EQ(AllReduce(5, kCount, Wire::kF32, AllReduceAlgorithm::kTwoPhase), expected);
}

TEST(Communicator, ASumHasTheSameBitsWhicheverWayItTravelsAndWhateverStandsBesideIt) {
  for (Wire wire : {Wire::kF32, Wire::kF16, Wire::kQ8}) {
    const std::vector<float> one = AllReduce(3, 4096, wire, AllReduceAlgorithm::kOneShot);
    EXPECT_EQ(AllReduce(3, 4096, wire, AllReduceAlgorithm::kTwoPhase), one) << WireName(wire);
    std::vector<float> longer = AllReduce(3, 70016, wire, AllReduceAlgorithm::kTwoPhase);
    longer.resize(one.size());
    EXPECT_EQ(longer, one) << WireName(wire);
  }
}

TEST(Communicator, TheWireSuitsTheLinkBetweenHosts) {
  EXPECT_EQ(WireForLink(0.117), Wire::kQ8);  // 1 Gbit/s
  EXPECT_EQ(WireForLink(0.29), Wire::kQ8);   // 2.5 Gbit/s
  EXPECT_EQ(WireForLink(1.1), Wire::kF16);   // 10 Gbit/s
  EXPECT_EQ(WireForLink(4.5), Wire::kF32);   // 40 Gbit/s
  RunRanks(4, [](Communicator& comm) {       // threads: one host
    const absl::StatusOr<WireChoice> choice = ChooseWire(comm, 2);
    ASSERT_TRUE(choice.ok()) << choice.status();
    EXPECT_EQ(choice->wire, Wire::kF32);
    EXPECT_EQ(choice->link_gbps, 0);
  });
}

TEST(Communicator, GathersBroadcastsAndPassesMessages) {
  for (int size = 1; size <= 8; ++size) {
    RunRanks(size, [size](Communicator& comm) {
      const int rank = comm.rank();
      std::vector<int> all(size, -1);
      ASSERT_TRUE(comm.AllGather(&rank, sizeof rank, all.data()).ok());
      for (int r = 0; r < size; ++r) EXPECT_EQ(all[r], r);

      for (int64_t bytes : {1, 1000, 3 << 20}) {  // the last goes down a chain
        for (int root = 0; root < size; root += 3) {
          std::vector<uint8_t> data(bytes, static_cast<uint8_t>(rank == root ? root + 1 : 0));
          ASSERT_TRUE(comm.Broadcast(data.data(), bytes, root).ok());
          EXPECT_EQ(data, std::vector<uint8_t>(bytes, static_cast<uint8_t>(root + 1)));
        }
      }

      // Around the ring, all at once, two tags received in the other order.
      if (size > 1) {
        const int next = (rank + 1) % size, previous = (rank + size - 1) % size;
        const int first = rank, second = rank + 100;
        ASSERT_TRUE(comm.Send(&first, sizeof first, next, 7).ok());
        ASSERT_TRUE(comm.Send(&second, sizeof second, next, 8).ok());
        int got_first = -1, got_second = -1;
        ASSERT_TRUE(comm.Recv(&got_second, sizeof got_second, previous, 8).ok());
        ASSERT_TRUE(comm.Recv(&got_first, sizeof got_first, previous, 7).ok());
        EXPECT_EQ(got_first, previous);
        EXPECT_EQ(got_second, previous + 100);
      }
      EXPECT_TRUE(comm.Barrier().ok());
    });
  }
}

TEST(Communicator, SplitsIntoGroupsThatWorkAtTheSameTime) {
  RunRanks(6, [](Communicator& world) {
    // Colors 0 and 1; keys reverse the order within a group.
    auto group = world.Split(world.rank() % 2, -world.rank());
    ASSERT_TRUE(group.ok()) << group.status();
    EXPECT_EQ((*group)->size(), 3);
    EXPECT_EQ((*group)->rank(), 2 - world.rank() / 2);
    float sum = static_cast<float>(world.rank());
    ASSERT_TRUE((*group)->AllReduceSum(&sum, 1, Wire::kF32).ok());
    EXPECT_EQ(sum, world.rank() % 2 == 0 ? 0 + 2 + 4 : 1 + 3 + 5);

    auto alone = (*group)->Split(world.rank(), 0);
    ASSERT_TRUE(alone.ok());
    EXPECT_EQ((*alone)->size(), 1);
    sum = 5;
    ASSERT_TRUE((*alone)->AllReduceSum(&sum, 1, Wire::kQ8).ok());
    EXPECT_EQ(sum, 5);
    float total = 1;
    ASSERT_TRUE(world.AllReduceSum(&total, 1, Wire::kF32).ok());
    EXPECT_EQ(total, 6);
  });
}

TEST(Communicator, MissingPeerIsNamedWhenTheDeadlinePasses) {
  auto ranks = MakeInProcessCommunicators(2, absl::Milliseconds(50));
  float x = 1;
  const absl::Status status = ranks[0]->AllReduceSum(&x, 1, Wire::kF32);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(status.message()), HasSubstr("rank 1 on host"));
  // The late rank learns of it too.
  EXPECT_EQ(ranks[1]->AllReduceSum(&x, 1, Wire::kF32), status);
}

// A server is idle for a night, a person thinks about what to type.
TEST(Communicator, WhoWaitsForWorkWaitsLongerThanTheDeadline) {
  constexpr absl::Duration kStall = absl::Milliseconds(20);
  RunRanks(
      2,
      [&](Communicator& comm) {
        int work = 5;
        if (comm.rank() == 0) {
          absl::SleepFor(5 * kStall);
          EXPECT_TRUE(comm.Send(&work, sizeof work, 1, 1).ok());
        } else {
          EXPECT_TRUE(comm.Recv(&work, sizeof work, 0, 1).ok());
        }
      },
      kStall);
}

TEST(Communicator, DepartedRankFailsThoseWhoWaitForIt) {
  auto ranks = MakeInProcessCommunicators(2);
  int sent = 3;
  ASSERT_TRUE(ranks[1]->Send(&sent, sizeof sent, 0, 1).ok());
  ranks[1].reset();
  int got = 0;
  EXPECT_TRUE(ranks[0]->Recv(&got, sizeof got, 1, 1).ok());  // sent before it left
  EXPECT_EQ(got, 3);
  const absl::Status status = ranks[0]->Recv(&got, sizeof got, 1, 1);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(status.message()), HasSubstr("rank 1 on host"));
}

TEST(Communicator, AbortReachesPendingAndLaterCallsOfAllRanks) {
  for (int64_t count : {int64_t{10}, int64_t{1} << 20}) {
    RunRanks(4, [count](Communicator& comm) {
      auto group = comm.Split(0, comm.rank());
      ASSERT_TRUE(group.ok());
      int ready = 1;
      if (comm.rank() == 3) {
        for (int r = 0; r < 3; ++r) ASSERT_TRUE(comm.Recv(&ready, sizeof ready, r, 0).ok());
        comm.Abort(absl::DataLossError("block 7 of the shard is corrupt"));
        return;
      }
      ASSERT_TRUE(comm.Send(&ready, sizeof ready, 3, 0).ok());
      std::vector<float> data(count, 1.0f);
      const absl::Status status = (*group)->AllReduceSum(data.data(), count, Wire::kQ8);
      EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
      EXPECT_THAT(std::string(status.message()), HasSubstr("block 7"));
      EXPECT_EQ(comm.Barrier(), status);
    });
  }
}

TEST(Communicator, DifferentLengthsAreAnErrorThatNamesBoth) {
  RunRanks(2, [](Communicator& comm) {
    std::vector<uint8_t> data(8);
    if (comm.rank() == 0) {
      EXPECT_TRUE(comm.Send(data.data(), 8, 1, 0).ok());
    } else {
      const absl::Status status = comm.Recv(data.data(), 4, 0, 0);
      EXPECT_THAT(std::string(status.message()), HasSubstr("8 bytes"));
      EXPECT_THAT(std::string(status.message()), HasSubstr("expects 4"));
    }
  });
}

TEST(Communicator, AWorldOfOneCopiesItsGatherAndNothingElse) {
  auto self = MakeSelfCommunicator();
  EXPECT_EQ(self->size(), 1);
  float data = 3, out = 0;
  EXPECT_TRUE(self->AllReduceSum(&data, 1, Wire::kQ8).ok());
  EXPECT_EQ(data, 3);
  EXPECT_TRUE(self->AllGather(&data, sizeof data, &out).ok());
  EXPECT_EQ(out, 3);
  EXPECT_TRUE(self->Broadcast(&data, sizeof data, 0).ok());
  EXPECT_TRUE(self->Barrier().ok());
  EXPECT_TRUE(self->Split(1, 1).ok());
  self->Abort(absl::CancelledError("stop"));
  EXPECT_EQ(self->Barrier().code(), absl::StatusCode::kCancelled);
}

}  // namespace
}  // namespace shoal
