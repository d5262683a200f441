#include "kernels/cpu/thread_pool.h"

#include <atomic>
#include <numeric>
#include <set>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/topology.h"

namespace shoal {
namespace {

std::unique_ptr<ThreadPool> MakePool(int threads) {
  return ThreadPool::Create({.threads = threads, .pin = false}).value();
}

// 9 threads are more than the cores of a small machine: every wait must survive that.
class ThreadPoolOf : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Sizes, ThreadPoolOf, testing::Values(1, 2, 3, 9));

TEST_P(ThreadPoolOf, RunsEachThreadOnceAndItsWritesAreVisibleAfter) {
  const int n = GetParam();
  auto pool = MakePool(n);
  ASSERT_EQ(pool->threads(), n);
  std::vector<int> calls(n, 0);
  constexpr int kRounds = 300;
  for (int round = 0; round < kRounds; ++round) {
    pool->Run([&](int thread) { ++calls[thread]; });
    ASSERT_EQ(std::accumulate(calls.begin(), calls.end(), 0), (round + 1) * n);
  }
  for (int c : calls) EXPECT_EQ(c, kRounds);
}

TEST_P(ThreadPoolOf, BarrierSeparatesPhases) {
  const int n = GetParam();
  auto pool = MakePool(n);
  std::vector<int> value(n, 0);
  std::atomic<int> wrong{0};
  pool->Run([&](int thread) {
    for (int phase = 1; phase <= 100; ++phase) {
      value[thread] = phase;
      pool->Barrier();
      for (int v : value) wrong += v != phase;
      pool->Barrier();
    }
  });
  EXPECT_EQ(wrong, 0);
}

TEST_P(ThreadPoolOf, SleepingWorkersWakeUp) {
  auto pool = MakePool(GetParam());
  for (int round = 0; round < 3; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));  // far beyond the spin
    std::atomic<int> calls{0};
    pool->Run([&](int) { ++calls; });
    EXPECT_EQ(calls, GetParam());
  }
}

TEST_P(ThreadPoolOf, MayBeCalledByDifferentThreadsInTurn) {
  auto pool = MakePool(GetParam());
  int total = 0;
  for (int i = 0; i < 4; ++i) {
    std::thread([&] {
      std::atomic<int> calls{0};
      pool->Run([&](int) { ++calls; });
      total += calls;
    }).join();
  }
  EXPECT_EQ(total, 4 * GetParam());
}

TEST(ThreadPool, ManyPoolsWorkSideBySide) {
  std::vector<std::thread> ranks;
  std::atomic<int> sum{0};
  for (int r = 0; r < 4; ++r) {
    ranks.emplace_back([&sum, r] {
      auto pool = ThreadPool::Create({.threads = 2, .pin = true, .first_core = 2 * r}).value();
      for (int i = 0; i < 100; ++i) {
        pool->Run([&](int) {
          pool->Barrier();
          ++sum;
        });
      }
    });
  }
  for (auto& r : ranks) r.join();
  EXPECT_EQ(sum, 4 * 2 * 100);
}

TEST(ThreadPool, PinsDistinctCoresAndOnlyWhenThereAreEnough) {
  const std::vector<int> cores = UsableCores();
  ASSERT_FALSE(cores.empty());
  EXPECT_EQ(std::set<int>(cores.begin(), cores.end()).size(), cores.size());
  const int n = static_cast<int>(cores.size());
  std::thread([&] {  // a thread of its own: Run binds its caller
    auto pool = ThreadPool::Create({.threads = n, .pin = true}).value();
    EXPECT_TRUE(pool->pinned());
    std::vector<int> ran_on(n, -1);
    pool->Run([&](int thread) { ran_on[thread] = sched_getcpu(); });
    EXPECT_EQ(ran_on, cores);
  })
      .join();
  EXPECT_FALSE(ThreadPool::Create({.threads = n + 1}).value()->pinned());
  EXPECT_FALSE(ThreadPool::Create({.threads = 1, .first_core = n}).value()->pinned());
}

TEST(ThreadPool, RefusesCountsOutOfRange) {
  for (const int threads : {-1, 100000}) {
    EXPECT_EQ(ThreadPool::Create({.threads = threads}).status().code(),
              absl::StatusCode::kInvalidArgument);
  }
  EXPECT_FALSE(ThreadPool::Create({.threads = 1, .first_core = -1}).ok());
}

TEST(ThreadPoolDeathTest, NestedRunIsABug) {
  auto pool = MakePool(1);
  EXPECT_DEATH(pool->Run([&](int) { pool->Run([](int) {}); }), "inside Run");
}

}  // namespace
}  // namespace shoal
