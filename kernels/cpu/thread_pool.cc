#include "kernels/cpu/thread_pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <climits>
#include <cstdio>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "kernels/cpu/topology.h"

namespace shoal {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int64_t kSpinNsMax =
    100'000;  // longer than the serial work between two ops of a decode step
constexpr int64_t kSpinNsMin = 4'000;  // a team that goes op by op stays out of the kernel even so

int64_t NowNs() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb");  // YIELD takes no time on most cores
#endif
}

void FutexWait(std::atomic<uint32_t>* word, uint32_t expected) {
  static_assert(sizeof(*word) == sizeof(uint32_t));
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
}

void FutexWakeAll(std::atomic<uint32_t>* word) {
  syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

bool PinThread(pthread_t thread, int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  return pthread_setaffinity_np(thread, sizeof(set), &set) == 0;
}

// Spinning pays while waits are short; one that ended in sleep says that they are not, or that
// someone else wants the core.
int64_t NextSpin(bool spin_was_enough, int64_t spin_ns, int64_t spin_ns_max) {
  const int64_t next = spin_was_enough ? spin_ns * 2 : std::max(spin_ns / 2, kSpinNsMin);
  return std::min(next, spin_ns_max);
}

}  // namespace

void ThreadPool::Gate::Advance() {
  // Sequentially consistent with the sleeper's own pair of steps: either we see it, or its wait
  // sees our value.
  value_.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) != 0) FutexWakeAll(&value_);
}

bool ThreadPool::Gate::WaitWhile(uint32_t old, int64_t spin_ns) {
  constexpr int kPausesPerClockRead = 8;
  if (spin_ns > 0) {
    const int64_t end = NowNs() + spin_ns;
    do {
      for (int i = 0; i < kPausesPerClockRead; ++i) {
        if (value() != old) return true;
        Pause();
      }
    } while (NowNs() < end);
  }
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  while (value_.load(std::memory_order_seq_cst) == old) FutexWait(&value_, old);
  sleepers_.fetch_sub(1, std::memory_order_relaxed);
  return false;
}

absl::StatusOr<std::unique_ptr<ThreadPool>> ThreadPool::Create(const Options& options) {
  if (options.threads < 0 || options.threads > kMaxThreads) {
    return absl::InvalidArgumentError(absl::StrCat(options.threads, " threads: expected 1 to ",
                                                   kMaxThreads, ", or 0 for all cores"));
  }
  if (options.first_core < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("first core ", options.first_core, ": expected 0 or more"));
  }
  const std::vector<int> usable = UsableCores();
  const int available = static_cast<int>(usable.size());
  const int threads = options.threads > 0 ? options.threads : available;
  const bool fits = options.first_core + threads <= available;
  std::vector<int> cores;
  if (options.pin && fits) {
    cores.assign(usable.begin() + options.first_core,
                 usable.begin() + options.first_core + threads);
    PreferMemoryNear(cores);
  }
  // Spinning takes time from the very thread that is waited for when there are not enough cores.
  const int64_t spin_ns_max = fits ? kSpinNsMax : 0;
  std::unique_ptr<ThreadPool> pool(new ThreadPool(threads, std::move(cores), spin_ns_max));
  for (Worker& worker : pool->workers_) {
    const int error = pthread_create(&worker.handle, nullptr, &WorkerMain, &worker);
    if (error != 0) {
      // The destructor stops and joins those that did start.
      const auto started = &worker - pool->workers_.data();
      pool->workers_.resize(started);
      return absl::ResourceExhaustedError(absl::StrCat("cannot start thread ", started + 1, " of ",
                                                       threads, ": ", std::strerror(error)));
    }
    if (pool->pinned()) PinThread(worker.handle, pool->cores_[worker.thread]);
    char name[16];
    std::snprintf(name, sizeof(name), "shoal-cpu-%d", worker.thread);
    pthread_setname_np(worker.handle, name);
  }
  return pool;
}

ThreadPool::ThreadPool(int threads, std::vector<int> cores, int64_t spin_ns_max)
    : threads_(threads),
      cores_(std::move(cores)),
      spin_ns_max_(spin_ns_max),
      done_spin_ns_(spin_ns_max) {
  for (int i = 1; i < threads; ++i) workers_.push_back(Worker{this, i, 0});
}

ThreadPool::~ThreadPool() {
  SHOAL_CHECK(!running_, "a thread pool must outlive its Run");
  stop_ = true;
  start_.Advance();
  for (const Worker& worker : workers_) pthread_join(worker.handle, nullptr);
}

void* ThreadPool::WorkerMain(void* worker) {
  Worker* self = static_cast<Worker*>(worker);
  self->pool->Work(self->thread);
  return nullptr;
}

void ThreadPool::Work(int thread) {
  uint32_t seen = 0;
  int64_t spin_ns = spin_ns_max_;
  while (true) {
    spin_ns = NextSpin(start_.WaitWhile(seen, spin_ns), spin_ns, spin_ns_max_);
    ++seen;
    if (stop_) return;
    call_(context_, thread);
    if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) done_.Advance();
  }
}

void ThreadPool::PinCaller() {
  const pthread_t self = pthread_self();
  if (caller_pinned_ && pthread_equal(self, pinned_caller_)) return;
  PinThread(self, cores_[0]);
  pinned_caller_ = self;
  caller_pinned_ = true;
}

void ThreadPool::RunErased(void (*call)(void*, int), void* context) {
  SHOAL_CHECK(!running_, "ThreadPool::Run was called inside Run or by two threads at once");
  running_ = true;
  if (pinned()) PinCaller();
  if (threads_ > 1) {
    call_ = call;
    context_ = context;
    const uint32_t before = done_.value();
    unfinished_.store(threads_ - 1, std::memory_order_relaxed);
    start_.Advance();
    call(context, 0);
    done_spin_ns_ = NextSpin(done_.WaitWhile(before, done_spin_ns_), done_spin_ns_, spin_ns_max_);
  } else {
    call(context, 0);
  }
  running_ = false;
}

void ThreadPool::Barrier() {
  if (threads_ == 1) return;
  const uint32_t phase = barrier_.value();
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);  // nobody arrives again before the gate moves
    barrier_.Advance();
  } else {
    barrier_.WaitWhile(phase, spin_ns_max_);
  }
}

}  // namespace shoal
