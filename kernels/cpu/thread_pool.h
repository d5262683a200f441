// A fixed team of threads that all run one function, with a start and an end of about a
// microsecond.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

#include "absl/status/statusor.h"

namespace shoal {

// One thread calls Run at a time; that caller is thread 0 of the team. Nothing here allocates after
// Create.
class ThreadPool {
 public:
  struct Options {
    int threads = 0;  // with the caller; 0: one for each usable core
    // Bind threads to cores, unless there are more threads than cores. Memory that the thread which
    // calls Create touches first afterwards lies near them.
    bool pin = true;
    int first_core = 0;  // thread i takes UsableCores()[first_core + i]
  };
  // kInvalidArgument for a count out of range, kResourceExhausted when the system gives no more
  // threads.
  static absl::StatusOr<std::unique_ptr<ThreadPool>> Create(const Options& options);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return threads_; }
  bool pinned() const { return !cores_.empty(); }

  // Calls fn(thread) for each thread in [0, threads()) at once and returns when all are done. Not
  // reentrant. A pinned pool binds the thread that calls Run to its core; threads which that one
  // starts later inherit this.
  template <typename Fn>
  void Run(Fn&& fn) {
    using Callable = std::remove_reference_t<Fn>;
    RunErased([](void* f, int thread) { (*static_cast<Callable*>(f))(thread); },
              const_cast<void*>(static_cast<const void*>(&fn)));
  }

  // Only inside Run, and by every thread of it: returns when all have arrived. Writes made before
  // are visible after.
  void Barrier();

 private:
  // A counter that threads wait on: they spin for a while, then sleep in the kernel.
  class Gate {
   public:
    uint32_t value() const { return value_.load(std::memory_order_acquire); }
    void Advance();                                 // wakes all waiters
    bool WaitWhile(uint32_t old, int64_t spin_ns);  // true when spinning was enough
   private:
    alignas(64) std::atomic<uint32_t> value_{0};
    std::atomic<uint32_t> sleepers_{0};
  };

  ThreadPool(int threads, std::vector<int> cores, int64_t spin_ns_max);
  void RunErased(void (*call)(void*, int), void* context);
  void Work(int thread);
  static void* WorkerMain(void* worker);
  void PinCaller();

  struct Worker {
    ThreadPool* pool;
    int thread;
    unsigned long handle;  // pthread_t
  };

  const int threads_;
  const std::vector<int> cores_;  // [threads], empty when not pinned
  const int64_t spin_ns_max_;
  int64_t done_spin_ns_;         // how long the caller spins for the team; adapts
  std::vector<Worker> workers_;  // [threads - 1]
  unsigned long pinned_caller_ = 0;
  bool caller_pinned_ = false;
  bool running_ = false;
  bool stop_ = false;  // written before start_ advances

  void (*call_)(void*, int) = nullptr;  // the job, written before start_ advances
  void* context_ = nullptr;
  Gate start_;
  Gate done_;
  Gate barrier_;
  alignas(64) std::atomic<int> unfinished_{0};
  alignas(64) std::atomic<int> arrived_{0};
};

}  // namespace shoal
