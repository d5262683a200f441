#include "simt/runner.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ASAN 1
#endif
#if __has_feature(thread_sanitizer)
#define SIMT_TSAN 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#endif
#if defined(__SANITIZE_THREAD__)
#define SIMT_TSAN 1
#endif
#if defined(SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(SIMT_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

// Saves the callee-saved registers on the running stack, stores the stack pointer in *from and goes
// on where `to` was saved.
extern "C" void simt_switch_stack(void** from, void* to);
asm(R"(
.text
.globl simt_switch_stack
.type simt_switch_stack, @function
simt_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch_stack, . - simt_switch_stack
)");

namespace simt {
namespace {

constexpr int kWarp = 32;
constexpr int kThreadsMax = 1024;           // of a block
constexpr size_t kSharedBytesMax = 101376;  // what a block can have on every chip from sm_80 on
constexpr size_t kStaticBytesMax = 49152;
constexpr size_t kStackBytes = size_t{128} << 10;
constexpr size_t kStackStep = 17 * 64, kStackSteps = 32 << 10;
constexpr uint64_t kAllBlocks = UINT64_MAX;
constexpr uint8_t kGarbage = 0xFF;  // NaN in every float format, -1 as an integer

enum class State { kReady, kBarrier, kWarp, kDone };

// What the switch needs to know of a stack.
struct Context {
  void* sp = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
  void* fake_stack = nullptr;
  void* tsan = nullptr;
};

// A PerThread variable.
struct Local {
  const void* tag;
  void* value;
  void (*destroy)(void*);
};

// What every switch and every warp operation looks at lies in one line of the cache.
struct alignas(64) Fiber {
  State state = State::kDone;
  uint32_t mask = 0;
  Site site = {};
  void* mine = nullptr;
  uint3 index = {};
  int linear = 0;
  Context context;
  std::vector<Local> locals;
};
static_assert(offsetof(Fiber, context) + offsetof(Context, sp) + sizeof(void*) <= 64);

int Count(uint32_t mask) { return mask == 0xFFFFFFFF ? kWarp : __builtin_popcount(mask); }

struct StaticVariable {
  const void* tag;
  size_t at;
};

struct FreeDeleter {
  void operator()(uint8_t* p) const { std::free(p); }
};

// The fibers of one OS thread, and the block that they run.
class Machine {
 public:
  ~Machine() { DropFibers(); }
  // `only`: of one block, kAllBlocks: of all.
  void Run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& body,
           uint64_t only = kAllBlocks);
  void Yield();
  [[noreturn]] void FiberMain();
  void Barrier(Site site);
  void Meet(uint32_t mask, Site site, void* mine, Combine combine);
  void* StaticShared(const void* tag, size_t bytes);
  [[noreturn]] void FailHere(const char* what);

  uint64_t random = 1;
  bool pauses = false;  // between fibers, now and then
  Fiber* current = nullptr;
  uint8_t* dynamic_shared = nullptr;

 private:
  void Grow(int threads);
  void DropFibers();
  void Restart(Fiber* f);
  void RunBlock(int threads);
  void Switch(Context* from, Context* to);
  void Resume(Fiber* f);
  void Next(Context* from);
  void Wake(Fiber* f);
  std::string WhoWaits() const;
  uint64_t Random() {
    random ^= random << 13;
    random ^= random >> 7;
    return random ^= random << 17;
  }

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> ready_;
  Context host_;
  const std::function<void()>* body_ = nullptr;
  int threads_ = 0, done_ = 0, at_barrier_ = 0;
  int at_warp_operation_[kThreadsMax / kWarp] = {};  // lanes of each warp
  size_t shared_bytes_ = 0;
  std::vector<StaticVariable> variables_;
  size_t static_bytes_ = 0;
  std::unique_ptr<uint8_t, FreeDeleter> static_shared_;
  std::optional<std::string> failure_;
};

thread_local Machine machine;

bool SameSite(const Site& a, const Site& b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

void Entry() { machine.FiberMain(); }

void Machine::Switch(Context* from, Context* to) {
#if defined(SIMT_ASAN)
  __sanitizer_start_switch_fiber(&from->fake_stack, to->bottom, to->size);
#endif
#if defined(SIMT_TSAN)
  __tsan_switch_to_fiber(to->tsan, 0);
#endif
  simt_switch_stack(&from->sp, to->sp);
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
#endif
}

// A stack as if simt_switch_stack had been called right before Entry: six registers, return
// address. Stacks begin in different lines of a page: if all began in the same, they would share
// the few places that a cache has for it.
void Machine::Restart(Fiber* f) {
  const size_t colour = fibers_.size() * kStackStep % kStackSteps;
  auto* top = static_cast<char*>(const_cast<void*>(f->context.bottom)) + f->context.size - colour;
  auto* sp = reinterpret_cast<void**>(top) - 8;
  std::memset(sp, 0, 64);
  sp[6] = reinterpret_cast<void*>(&Entry);
  f->context.sp = sp;
}

void Machine::Grow(int threads) {
  while (static_cast<int>(fibers_.size()) < threads) {
    auto f = std::make_unique<Fiber>();
    const size_t page = sysconf(_SC_PAGESIZE);
    void* memory = mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw Error("no memory for a fiber's stack");
    mprotect(memory, page, PROT_NONE);
    f->context.bottom = static_cast<char*>(memory) + page;
    f->context.size = kStackBytes;
#if defined(SIMT_TSAN)
    f->context.tsan = __tsan_create_fiber(0);
#endif
    Restart(f.get());
    fibers_.push_back(std::move(f));
  }
}

// After a failure fibers are left in the middle of the kernel; they cannot be used again.
void Machine::DropFibers() {
  for (const auto& f : fibers_) {
    for (const Local& local : f->locals) local.destroy(local.value);
#if defined(SIMT_TSAN)
    __tsan_destroy_fiber(f->context.tsan);
#endif
    const size_t page = sysconf(_SC_PAGESIZE);
#if defined(SIMT_ASAN)
    __asan_unpoison_memory_region(f->context.bottom, f->context.size);
#endif
    munmap(static_cast<char*>(const_cast<void*>(f->context.bottom)) - page, kStackBytes + page);
  }
  fibers_.clear();
}

void Machine::FiberMain() {
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  for (;;) {
    (*body_)();
    for (const Local& local : current->locals) local.destroy(local.value);
    current->locals.clear();
    current->state = State::kDone;
    ++done_;
    Next(&current->context);
  }
}

void Machine::Resume(Fiber* f) {
  current = f;
  threadIdx = f->index;
}

// Leaves the running fiber for a runnable one, or for the host when there is none.
void Machine::Next(Context* from) {
  if (ready_.empty() || failure_) {
    Switch(from, &host_);
    return;
  }
  if (pauses && Random() % 256 == 0) {
    std::this_thread::sleep_for(std::chrono::microseconds(Random() % 64));
  }
  const size_t pick = (Random() & 0xFFFFFFFF) * ready_.size() >> 32;
  Fiber* f = ready_[pick];
  ready_[pick] = ready_.back();
  ready_.pop_back();
  if (&f->context == from) {
    Resume(f);
    return;
  }
  Resume(f);
  Switch(from, &f->context);
}

void Machine::Wake(Fiber* f) {
  f->state = State::kReady;
  ready_.push_back(f);
}

void Machine::Yield() {
  Fiber* self = current;
  std::this_thread::yield();
  Wake(self);
  Next(&self->context);
}

void Machine::Barrier(Site site) {
  Fiber* self = current;
  self->state = State::kBarrier;
  self->site = site;
  if (++at_barrier_ == threads_) {
    for (int i = 0; i < threads_; ++i) {
      if (!SameSite(fibers_[i]->site, site)) {
        FailHere("threads of a block meet at different barriers");
      }
      Wake(fibers_[i].get());
    }
    at_barrier_ = 0;
  }
  Next(&self->context);
}

void Machine::Meet(uint32_t mask, Site site, void* mine, Combine combine) {
  Fiber* self = current;
  const int lane = self->linear % kWarp;
  const int first = self->linear - lane;
  self->state = State::kWarp;
  self->site = site;
  self->mask = mask;
  self->mine = mine;
  if ((mask >> lane & 1) == 0) FailHere("a lane calls a warp operation whose mask leaves it out");
  if (++at_warp_operation_[first / kWarp] < Count(mask)) {
    Next(&self->context);
    return;
  }
  void* all[kWarp];
  for (int i = 0; i < kWarp; ++i) {
    all[i] = nullptr;
    if ((mask >> i & 1) == 0) continue;
    if (first + i >= threads_)
      FailHere("the mask of a warp operation names lanes that do not exist");
    const Fiber& f = *fibers_[first + i];
    if (f.state != State::kWarp || f.mask != mask || !SameSite(f.site, site)) {
      Next(&self->context);  // not all are here: the last one does the work
      return;
    }
    all[i] = f.mine;
  }
  at_warp_operation_[first / kWarp] -= Count(mask);
  combine(mask, all);
  for (int i = 0; i < kWarp; ++i) {
    if ((mask >> i & 1) != 0) Wake(fibers_[first + i].get());
  }
  Next(&self->context);
}

std::string Machine::WhoWaits() const {
  std::ostringstream s;
  int listed = 0;
  for (int i = 0; i < threads_ && listed < 8; ++i) {
    const Fiber& f = *fibers_[i];
    const bool like_last = i > 0 && fibers_[i - 1]->state == f.state &&
                           SameSite(fibers_[i - 1]->site, f.site) && fibers_[i - 1]->mask == f.mask;
    if (like_last) continue;
    ++listed;
    s << "; from thread " << f.linear << " on: ";
    if (f.state == State::kDone) {
      s << "returned";
    } else if (f.state == State::kReady) {
      s << "runnable";
    } else {
      s << (f.state == State::kBarrier ? "barrier" : "warp operation") << " at " << f.site.file
        << ":" << f.site.line;
      if (f.state == State::kWarp) s << " mask " << std::hex << f.mask << std::dec;
    }
  }
  return s.str();
}

void Machine::FailHere(const char* what) {
  {  // this stack is never unwound, so nothing on it may own memory
    std::ostringstream s;
    s << what << " (block " << blockIdx.x << "," << blockIdx.y << "," << blockIdx.z << " thread "
      << current->linear << ")" << WhoWaits();
    failure_ = s.str();
  }
  Switch(&current->context, &host_);
  std::abort();  // the host never comes back
}

void* Machine::StaticShared(const void* tag, size_t bytes) {
  for (const StaticVariable& v : variables_) {
    if (v.tag == tag) return static_shared_.get() + v.at;
  }
  const size_t at = (static_bytes_ + 127) / 128 * 128;
  static_bytes_ = at + bytes;
  if (static_bytes_ > kStaticBytesMax || static_bytes_ + shared_bytes_ > kSharedBytesMax) {
    FailHere("too much shared memory");
  }
#if defined(SIMT_ASAN)
  __asan_unpoison_memory_region(static_shared_.get() + at, bytes);
#endif
  variables_.push_back({tag, at});
  return static_shared_.get() + at;
}

void Machine::RunBlock(int threads) {
  threads_ = threads;
  done_ = at_barrier_ = 0;
  std::fill(std::begin(at_warp_operation_), std::end(at_warp_operation_), 0);
  variables_.clear();
  static_bytes_ = 0;
#if defined(SIMT_ASAN)
  __asan_unpoison_memory_region(static_shared_.get(), kStaticBytesMax);
#endif
  std::memset(static_shared_.get(), kGarbage, kStaticBytesMax);
  if (shared_bytes_ > 0) std::memset(dynamic_shared, kGarbage, shared_bytes_);
#if defined(SIMT_ASAN)
  __asan_poison_memory_region(static_shared_.get(), kStaticBytesMax);
#endif
  ready_.clear();
  for (int i = 0; i < threads; ++i) {
    Fiber* f = fibers_[i].get();
    f->linear = i;
    f->index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    f->site = {};
    f->mask = 0;
    Wake(f);
  }
  Next(&host_);
  if (failure_) return;
  if (done_ != threads) {
    failure_ = "threads wait for others that do not come (block " + std::to_string(blockIdx.x) +
               "," + std::to_string(blockIdx.y) + "," + std::to_string(blockIdx.z) + ")" +
               WhoWaits();
  }
}

void Machine::Run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& body,
                  uint64_t only) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (current != nullptr) throw Error("a kernel launches a kernel");
  if (threads == 0 || threads > kThreadsMax || blocks == 0 || grid.y > 65535 || grid.z > 65535 ||
      block.z > 64 || shared > kSharedBytesMax) {
    throw Error("a launch that no GPU accepts: " + std::to_string(blocks) + " blocks of " +
                std::to_string(threads) + " threads, " + std::to_string(shared) + " bytes shared");
  }
  Grow(static_cast<int>(threads));
  if (static_shared_ == nullptr) {
    static_shared_.reset(static_cast<uint8_t*>(std::aligned_alloc(128, kStaticBytesMax)));
  }
  // aligned_alloc, and exactly the bytes asked for, so that the address sanitizer sees the end.
  std::unique_ptr<uint8_t, FreeDeleter> dynamic;
  void* memory = nullptr;
  if (shared > 0 && posix_memalign(&memory, 128, shared) != 0) throw Error("no memory");
  dynamic.reset(static_cast<uint8_t*>(memory));
  dynamic_shared = dynamic.get();
  shared_bytes_ = shared;
  body_ = &body;
  gridDim = grid;
  blockDim = block;
#if defined(SIMT_TSAN)
  host_.tsan = __tsan_get_current_fiber();
#endif
#if defined(SIMT_ASAN)
  if (host_.bottom == nullptr) {
    pthread_attr_t attr;
    void* bottom = nullptr;
    pthread_getattr_np(pthread_self(), &attr);
    pthread_attr_getstack(&attr, &bottom, &host_.size);
    pthread_attr_destroy(&attr);
    host_.bottom = bottom;
  }
#endif
  // Blocks in a shuffled order: a stride that shares no factor with their number.
  uint64_t at = Random() % blocks, stride = Random() % blocks | 1;
  while (std::gcd(stride, blocks) != 1) stride += 2;
  for (uint64_t i = 0; i < blocks && !failure_; ++i, at = (at + stride) % blocks) {
    if (only != kAllBlocks && at != only) continue;
    blockIdx = {static_cast<uint32_t>(at % grid.x), static_cast<uint32_t>(at / grid.x % grid.y),
                static_cast<uint32_t>(at / grid.x / grid.y)};
    RunBlock(static_cast<int>(threads));
  }
  current = nullptr;
  dynamic_shared = nullptr;
  body_ = nullptr;
  if (failure_) {
    const std::string what = *failure_;
    failure_.reset();
    DropFibers();
    throw Error(what);
  }
}

}  // namespace

// OS threads that run blocks, as many as were ever needed at once. They last as long as the
// program.
class ThreadPool {
 public:
  void Run(std::function<void()> job) {
    const std::lock_guard lock(mutex_);
    jobs_.push_back(std::move(job));
    if (static_cast<int>(jobs_.size()) > idle_) {
      std::thread([this] { Work(); }).detach();
    } else {
      came_.notify_one();
    }
  }

 private:
  [[noreturn]] void Work() {
    std::unique_lock lock(mutex_);
    for (;;) {
      while (jobs_.empty()) {
        ++idle_;
        came_.wait(lock);
        --idle_;
      }
      {
        const std::function<void()> job = std::move(jobs_.front());
        jobs_.pop_front();
        lock.unlock();
        job();
      }
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable came_;
  std::deque<std::function<void()>> jobs_;
  int idle_ = 0;
};
ThreadPool& BlockPool() {
  static auto* pool = new ThreadPool;
  return *pool;
}

void SetSeed(uint64_t seed) { machine.random = seed * 0x9E3779B97F4A7C15u + 1; }

struct BlockThreads::Launch {
  dim3 grid, block;
  std::function<void()> body;
  std::atomic<int> left{0};
  std::mutex mutex;
  std::exception_ptr error;
};

void BlockThreads::Start(dim3 grid, dim3 block, uint64_t seed, std::function<void()> thread_body) {
  auto launch = std::make_shared<Launch>();
  launch->grid = grid;
  launch->block = block;
  launch->body = std::move(thread_body);
  const int blocks = static_cast<int>(grid.x * grid.y * grid.z);
  launch->left = blocks;
  launch_ = launch;
  for (int b = 0; b < blocks; ++b) {
    BlockPool().Run([launch, seed, b] {
      SetSeed(seed + static_cast<uint64_t>(b));
      machine.pauses = true;
      try {
        machine.Run(launch->grid, launch->block, 0, launch->body, static_cast<uint64_t>(b));
      } catch (...) {
        const std::lock_guard lock(launch->mutex);
        launch->error = std::current_exception();
      }
      launch->left.fetch_sub(1, std::memory_order_release);
    });
  }
}
bool BlockThreads::done() const { return launch_->left.load(std::memory_order_acquire) == 0; }
void BlockThreads::Finish() {
  const std::shared_ptr<Launch> launch = std::move(launch_);
  if (launch->error) std::rethrow_exception(launch->error);
}

void Yield() { machine.Yield(); }
uint64_t ClockNs() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}
void Run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& body) {
  machine.Run(grid, block, shared, body);
}
void BlockBarrier(Site site) { machine.Barrier(site); }
void Meet(uint32_t mask, Site site, void* mine, Combine combine) {
  machine.Meet(mask, site, mine, combine);
}
int Lane() { return machine.current->linear % kWarp; }
unsigned char* DynamicSharedMemory() { return machine.dynamic_shared; }
void* StaticSharedMemory(const void* tag, size_t bytes) { return machine.StaticShared(tag, bytes); }
void* PerThreadMemory(const void* tag, void* (*make)(), void (*destroy)(void*)) {
  std::vector<Local>& locals = machine.current->locals;
  for (const Local& local : locals) {
    if (local.tag == tag) return local.value;
  }
  locals.push_back({tag, make(), destroy});
  return locals.back().value;
}
void Fail(const char* what) { machine.FailHere(what); }

}  // namespace simt
