// The reduction of logits on the CPU stand-in.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "kernels/cuda/ops.h"
#include "simt/runner.h"

namespace shoal::cuda {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kFirstToken = 1000;

std::vector<LogitCandidate> BestOf(const float* logits, int vocab, int k) {
  std::vector<LogitCandidate> all;
  for (int i = 0; i < vocab; ++i) {
    if (!std::isnan(logits[i])) all.push_back({kFirstToken + i, logits[i]});
  }
  std::stable_sort(all.begin(), all.end(), [](const LogitCandidate& a, const LogitCandidate& b) {
    return a.logit > b.logit;
  });
  all.resize(k, {-1, -kInfinity});
  return all;
}

double LogSum(const float* logits, int vocab, float scale) {
  double largest = -kInfinity, sum = 0;
  for (int i = 0; i < vocab; ++i) largest = std::max(largest, double{logits[i]} * scale);
  for (int i = 0; i < vocab; ++i) sum += std::exp(double{logits[i]} * scale - largest);
  return largest + std::log(sum);
}

struct Result {
  std::vector<LogitSummary> summaries;
  std::vector<LogitCandidate> best;
};

Result Reduce(const std::vector<float>& logits, int64_t stride, int vocab, int candidates,
              const std::vector<LogitRequest>& requests) {
  const int rows = static_cast<int>(requests.size());
  std::vector<uint64_t> workspace(LogitWorkspaceBytes(rows, vocab, candidates) / 8 + 1,
                                  ~uint64_t{0});
  Result r;
  r.summaries.resize(rows);
  r.best.resize(int64_t{rows} * candidates);
  ReduceLogits({logits.data(), stride, rows, vocab, kFirstToken, requests.data(), candidates,
                reinterpret_cast<uint8_t*>(workspace.data())},
               r.summaries.data(), r.best.data(), nullptr);
  return r;
}

TEST(CudaLogits, FindsTheBestAndTheSum) {
  struct Case {
    int vocab, candidates;
  };
  int seed = 0;
  for (const Case& c :
       {Case{7, 7}, Case{4097, 1}, Case{9001, 40}, Case{300, 0}, Case{5000, 1024}}) {
    simt::SetSeed(seed);
    std::mt19937 rng(seed++);
    std::normal_distribution<float> gauss(0, 4);
    const int64_t stride = c.vocab + 3;
    std::vector<float> logits(3 * stride);
    for (float& x : logits) x = std::round(gauss(rng) * 64) / 64;  // ties, zeros of both signs
    const std::vector<LogitRequest> requests = {{1, 5}, {0.7f, -1}, {0, c.vocab - 1}};
    const Result r = Reduce(logits, stride, c.vocab, c.candidates, requests);
    for (int row = 0; row < 3; ++row) {
      const float* x = logits.data() + row * stride;
      const LogitRequest& request = requests[row];
      const double log_sum = request.scale > 0 ? LogSum(x, c.vocab, request.scale) : 0;
      // Sums of chunks are f32, of at most 16 + 8 + 8 terms in a row.
      EXPECT_NEAR(r.summaries[row].log_sum_exp, log_sum, 64 * 0x1p-24 * (1 + std::fabs(log_sum)));
      EXPECT_EQ(r.summaries[row].target_logit, request.target < 0 ? -kInfinity : x[request.target]);
      const auto best = BestOf(x, c.vocab, c.candidates);
      for (int i = 0; i < c.candidates; ++i) {
        ASSERT_EQ(r.best[row * c.candidates + i].token, best[i].token) << row << ' ' << i;
        ASSERT_EQ(r.best[row * c.candidates + i].logit, best[i].logit);
      }
    }
  }
}

TEST(CudaLogits, WhatIsNoNumberIsNoCandidate) {
  const std::vector<float> logits = {NAN, 1, -kInfinity, NAN, -NAN, 3};
  const Result r = Reduce(logits, 6, 6, 5, {{1, -1}});
  const int32_t tokens[] = {1005, 1001, 1002, -1, -1};
  for (int i = 0; i < 5; ++i) EXPECT_EQ(r.best[i].token, tokens[i]) << i;
  EXPECT_EQ(r.best[4].logit, -kInfinity);
  EXPECT_TRUE(std::isnan(r.summaries[0].log_sum_exp));
}

TEST(CudaLogits, InfinitiesAreTheirOwnSum) {
  std::vector<float> logits(5000, -kInfinity);
  EXPECT_EQ(Reduce(logits, 5000, 5000, 1, {{1, -1}}).summaries[0].log_sum_exp, -kInfinity);
  logits[4500] = 2;  // the first chunk adds nothing
  EXPECT_NEAR(Reduce(logits, 5000, 5000, 1, {{1, -1}}).summaries[0].log_sum_exp, 2, 1e-6);
  logits[3] = kInfinity;
  EXPECT_EQ(Reduce(logits, 5000, 5000, 1, {{1, -1}}).summaries[0].log_sum_exp, kInfinity);
}

}  // namespace
}  // namespace shoal::cuda
