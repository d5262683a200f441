// A stand-in for libnccl.so.2 whose sums are work on the streams of tests/simt: ranks are threads
// of one process with a device each. As in NCCL, calls only enqueue and may be captured; a peer
// that does not come leaves the stream busy until the communicator is aborted, and a communicator
// whose work a graph holds does not end before the graph. Sums only: what steps record.
#include "tests/simt/fake_nccl.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "comm/nccl_api.h"
#include "simt/api.h"

namespace {

using shoal::nccl::Config;
using shoal::nccl::kInProgress;
using shoal::nccl::kSuccess;
using shoal::nccl::Result;
using shoal::nccl::UniqueId;

constexpr int kInvalidUsage = 5, kRemoteError = 6;

std::atomic<int> fail_after{0}, misuses{0};

// What the ranks of one communicator share. Rounds are counted on the device: a replayed sum is
// whichever comes next. Used by stream work, which runs under one lock, but for the atomics.
struct Group {
  struct Round {
    std::vector<std::vector<float>> terms;  // by rank, in order
    int arrived = 0, left = 0, captured = 0;
  };
  int ranks = 0;
  std::atomic<int> joined{0};
  std::atomic<bool> failed{false};
  std::map<int64_t, Round> rounds;

  Round& At(int64_t n) {
    Round& r = rounds[n];
    r.terms.resize(ranks);
    return r;
  }
};

struct Member {
  std::shared_ptr<Group> group;
  int rank = 0;
  int64_t round = 0;  // of the device
  std::atomic<bool> aborted{false};
};

std::mutex groups_mutex;
std::map<std::string, std::shared_ptr<Group>>& Groups() {
  static auto* groups = new std::map<std::string, std::shared_ptr<Group>>;
  return *groups;
}

void Arrive(Member& m, const float* in, size_t count, bool captured) {
  if (m.aborted) return;
  if (fail_after > 0 && --fail_after == 0) m.group->failed = true;
  Group::Round& round = m.group->At(m.round);
  round.terms[m.rank].assign(in, in + count);
  round.captured += captured ? 1 : 0;
  ++round.arrived;
}

bool AllArrived(Member& m) {
  return m.aborted || (!m.group->failed && m.group->At(m.round).arrived == m.group->ranks);
}

void Finish(Member& m, float* out, size_t count) {
  if (m.aborted) return;
  Group::Round& round = m.group->At(m.round);
  if (round.captured != 0 && round.captured != m.group->ranks) ++misuses;
  for (const std::vector<float>& term : round.terms) {
    if (term.size() != count) m.group->failed = true;
  }
  if (m.group->failed) return;
  for (size_t i = 0; i < count; ++i) {
    float sum = 0;
    for (const std::vector<float>& term : round.terms) sum += term[i];
    out[i] = sum;
  }
  if (++round.left == m.group->ranks) m.group->rounds.erase(m.round);
  ++m.round;
}

}  // namespace

namespace shoal::nccl {
struct Comm {
  std::shared_ptr<Member> member;
  std::shared_ptr<int> held = std::make_shared<int>();  // by recorded work
};
}  // namespace shoal::nccl
using shoal::nccl::Comm;

namespace {

// NCCL polls until no graph holds the communicator: forever, if nobody lets go of it.
Result End(Comm* comm) {
  const auto patience = std::chrono::steady_clock::now() + std::chrono::seconds(2);
  while (comm->held.use_count() > 1) {
    simt::RunAsMuchAsCanBe();
    if (std::chrono::steady_clock::now() > patience) {
      ++misuses;
      break;
    }
    std::this_thread::yield();
  }
  delete comm;
  return kSuccess;
}

}  // namespace

extern "C" {

void simtNcclFailAfter(int sums) { fail_after = sums; }
int simtNcclMisuses() { return misuses; }

Result ncclGetVersion(int* version) {
  *version = 21805;
  return kSuccess;
}
const char* ncclGetErrorString(Result result) {
  return result == kRemoteError ? "remote process exited or there was a network error"
                                : "invalid usage";
}
Result ncclGetUniqueId(UniqueId* id) {
  static std::atomic<int> next{0};
  *id = {};
  std::snprintf(id->bytes, sizeof id->bytes, "simt-%d", next++);
  return kSuccess;
}

Result ncclCommInitRankConfig(Comm** comm, int ranks, UniqueId id, int rank, Config* config) {
  if (config->magic != 0xcafebeef || config->blocking != 0) return kInvalidUsage;
  auto member = std::make_shared<Member>();
  {
    const std::lock_guard lock(groups_mutex);
    std::shared_ptr<Group>& group = Groups()[id.bytes];
    if (group == nullptr) group = std::make_shared<Group>();
    group->ranks = ranks;
    member->group = group;
  }
  member->rank = rank;
  ++member->group->joined;
  *comm = new Comm{member};
  return kInProgress;
}
Result ncclCommGetAsyncError(Comm* comm, Result* error) {
  const Group& g = *comm->member->group;
  *error = g.failed ? kRemoteError : g.joined < g.ranks ? kInProgress : kSuccess;
  return kSuccess;
}
Result ncclCommDestroy(Comm* comm) { return End(comm); }
Result ncclCommAbort(Comm* comm) {
  comm->member->aborted = true;
  comm->member->group->failed = true;  // the others hear of it, as from a closed connection
  return End(comm);
}

Result ncclAllReduce(const void* in, void* out, size_t count, int type, int op, Comm* comm,
                     void* stream) {
  if (type != shoal::nccl::kFloat32 || op != shoal::nccl::kSum) return kInvalidUsage;
  auto* const on = static_cast<cudaStream_t>(stream);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaStreamIsCapturing(on, &status);
  if (status == cudaStreamCaptureStatusInvalidated) {
    ++misuses;
    comm->member->group->failed = true;
    return kInvalidUsage;
  }
  const bool captured = status == cudaStreamCaptureStatusActive;
  const std::shared_ptr<int> held = captured ? comm->held : nullptr;
  const auto member = comm->member;
  simt::EnqueueHost(on, nullptr, [=, hold = held] {
    Arrive(*member, static_cast<const float*>(in), count, captured);
  });
  simt::EnqueueHost(
      on, [member] { return AllArrived(*member); },
      [=, hold = held] { Finish(*member, static_cast<float*>(out), count); });
  return kInProgress;
}
Result ncclAllGather(const void*, void*, size_t, int, Comm*, void*) { return kInvalidUsage; }
Result ncclBroadcast(const void*, void*, size_t, int, int, Comm*, void*) { return kInvalidUsage; }
Result ncclSend(const void*, size_t, int, int, Comm*, void*) { return kInvalidUsage; }
Result ncclRecv(void*, size_t, int, int, Comm*, void*) { return kInvalidUsage; }
}
