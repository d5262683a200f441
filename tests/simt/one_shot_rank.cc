// One rank of a job under mpirun with a device of the stand-in, for one_shot_processes_test.py:
// one-shot sums through memory that other processes own. Arguments: what to do, and "peer" or
// "host" memory. Exit codes are as in shoal: 0 done, 1 a check failed, 69 a peer was lost.
#include <unistd.h>

#include <cstdio>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "comm/communicator.h"
#include "comm/one_shot.h"
#include "comm/staged.h"
#include "cuda_runtime.h"
#include "kernels/cuda/backend.h"
#include "simt/api.h"
#include "tests/comm/require.h"
#include "tests/simt/one_shot_terms.h"

namespace shoal {
namespace {

struct World {
  std::unique_ptr<Communicator> host;
  std::unique_ptr<cuda::CudaBackend> gpu;
  OneShotResult made;
};

absl::Status Open(World& w, std::string_view what) {
  MpiOptions mpi;  // without on_peer_lost: what is tested is who waits for a kernel
  if (what == "blind") mpi.exit_after = absl::Minutes(1);
  absl::StatusOr<std::unique_ptr<Communicator>> host = MakeMpiCommunicator(mpi);
  if (!host.ok()) return host.status();
  w.host = *std::move(host);
  simt::SetDevices(w.host->size());
  absl::StatusOr<std::unique_ptr<cuda::CudaBackend>> gpu =
      cuda::CudaBackend::Create(w.host->rank());
  if (!gpu.ok()) return gpu.status();
  w.gpu = *std::move(gpu);
  OneShotOptions options;
  options.measure = false;
  options.trial = absl::Seconds(60);
  absl::StatusOr<OneShotResult> made =
      MakeOneShotCommunicator(MakeStagedCommunicator(*w.host, *w.gpu), *w.host, *w.gpu, options);
  if (!made.ok()) return made.status();
  w.made = *std::move(made);
  return absl::OkStatus();
}

// Bits of sums of every kind of length, one behind the other, some at an address that is not
// aligned.
int Sums(World& w) {
  Communicator& c = *w.made.communicator;
  const int64_t most = c.recordable_sum();
  REQUIRE(most > 0, w.made.why_not);
  int round = 0;
  for (const int64_t count : {int64_t{1}, int64_t{3}, int64_t{1025}, most, most, most + 1}) {
    const DeviceMemory data = *w.gpu->Allocate((count + 1) * 4);
    float* const at = data.as<float>() + round % 2;
    std::vector<float> numbers(count);
    for (int64_t i = 0; i < count; ++i) numbers[i] = Term(c.rank(), round, i);
    w.gpu->Copy(at, numbers.data(), count * 4);
    REQUIRE_OK(c.AllReduceSum(at, count, Wire::kF32));
    w.gpu->Copy(numbers.data(), at, count * 4);
    REQUIRE_OK(w.gpu->Check());
    for (int64_t i = 0; i < count; ++i) {
      REQUIRE(numbers[i] == SumInOrder(c.size(), round, i), std::to_string(i));
    }
    ++round;
  }
  REQUIRE_OK(w.host->Barrier());
  return 0;
}

// Sums without an end. blind: the host waits for the device alone and asks nobody.
int Loop(World& w, bool blind) {
  std::printf("rank %d pid %d\n", w.host->rank(), static_cast<int>(getpid()));
  std::fflush(stdout);
  const DeviceMemory data = *w.gpu->Allocate(4096 * 4);
  absl::Status status;
  while (status.ok()) {
    status = w.made.communicator->AllReduceSum(data.as<float>(), 4096, Wire::kF32);
    if (!status.ok()) break;
    if (blind) {
      cudaStreamSynchronize(static_cast<cudaStream_t>(w.gpu->queue()->handle()));
    } else {
      w.gpu->Wait();
    }
    status = w.gpu->Check();
  }
  std::fprintf(stderr, "rank %d: %s\n", w.host->rank(), std::string(status.message()).c_str());
  std::fflush(stderr);
  return ExitCode(status);
}

int Main(std::string_view what, std::string_view memory) {
  simt::ShareMemory();
  simt::RefusePeerAccess(memory == "host");
  World w;
  REQUIRE_OK(Open(w, what));
  REQUIRE(absl::StartsWith(w.made.way, memory == "host" ? "host memory" : "peer memory"),
          w.made.way + w.made.why_not);
  if (what == "sums") return Sums(w);
  if (what == "loop" || what == "blind") return Loop(w, what == "blind");
  std::fprintf(stderr, "unknown: %s\n", std::string(what).c_str());
  return 2;
}

}  // namespace
}  // namespace shoal

int main(int argc, char** argv) { return argc > 2 ? shoal::Main(argv[1], argv[2]) : 2; }
