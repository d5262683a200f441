// main() of the kernels' tests on a GPU. The tests hand host vectors to the kernels and read them
// right after the launch; so here every `new` gives pinned host memory, which a GPU reads and
// writes at the same address, and a launch returns when the kernel has ended.
#include <cuda_runtime.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <new>

namespace {

// Blocks of 2^k bytes cut from one pinned allocation; freed ones are kept by size. What is asked
// for while that allocation is being made, by the CUDA runtime itself, comes from malloc.
class PinnedHeap {
 public:
  void* Allocate(size_t bytes) {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    if (base_ == nullptr && !Start()) return std::malloc(bytes);
    const size_t size = std::bit_ceil(bytes + kHeader);
    const int kind = std::countr_zero(size);
    auto* block = static_cast<std::byte*>(free_[kind]);
    if (block != nullptr) {
      free_[kind] = *reinterpret_cast<void**>(block);
    } else {
      if (size > kBytes - used_) Die("the tests need more pinned memory than kBytes");
      block = base_ + used_;
      used_ += size;
    }
    *reinterpret_cast<int*>(block) = kind;
    return block + kHeader;
  }

  void Free(void* p) {
    auto* at = static_cast<std::byte*>(p);
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    if (base_ == nullptr || at < base_ || at >= base_ + kBytes) return std::free(p);
    at -= kHeader;
    const int kind = *reinterpret_cast<int*>(at);
    *reinterpret_cast<void**>(at) = free_[kind];
    free_[kind] = at;
  }

 private:
  static constexpr size_t kBytes = size_t{2} << 30;
  static constexpr size_t kHeader = 64;  // keeps blocks aligned to a cache line

  [[noreturn]] static void Die(const char* why) {
    std::fprintf(stderr, "tests on a GPU: %s\n", why);
    _exit(1);
  }

  bool Start() {
    if (starting_) return false;
    starting_ = true;
    setenv("CUDA_LAUNCH_BLOCKING", "1", 1);  // read when the driver starts, just below
    void* base = nullptr;
    const cudaError_t error = cudaHostAlloc(&base, kBytes, cudaHostAllocMapped);
    if (error != cudaSuccess) Die(cudaGetErrorString(error));
    base_ = static_cast<std::byte*>(base);
    return true;
  }

  std::recursive_mutex mutex_;
  bool starting_ = false;
  std::byte* base_ = nullptr;
  size_t used_ = 0;
  std::array<void*, 64> free_ = {};
};

PinnedHeap& Heap() {
  alignas(PinnedHeap) static std::byte memory[sizeof(PinnedHeap)];
  static auto* heap = new (memory) PinnedHeap;  // outlives everything
  return *heap;
}

// A launch that fails (too many registers, a bad address) leaves wrong results; say why.
class LaunchErrors : public testing::EmptyTestEventListener {
  void OnTestEnd(const testing::TestInfo&) override {
    const cudaError_t error = cudaDeviceSynchronize();
    const cudaError_t launch = cudaGetLastError();
    EXPECT_EQ(error, cudaSuccess) << cudaGetErrorString(error);
    EXPECT_EQ(launch, cudaSuccess) << cudaGetErrorString(launch);
  }
};

}  // namespace

void* operator new(size_t bytes) { return Heap().Allocate(bytes); }
void* operator new[](size_t bytes) { return Heap().Allocate(bytes); }
void operator delete(void* p) noexcept {
  if (p != nullptr) Heap().Free(p);
}
void operator delete(void* p, size_t) noexcept { operator delete(p); }
void operator delete[](void* p) noexcept { operator delete(p); }
void operator delete[](void* p, size_t) noexcept { operator delete(p); }

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  testing::UnitTest::GetInstance()->listeners().Append(new LaunchErrors);
  const int result = RUN_ALL_TESTS();
  std::fflush(nullptr);
  _exit(result);  // the memory of static objects goes with the driver, in any order
}
