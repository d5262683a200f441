// One rank of a job under mpirun whose data plane is NCCL (the stand-in), for nccl_test.py: what it
// does is the first argument. Exit codes are as in shoal: 0 done, 1 a check failed, 69 a peer was
// lost.
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "comm/nccl.h"
#include "tests/comm/all_reduce_check.h"
#include "tests/comm/fake_nccl.h"
#include "tests/comm/require.h"

namespace shoal {
namespace {

// A device whose only work is NCCL's, and the host's side of waiting for it.
class TestQueue final : public DeviceQueue {
 public:
  ~TestQueue() override { fakeStreamDestroy(stream_); }
  void* handle() override { return stream_; }
  std::string device() const override { return absl::StrCat("test ", getpid()); }
  void AddWatch(std::function<absl::Status()> watch) override { watches_.push_back(watch); }

  absl::Status Wait() {
    while (true) {
      for (const auto& watch : watches_) {
        if (absl::Status s = watch(); !s.ok()) return s;
      }
      if (fakeStreamIdle(stream_)) return absl::OkStatus();
      std::this_thread::yield();
    }
  }

 private:
  void* const stream_ = fakeStreamCreate();
  std::vector<std::function<absl::Status()>> watches_;
};

struct World {
  std::unique_ptr<Communicator> host;
  TestQueue queue;
  std::unique_ptr<Communicator> nccl;
};

absl::Status Open(World& w, const NcclOptions& options = {}) {
  MpiOptions mpi;
  mpi.on_peer_lost = EndProcessOnPeerLoss;
  absl::StatusOr<std::unique_ptr<Communicator>> host = MakeMpiCommunicator(mpi);
  if (!host.ok()) return host.status();
  w.host = *std::move(host);
  absl::StatusOr<std::shared_ptr<const nccl::Api>> api = nccl::Load();
  if (!api.ok()) return api.status();
  absl::StatusOr<std::unique_ptr<Communicator>> nccl =
      MakeNcclCommunicator(*api, *w.host, w.queue, options);
  if (!nccl.ok()) return nccl.status();
  w.nccl = *std::move(nccl);
  return absl::OkStatus();
}

int Collectives(World& w) {
  Communicator& comm = *w.nccl;
  const int rank = comm.rank(), size = comm.size();
  for (const int64_t count : {1, 1000, 70001}) {
    std::vector<float> data = Contribution(rank, count);
    REQUIRE_OK(comm.AllReduceSum(data.data(), count, Wire::kQ8));  // NCCL sums f32 all the same
    REQUIRE_OK(w.queue.Wait());
    const std::string difference = CompareToSerial(size, Wire::kF32, data);
    REQUIRE(difference.empty(), difference);
  }
  const std::vector<int> mine(30000, rank);
  std::vector<int> all(mine.size() * size);
  REQUIRE_OK(comm.AllGather(mine.data(), mine.size() * sizeof(int), all.data()));
  std::vector<int> root(30000, rank == size - 1 ? 77 : 0);
  REQUIRE_OK(comm.Broadcast(root.data(), root.size() * sizeof(int), size - 1));
  // Down the pipeline, several messages in flight.
  std::vector<std::vector<int>> hidden(3, std::vector<int>(40000));
  for (int i = 0; i < 3; ++i) {
    if (rank > 0) REQUIRE_OK(comm.Recv(hidden[i].data(), 160000, rank - 1, 1));
    if (rank == 0) hidden[i].assign(40000, i + 5);
    if (rank + 1 < size) REQUIRE_OK(comm.Send(hidden[i].data(), 160000, rank + 1, 1));
  }
  REQUIRE_OK(w.queue.Wait());
  for (int r = 0; r < size; ++r) {
    REQUIRE(all[r * mine.size()] == r && all[(r + 1) * mine.size() - 1] == r, absl::StrCat(r));
  }
  REQUIRE(root[0] == 77 && root.back() == 77, absl::StrCat(root[0]));
  for (int i = 0; i < 3; ++i) REQUIRE(hidden[i][0] == i + 5 && hidden[i][39999] == i + 5, "order");

  auto half = comm.Split(rank % 2, rank);
  REQUIRE_OK(half.status());
  float one = 1;
  REQUIRE_OK((*half)->AllReduceSum(&one, 1, Wire::kF32));
  REQUIRE_OK(w.queue.Wait());
  const int half_size = (size + 1 - rank % 2) / 2;
  REQUIRE(one == static_cast<float>(half_size), absl::StrCat(one));
  REQUIRE_OK(comm.Barrier());
  return 0;
}

int Loop(World& w) {
  std::printf("rank %d pid %d\n", w.nccl->rank(), static_cast<int>(getpid()));
  std::fflush(stdout);
  std::vector<float> data(8192);
  while (true) {
    std::fill(data.begin(), data.end(), 1.0f);
    absl::Status status = w.nccl->AllReduceSum(data.data(), data.size(), Wire::kF32);
    if (status.ok()) status = w.queue.Wait();
    if (!status.ok()) return ExitCode(status);
  }
}

// NCCL itself reports a failure on every rank: the work on the device ends, and so does every later
// call.
int AsyncError(World& w) {
  fakeFailAfter(w.nccl->rank() == 1 ? 3 : 1 << 20);
  float x = 1;
  absl::Status status;
  for (int i = 0; i < 10 && status.ok(); ++i) {
    status = w.nccl->AllReduceSum(&x, 1, Wire::kF32);
    if (status.ok() && w.nccl->rank() == 1) status = w.queue.Wait();
  }
  if (w.nccl->rank() != 1) {  // never told by the library: the failed rank aborts the job
    status = w.queue.Wait();
  } else {
    std::fprintf(stderr, "%s\n", std::string(status.message()).c_str());
    REQUIRE(absl::IsUnavailable(status), status.ToString());
    REQUIRE(fakeStreamIdle(w.queue.handle()) || !w.queue.Wait().ok(), "the queue was left busy");
    REQUIRE(w.nccl->AllReduceSum(&x, 1, Wire::kF32) == status, "a broken communicator worked");
    w.nccl->Abort(status);
  }
  return ExitCode(status);
}

// Rank 1 never joins NCCL.
int Absent() {
  MpiOptions mpi;
  auto host = MakeMpiCommunicator(mpi);
  REQUIRE_OK(host.status());
  auto api = nccl::Load();
  REQUIRE_OK(api.status());
  TestQueue queue;
  if ((*host)->rank() == 1) {
    char invitation[256];
    REQUIRE_OK((*host)->Broadcast(invitation, sizeof(nccl::UniqueId) + sizeof(nccl::Result), 0));
    return (*host)->Barrier().ok() ? 0 : 69;
  }
  NcclOptions options;
  options.start = absl::Milliseconds(300);
  const absl::Status status = MakeNcclCommunicator(*api, **host, queue, options).status();
  std::fprintf(stderr, "%s\n", std::string(status.message()).c_str());
  REQUIRE(absl::IsUnavailable(status), status.ToString());
  REQUIRE_OK((*host)->Barrier());
  return 0;
}

int Main(std::string_view what) {
  if (what == "absent") return Absent();
  World w;
  REQUIRE_OK(Open(w));
  if (what == "collectives") return Collectives(w);
  if (what == "loop") return Loop(w);
  if (what == "async_error") return AsyncError(w);
  std::fprintf(stderr, "unknown: %s\n", std::string(what).c_str());
  return 2;
}

}  // namespace
}  // namespace shoal

int main(int argc, char** argv) { return shoal::Main(argc > 1 ? argv[1] : ""); }
