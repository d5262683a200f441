// One rank of a job under mpirun, for mpi_test.py: what it does is the first argument. Exit codes
// are as in shoal: 0 done, 1 a check failed, 69 a peer was lost.
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "comm/comm_bench.h"
#include "comm/communicator.h"
#include "comm/group.h"
#include "tests/comm/all_reduce_check.h"
#include "tests/comm/require.h"

namespace shoal {
namespace {

int AllReduces(Communicator& comm) {
  auto& group = dynamic_cast<GroupCommunicator&>(comm);
  for (const AllReduceAlgorithm algorithm :
       {AllReduceAlgorithm::kOneShot, AllReduceAlgorithm::kTwoPhase, AllReduceAlgorithm::kAuto}) {
    group.set_algorithm(algorithm);
    for (const Wire wire : {Wire::kF32, Wire::kF16, Wire::kQ8}) {
      std::vector<int64_t> counts = {1, 33, 1000, 8192, 70001, 1 << 20};
      if (comm.size() == 2 && algorithm == AllReduceAlgorithm::kAuto) counts.push_back(16 << 20);
      for (const int64_t count : counts) {
        std::vector<float> data = Contribution(comm.rank(), count);
        REQUIRE_OK(comm.AllReduceSum(data.data(), count, wire));
        const std::string difference = CompareToSerial(comm.size(), wire, data);
        REQUIRE(difference.empty(), difference);
        // The same bits everywhere: each compares with rank 0's.
        std::vector<float> first = data;
        REQUIRE_OK(comm.Broadcast(first.data(), count * sizeof(float), 0));
        REQUIRE(std::memcmp(first.data(), data.data(), count * sizeof(float)) == 0,
                absl::StrCat(count, " elements, ", WireName(wire)));
      }
    }
  }
  return 0;
}

int OtherCollectives(Communicator& comm) {
  const int rank = comm.rank(), size = comm.size();
  std::vector<int> ranks(size);
  REQUIRE_OK(comm.AllGather(&rank, sizeof rank, ranks.data()));
  for (int r = 0; r < size; ++r) REQUIRE(ranks[r] == r, absl::StrCat(ranks[r]));

  // Around the ring, all at once, longer than MPI's own buffers, while the receivers are late.
  if (size > 1) {
    constexpr size_t kBytes = 1 << 20;
    const std::vector<uint8_t> out(kBytes, static_cast<uint8_t>(rank + 1));
    std::vector<uint8_t> in(kBytes);
    const int next = (rank + 1) % size, previous = (rank + size - 1) % size;
    for (int i = 0; i < 8; ++i) REQUIRE_OK(comm.Send(out.data(), kBytes, next, i));
    for (int i = 7; i >= 0; --i) {
      REQUIRE_OK(comm.Recv(in.data(), kBytes, previous, i));
      REQUIRE(in[0] == previous + 1 && in[kBytes - 1] == previous + 1, "ring");
    }
  }
  auto half = comm.Split(rank % 2, rank);
  REQUIRE_OK(half.status());
  float one = 1;
  REQUIRE_OK((*half)->AllReduceSum(&one, 1, Wire::kF32));
  REQUIRE(one == static_cast<float>((size + 1 - rank % 2) / 2), absl::StrCat(one));
  REQUIRE_OK(comm.Barrier());
  return 0;
}

// All-reduces until something ends it. Prints its process id first, so that the test can choose
// whom to stop.
int Loop(Communicator& comm) {
  std::printf("rank %d pid %d\n", comm.rank(), static_cast<int>(getpid()));
  std::fflush(stdout);
  std::vector<float> data(8192, 1.0f);
  while (true) {
    std::fill(data.begin(), data.end(), 1.0f);
    const absl::Status status = comm.AllReduceSum(data.data(), data.size(), Wire::kF32);
    if (!status.ok()) return status.code() == absl::StatusCode::kUnavailable ? 69 : 1;
  }
}

// One long computation that never looks at the communicator.
int Compute(Communicator& comm) {
  std::printf("rank %d pid %d\n", comm.rank(), static_cast<int>(getpid()));
  std::fflush(stdout);
  volatile double x = 1;
  while (true) x = x * 1.0000001;
}

// Rank 0 computes for longer than the heartbeats' patience before it joins the others.
int Slow(Communicator& comm) {
  if (comm.rank() == 0) std::this_thread::sleep_for(std::chrono::seconds(6));
  float one = 1;
  REQUIRE_OK(comm.AllReduceSum(&one, 1, Wire::kF32));
  return one == static_cast<float>(comm.size()) ? 0 : 1;
}

int AbortByOne(Communicator& comm) {
  if (comm.rank() == 1) {
    comm.Abort(absl::DataLossError("shard 1 is corrupt"));
    return 65;
  }
  float one = 1;
  const absl::Status status = comm.AllReduceSum(&one, 1, Wire::kF32);
  std::fprintf(stderr, "%s\n", status.ToString().c_str());
  return ExitCode(status);
}

// Rank 1 leaves while the others still want something from it.
int LeaveEarly(Communicator& comm) {
  if (comm.rank() == 1) return 0;
  float one = 1;
  const absl::Status status = comm.AllReduceSum(&one, 1, Wire::kF32);
  std::fprintf(stderr, "%s\n", status.ToString().c_str());
  return ExitCode(status);
}

int Bench(Communicator& comm) {
  if (comm.rank() == 0) std::printf("%s\n", CommBenchHeader().c_str());
  for (const Wire wire : {Wire::kF32, Wire::kF16, Wire::kQ8}) {
    CommBenchOptions options;
    options.wire = wire;
    options.time_per_size = absl::Milliseconds(100);
    REQUIRE_OK(RunCommBench(comm, options, [](const CommBenchRow& row) {
      std::printf("%s\n", FormatCommBenchRow(row).c_str());
    }));
  }
  return 0;
}

int Main(std::string_view what) {
  MpiOptions options;
  options.on_peer_lost = EndProcessOnPeerLoss;
  auto comm = MakeMpiCommunicator(options);
  REQUIRE_OK(comm.status());
  if (what == "all_reduce") return AllReduces(**comm);
  if (what == "collectives") return OtherCollectives(**comm);
  if (what == "loop") return Loop(**comm);
  if (what == "compute") return Compute(**comm);
  if (what == "slow") return Slow(**comm);
  if (what == "abort") return AbortByOne(**comm);
  if (what == "leave") return LeaveEarly(**comm);
  if (what == "bench") return Bench(**comm);
  std::fprintf(stderr, "unknown: %s\n", std::string(what).c_str());
  return 2;
}

}  // namespace
}  // namespace shoal

int main(int argc, char** argv) { return shoal::Main(argc > 1 ? argv[1] : ""); }
