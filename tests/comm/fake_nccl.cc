// A stand-in for libnccl.so.2 with NCCL's own symbols (only those that comm/nccl_api.h loads):
// ranks are processes of one host, device memory is host memory, and data moves through a shared
// memory object whose name is the unique id. As in NCCL, calls only enqueue, joining is
// non-blocking, and a peer that does not come leaves the stream busy until the communicator is
// aborted.
#include "tests/comm/fake_nccl.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "comm/nccl_api.h"

namespace {

using shoal::nccl::Config;
using shoal::nccl::kInProgress;
using shoal::nccl::kSuccess;
using shoal::nccl::Result;
using shoal::nccl::UniqueId;

constexpr int kInvalidUsage = 5, kRemoteError = 6;
constexpr int kRanksMax = 8;
constexpr size_t kPiece = 1 << 16;

struct Mailbox {  // one direction between two ranks
  std::atomic<uint64_t> written, read;
  char data[kPiece];
};

struct Shared {  // zero-filled by the system
  std::atomic<int> joined;
  std::atomic<uint64_t> arrivals;  // of all ranks at all barriers so far
  char slots[kRanksMax][kPiece];
  Mailbox mail[kRanksMax][kRanksMax];
};

std::atomic<int> fail_after{-1};

class Stream {
 public:
  Stream() : thread_([this] { Work(); }) {}
  ~Stream() {
    {
      std::lock_guard lock(mu_);
      stop_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }
  void Enqueue(std::function<void()> task) {
    {
      std::lock_guard lock(mu_);
      tasks_.push_back(std::move(task));
    }
    changed_.notify_all();
  }
  bool Idle() {
    std::lock_guard lock(mu_);
    return tasks_.empty();
  }

 private:
  void Work() {
    std::unique_lock lock(mu_);
    while (true) {
      changed_.wait(lock, [this] { return stop_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      std::function<void()>& task = tasks_.front();  // a deque's front stays where it is
      lock.unlock();
      task();
      lock.lock();
      tasks_.pop_front();
    }
  }

  std::mutex mu_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> tasks_;
  bool stop_ = false;
  std::thread thread_;
};

// What tasks use: lives until the last of them is done.
struct Channel {
  Shared* shared = nullptr;
  int rank = 0, ranks = 0;
  uint64_t barriers = 0;  // of the stream's thread
  std::atomic<bool> aborted{false}, failed{false};

  ~Channel() {
    if (shared != nullptr) munmap(shared, sizeof(Shared));
  }
  bool gone() const { return aborted.load() || failed.load(); }
  template <typename Condition>
  bool Wait(const Condition& condition) {
    while (!condition()) {
      if (gone()) return false;
      std::this_thread::yield();
    }
    return true;
  }
  bool Barrier() {
    ++barriers;
    shared->arrivals.fetch_add(1);
    return Wait([&] { return shared->arrivals.load() >= barriers * ranks; });
  }
  // Shows every rank's piece to take().
  bool Exchange(const char* mine, size_t bytes, const std::function<void(int, const char*)>& take) {
    if (mine != nullptr) std::memcpy(shared->slots[rank], mine, bytes);
    if (!Barrier()) return false;
    for (int r = 0; r < ranks; ++r) take(r, shared->slots[r]);
    return Barrier();
  }
};

size_t TypeSize(int type) { return type == shoal::nccl::kFloat32 ? 4 : 1; }

}  // namespace

namespace shoal::nccl {
struct Comm {
  std::shared_ptr<Channel> channel;
};
}  // namespace shoal::nccl
using shoal::nccl::Comm;

namespace {

Result Enqueue(Comm* comm, void* stream, std::function<void(Channel&)> task) {
  if (comm == nullptr || stream == nullptr) return kInvalidUsage;
  if (fail_after > 0 && --fail_after == 0) comm->channel->failed = true;
  static_cast<Stream*>(stream)->Enqueue([channel = comm->channel, task = std::move(task)] {
    if (!channel->gone()) task(*channel);
  });
  return kInProgress;  // as a non-blocking communicator may say; the next question answers success
}

template <typename Body>
void InPieces(size_t bytes, const Body& body) {
  for (size_t at = 0; at < bytes; at += kPiece) {
    if (!body(at, std::min(kPiece, bytes - at))) return;
  }
}

}  // namespace

extern "C" {

void* fakeStreamCreate() { return new Stream; }
bool fakeStreamIdle(void* stream) { return static_cast<Stream*>(stream)->Idle(); }
void fakeStreamDestroy(void* stream) { delete static_cast<Stream*>(stream); }
void fakeFailAfter(int calls) { fail_after = calls; }

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
  std::snprintf(id->bytes, sizeof id->bytes, "/shoal-fake-nccl-%d-%d", getpid(), next++);
  return kSuccess;
}

Result ncclCommInitRankConfig(Comm** comm, int ranks, UniqueId id, int rank, Config* config) {
  if (config->magic != 0xcafebeef || config->blocking != 0 || ranks > kRanksMax) {
    return kInvalidUsage;
  }
  const int fd = shm_open(id.bytes, O_CREAT | O_RDWR, 0600);
  if (fd < 0 || ftruncate(fd, sizeof(Shared)) != 0) return kInvalidUsage;
  void* const memory = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  if (memory == MAP_FAILED) return kInvalidUsage;
  auto channel = std::make_shared<Channel>();
  channel->shared = static_cast<Shared*>(memory);
  channel->rank = rank;
  channel->ranks = ranks;
  if (channel->shared->joined.fetch_add(1) + 1 == ranks) shm_unlink(id.bytes);
  *comm = new Comm{channel};
  return kInProgress;
}
Result ncclCommGetAsyncError(Comm* comm, Result* error) {
  const Channel& c = *comm->channel;
  *error = c.failed ? kRemoteError : c.shared->joined.load() < c.ranks ? kInProgress : kSuccess;
  return kSuccess;
}
Result ncclCommDestroy(Comm* comm) {
  delete comm;
  return kSuccess;
}
Result ncclCommAbort(Comm* comm) {
  comm->channel->aborted = true;
  delete comm;
  return kSuccess;
}

Result ncclAllReduce(const void* in, void* out, size_t count, int type, int op, Comm* comm,
                     void* stream) {
  if (type != shoal::nccl::kFloat32 || op != shoal::nccl::kSum) return kInvalidUsage;
  return Enqueue(comm, stream, [=](Channel& c) {
    InPieces(count * 4, [&](size_t at, size_t bytes) {
      std::vector<float> sum(bytes / 4, 0.0f);
      const bool done =
          c.Exchange(static_cast<const char*>(in) + at, bytes, [&](int, const char* piece) {
            for (size_t i = 0; i < sum.size(); ++i) {
              float term;
              std::memcpy(&term, piece + 4 * i, 4);
              sum[i] += term;
            }
          });
      if (done) std::memcpy(static_cast<char*>(out) + at, sum.data(), bytes);
      return done;
    });
  });
}
Result ncclAllGather(const void* in, void* out, size_t count, int type, Comm* comm, void* stream) {
  const size_t all = count * TypeSize(type);
  return Enqueue(comm, stream, [=](Channel& c) {
    InPieces(all, [&](size_t at, size_t bytes) {
      return c.Exchange(static_cast<const char*>(in) + at, bytes, [&](int r, const char* piece) {
        std::memcpy(static_cast<char*>(out) + r * all + at, piece, bytes);
      });
    });
  });
}
Result ncclBroadcast(const void* in, void* out, size_t count, int type, int root, Comm* comm,
                     void* stream) {
  return Enqueue(comm, stream, [=](Channel& c) {
    InPieces(count * TypeSize(type), [&](size_t at, size_t bytes) {
      const char* mine = c.rank == root ? static_cast<const char*>(in) + at : nullptr;
      return c.Exchange(mine, bytes, [&](int r, const char* piece) {
        if (r == root) std::memcpy(static_cast<char*>(out) + at, piece, bytes);
      });
    });
  });
}
Result ncclSend(const void* data, size_t count, int type, int peer, Comm* comm, void* stream) {
  return Enqueue(comm, stream, [=](Channel& c) {
    Mailbox& box = c.shared->mail[c.rank][peer];
    InPieces(count * TypeSize(type), [&](size_t at, size_t bytes) {
      if (!c.Wait([&] { return box.written == box.read; })) return false;
      std::memcpy(box.data, static_cast<const char*>(data) + at, bytes);
      ++box.written;
      return true;
    });
  });
}
Result ncclRecv(void* data, size_t count, int type, int peer, Comm* comm, void* stream) {
  return Enqueue(comm, stream, [=](Channel& c) {
    Mailbox& box = c.shared->mail[peer][c.rank];
    InPieces(count * TypeSize(type), [&](size_t at, size_t bytes) {
      if (!c.Wait([&] { return box.written > box.read; })) return false;
      std::memcpy(static_cast<char*>(data) + at, box.data, bytes);
      ++box.read;
      return true;
    });
  });
}
}
