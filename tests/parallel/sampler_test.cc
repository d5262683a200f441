// Sampling from candidates gives what sampling from the whole row gives, or says that it cannot
// tell.
#include "parallel/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

namespace shoal {
namespace {

std::vector<float> RandomLogits(int n, uint32_t seed, float spread) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> d(0, spread);
  std::vector<float> x(n);
  for (float& v : x) v = d(rng);
  return x;
}

RowLogits Whole(const std::vector<float>& x) {
  RowLogits r;
  r.all = x;
  return r;
}

// As `shards` last-stage ranks would send it.
RowLogits Sharded(const std::vector<float>& x, int shards, int k, float inv_temperature) {
  RowLogits r;
  double sum = 0;
  for (int s = 0; s < shards; ++s) {
    const int n = static_cast<int>(x.size()), begin = n * s / shards, end = n * (s + 1) / shards;
    const auto shard = absl::MakeConstSpan(x).subspan(begin, end - begin);
    const auto best = TopCandidates(shard, begin, k);
    r.candidates.insert(r.candidates.end(), best.begin(), best.end());
    sum += std::exp(LogSumExp(shard, inv_temperature));
  }
  r.candidates = MergeCandidates(std::move(r.candidates), k);
  r.log_sum_exp = std::log(sum);
  return r;
}

TEST(Sampler, GreedyTakesTheBestAndTheLowerOfTwoEqual) {
  SamplingParams p;
  p.temperature = 0;
  EXPECT_EQ(SampleToken(p, {}, Whole({1, 5, 5, 2}), {})->token, 1);
}

TEST(Sampler, CandidatesDecideAsTheWholeRowDoes) {
  int decided = 0;
  for (uint32_t seed = 0; seed < 400; ++seed) {
    const std::vector<float> x = RandomLogits(997, seed, seed % 3 == 0 ? 1.0f : 4.0f);
    SamplingParams p;
    p.seed = seed;
    p.temperature = 0.2f + static_cast<float>(seed % 7) * 0.3f;
    p.top_k = seed % 2 == 0 ? 40 : 0;
    p.top_p = seed % 5 == 0 ? 1.0f : 0.9f;
    p.min_p = seed % 4 == 0 ? 0.0f : 0.02f;
    p.repeat_penalty = seed % 2 == 0 ? 1.3f : 1.0f;
    const std::vector<int32_t> history = {3, 5, 8, 3, static_cast<int32_t>(seed)};
    const auto whole = SampleToken(p, history, Whole(x), {});
    ASSERT_TRUE(whole.has_value());
    const int k = CandidatesNeeded(p, history);
    if (k == 0) continue;
    for (const int shards : {1, 3}) {
      const auto part = SampleToken(p, history, Sharded(x, shards, k, 1 / p.temperature), {});
      if (!part.has_value()) continue;
      EXPECT_EQ(part->token, whole->token) << "seed " << seed << " shards " << shards;
      ++decided;
    }
  }
  EXPECT_GT(decided, 400);
}

TEST(Sampler, FrequenciesFollowTheDistribution) {
  const std::vector<float> x = {0, 1, 2, -1};
  SamplingParams p;
  p.temperature = 1;
  p.top_k = 0;
  p.top_p = 1;
  p.min_p = 0;
  const double norm = LogSumExp(x, 1);
  std::vector<int> counts(4);
  const int n = 40000;
  for (int i = 0; i < n; ++i) {
    p.seed = static_cast<uint64_t>(i) * 77 + 5;
    ++counts[SampleToken(p, {}, Whole(x), {})->token];
  }
  for (int t = 0; t < 4; ++t) {
    const double expected = std::exp(x[t] - norm) * n;
    EXPECT_NEAR(counts[t], expected, 5 * std::sqrt(expected)) << t;
  }
}

TEST(Sampler, TopPKeepsTheSmallestSetThatReachesIt) {
  // Probabilities 0.5, 0.3, 0.2: top-p 0.6 keeps the first two.
  const std::vector<float> x = {std::log(0.5f), std::log(0.3f), std::log(0.2f)};
  SamplingParams p;
  p.temperature = 1;
  p.top_k = 0;
  p.top_p = 0.6f;
  p.min_p = 0;
  std::vector<int> counts(3);
  for (uint64_t seed = 0; seed < 2000; ++seed) {
    p.seed = seed * 31;
    ++counts[SampleToken(p, {}, Whole(x), {})->token];
  }
  EXPECT_EQ(counts[2], 0);
  EXPECT_NEAR(counts[0], 1250, 150);
}

TEST(Sampler, DrawDependsOnSeedAndPositionOnly) {
  EXPECT_EQ(UniformAt(1, 2), UniformAt(1, 2));
  EXPECT_NE(UniformAt(1, 2), UniformAt(1, 3));
  EXPECT_NE(UniformAt(1, 2), UniformAt(2, 2));
}

TEST(Sampler, PenaltiesBiasAndMask) {
  SamplingParams p;
  p.temperature = 0;
  p.frequency_penalty = 2;
  EXPECT_EQ(SampleToken(p, {0, 0}, Whole({3, 2, 1}), {})->token, 1);
  p.frequency_penalty = 0;
  p.logit_bias = {{2, 10}};
  EXPECT_EQ(CandidatesNeeded(p, {}), 0) << "a bias can lift any token";
  EXPECT_EQ(SampleToken(p, {}, Whole({3, 2, 1}), {})->token, 2);
  p.logit_bias.clear();
  const uint64_t allowed[] = {0b100};
  EXPECT_EQ(SampleToken(p, {}, Whole({3, 2, 1}), allowed)->token, 2);
  EXPECT_FALSE(SampleToken(p, {}, Sharded({3, 2, 1}, 1, 1, 1), allowed).has_value());
}

TEST(Sampler, LogprobsAreOfTheWholeDistribution) {
  SamplingParams p;
  p.temperature = 0;
  p.logprobs = 2;
  const auto s = SampleToken(p, {}, Whole({0, 2, 1}), {});
  ASSERT_EQ(s->top.size(), 2u);
  EXPECT_NEAR(s->logprob, 2 - std::log(std::exp(0.0) + std::exp(1.0) + std::exp(2.0)), 1e-6);
  EXPECT_EQ(s->top[1].token, 2);
}

TEST(Sampler, TopCandidatesAreThoseOfASort) {
  for (const int n : {1, 31, 32, 33, 500, 4099}) {
    // Few distinct values: many ties. Some NaN, also at both ends.
    std::vector<float> x = RandomLogits(n, static_cast<uint32_t>(n), 3);
    for (float& v : x) v = std::round(v * 4);
    for (int i = 0; i < n; i += 7) x[i] = std::nanf("");
    std::vector<Candidate> sorted;
    for (int i = 0; i < n; ++i) {
      if (!std::isnan(x[i])) sorted.push_back({10 + i, x[i]});
    }
    std::stable_sort(sorted.begin(), sorted.end(),
                     [](const Candidate& a, const Candidate& b) { return a.logit > b.logit; });
    for (const int k : {0, 1, 3, 40, 5000}) {
      const auto best = TopCandidates(x, 10, k);
      ASSERT_EQ(best.size(), std::min<size_t>(k, sorted.size())) << n << ", " << k;
      for (size_t i = 0; i < best.size(); ++i) {
        ASSERT_EQ(best[i].token, sorted[i].token) << n << ", " << k << ", " << i;
        ASSERT_EQ(best[i].logit, sorted[i].logit);
      }
    }
  }
}

TEST(Sampler, LogSumExpIsThatOfDoubles) {
  for (const int n : {1, 31, 32, 33, 4099}) {
    for (const float scale : {1.0f, 0.2f, 10.0f}) {
      std::vector<float> x = RandomLogits(n, static_cast<uint32_t>(n), 5);
      x[n / 2] = -std::numeric_limits<float>::infinity();
      x.push_back(1);
      double sum = 0;
      for (const float v : x) sum += std::exp(static_cast<double>(v * scale));
      EXPECT_NEAR(LogSumExp(x, scale), std::log(sum), 1e-6 * std::max(1.0, std::log(sum)))
          << n << ", " << scale;
    }
  }
  const float none = -std::numeric_limits<float>::infinity();
  EXPECT_EQ(LogSumExp({none, none}, 1), none);
}

TEST(Sampler, NanLogitsAreNeverDrawn) {
  SamplingParams p;
  const float nan = std::nanf("");
  for (uint64_t seed = 0; seed < 50; ++seed) {
    p.seed = seed;
    EXPECT_EQ(SampleToken(p, {}, Whole({nan, 1, nan}), {})->token, 1);
  }
}

}  // namespace
}  // namespace shoal
