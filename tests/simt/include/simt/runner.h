// Runs a CUDA kernel on the CPU: every thread of a block is a fiber, and all of a block's fibers
// share one OS thread.
//
// A fiber runs until it has to wait (for the block's barrier, or for the lanes of a warp operation)
// and then hands over to a runnable fiber picked by a pseudo-random sequence, so a missing barrier
// shows as a wrong result under some seeds. Shared memory holds NaNs before each block. What a GPU
// would answer with a hang or with garbage (a barrier that part of the block does not reach, a warp
// operation that misses lanes of its mask) throws simt::Error at the launch, naming the threads and
// the lines where they wait.
//
// Blocks of a grid run one after another, in shuffled order: a block must not wait for another one.
// Any number of OS threads may launch at the same time: that is how a kernel is run that waits for
// one of another stream (BlockThreads).
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>

#include "simt/types.h"

namespace simt {

class Error : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The schedules of this OS thread's next launches follow from the seed.
void SetSeed(uint64_t seed);

// Runs thread_body once for each thread of the grid. threadIdx and the others are set in it.
void Run(dim3 grid, dim3 block, size_t dynamic_shared_bytes,
         const std::function<void()>& thread_body);

// The blocks of one launch, each on an OS thread of its own, where fibers pause now and then so
// that the threads meet in many orders. The threads are kept for later launches. What the kernel
// does wrong is thrown by Finish().
class BlockThreads {
 public:
  void Start(dim3 grid, dim3 block, uint64_t seed, std::function<void()> thread_body);
  bool done() const;
  void Finish();  // when done

 private:
  struct Launch;
  std::shared_ptr<Launch> launch_;
};

// ---- For the device functions of the stand-in headers; called on a fiber.

// Lets other fibers of the block and other OS threads run.
void Yield();
uint64_t ClockNs();

// The line of the device code that waits.
struct Site {
  const char* file;
  int line;
};

void BlockBarrier(Site site);

// All lanes of `mask` meet; the last one calls combine(mask, all lanes' `mine`) while the others
// wait, and all go on. mine[lane] is null for lanes outside the mask.
using Combine = void (*)(uint32_t mask, void* const* mine);
void Meet(uint32_t mask, Site site, void* mine, Combine combine);

int Lane();  // of the running thread in its warp

unsigned char* DynamicSharedMemory();
// One variable of the block for each tag.
void* StaticSharedMemory(const void* tag, size_t bytes);

// A value-initialised T of the running thread, from its first use on to the block's end.
void* PerThreadMemory(const void* tag, void* (*make)(), void (*destroy)(void*));
template <typename T>
T* PerThread() {
  static const char tag = 0;
  return static_cast<T*>(PerThreadMemory(
      &tag, [] { return static_cast<void*>(new T()); },
      [](void* p) { delete static_cast<T*>(p); }));
}

// The running kernel does what no GPU allows.
[[noreturn]] void Fail(const char* what);

}  // namespace simt
