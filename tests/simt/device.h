// The stand-in's device: what streams have to do, and memory. Internal to runtime.cc and memory.cc.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "simt/api.h"

namespace simt {
struct Work {
  std::function<void()> run;
  std::function<bool()> ready = nullptr;  // null: as soon as what is before it is done
};
}  // namespace simt
struct CUgraph_st {
  std::vector<simt::Work> work;
};
struct CUgraphExec_st : CUgraph_st {};
struct CUstream_st {
  int device = 0;
  std::deque<simt::Work> work;
  std::unique_ptr<CUgraph_st> captured;  // null: work is done
};
struct CUevent_st {
  CUevent_st* origin = nullptr;   // opened by handle: the event that is meant
  CUstream_st* stream = nullptr;  // of the last record
  int recorded = 0, done = 0;     // records made, records passed
  std::chrono::steady_clock::time_point at;
};

namespace simt {

// Work on a stream waits in its queue until somebody needs it, or until it is picked at random when
// other work is enqueued: any order that streams and events allow may be the one that happens. One
// lock for all: two OS threads never run device work at the same time.
struct Device {
  std::recursive_mutex mutex;
  int count = 1;
  size_t total = size_t{8} << 30;
  size_t used = 0;
  std::map<void*, size_t> allocations;
  std::map<const char*, size_t> pinned;
  std::set<cudaStream_t> streams;
  std::minstd_rand random;
  bool refuse_ipc = false, refuse_graphs = false, refuse_peers = false, refuse_register = false;
  std::set<std::pair<int, int>> peers;  // device, peer: enabled
  int refuse_device = -1;  // graphs of this one, `late`: by a launch within the capture
  bool refuse_late = false;
  std::map<void*, int> opened;  // by handle, how often
  bool share_memory = false;
  std::map<void*, int> shared;     // allocations that other processes may map: the file
  std::map<void*, size_t> mapped;  // of other processes
};
Device& TheDevice();

// Counted, so that whoever waits for another thread can let it have the device.
class Lock {
 public:
  explicit Lock(std::recursive_mutex& mutex);
  ~Lock();
  Lock(const Lock&) = delete;
  Lock& operator=(const Lock&) = delete;

 private:
  std::recursive_mutex& mutex_;
};

// What a CUDA call returns: an error is the thread's last one too.
cudaError_t Return(cudaError_t error);

// For calls that a capture does not allow: they fail, and so does the capture.
bool Refused();

// The default stream is in step with the host.
void Enqueue(cudaStream_t stream, Work work);

// Of the current device. Streams may go meanwhile.
void RunEverything();

// What a handle of memory or of an event says.
struct IpcHandle {
  int64_t process = 0;
  void* at = nullptr;  // there
  int64_t bytes = 0;
  int file = -1;  // there; -1: not to be mapped elsewhere
};
static_assert(sizeof(IpcHandle) <= sizeof(cudaIpcMemHandle_t::reserved));

}  // namespace simt
