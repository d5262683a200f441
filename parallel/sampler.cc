#include "parallel/sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <unordered_map>

namespace shoal {
namespace {

constexpr int kMaxCandidates = 1024;
constexpr int kOpenCandidates =
    256;  // without top-k: enough for top-p or min-p to cut, nearly always

constexpr int kBlock = 32;  // logits that are looked at together

// fn(x) for each kBlock logits; the last ones are filled up with -inf.
template <typename Fn>
void ForBlocks(absl::Span<const float> logits, const Fn& fn) {
  const size_t whole = logits.size() / kBlock * kBlock;
  for (size_t i = 0; i < whole; i += kBlock) fn(&logits[i]);
  if (whole == logits.size()) return;
  float last[kBlock];
  std::fill(last, last + kBlock, -std::numeric_limits<float>::infinity());
  std::copy(logits.begin() + whole, logits.end(), last);
  fn(last);
}

// e^x for x <= 0 to 2e-7 relative; 0 from -87 down, and for NaN. x = n ln 2 + r, Cephes' polynomial
// in r. Plain arithmetic without branches: library calls would take a millisecond for a vocabulary.
float ExpOfNegative(float x) {
  constexpr float kRound = 12582912;  // 1.5 * 2^23: what is added to it loses its fraction
  const float low = x > -87 ? x : -87;
  const float n = (low * 1.44269504088896341f + kRound) - kRound;
  const float r = (low - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r * r + r) + 1;
  const auto power = std::bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
  return x > -87 ? p * power : 0;
}

bool Better(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
}

bool HasPenalties(const SamplingParams& p) {
  return p.repeat_penalty != 1 || p.presence_penalty != 0 || p.frequency_penalty != 0;
}

absl::Span<const int32_t> PenaltyWindow(const SamplingParams& p,
                                        absl::Span<const int32_t> history) {
  if (p.penalty_last_n < 0 || history.size() <= static_cast<size_t>(p.penalty_last_n))
    return history;
  return history.last(p.penalty_last_n);
}

std::unordered_map<int32_t, int> Counts(absl::Span<const int32_t> tokens) {
  std::unordered_map<int32_t, int> counts;
  for (int32_t t : tokens) ++counts[t];
  return counts;
}

float Penalized(const SamplingParams& p, float logit, int count) {
  logit = logit > 0 ? logit / p.repeat_penalty : logit * p.repeat_penalty;
  return logit - p.presence_penalty - static_cast<float>(count) * p.frequency_penalty;
}

// Applies bias, mask and penalties. Touched logits only sink when `all` is empty (see
// CandidatesNeeded).
void Adjust(const SamplingParams& p, absl::Span<const int32_t> history,
            absl::Span<const uint64_t> allowed, std::vector<Candidate>& candidates) {
  if (HasPenalties(p)) {
    const auto counts = Counts(PenaltyWindow(p, history));
    for (Candidate& c : candidates) {
      if (const auto it = counts.find(c.token); it != counts.end())
        c.logit = Penalized(p, c.logit, it->second);
    }
  }
  if (!p.logit_bias.empty()) {
    const std::unordered_map<int32_t, float> bias(p.logit_bias.begin(), p.logit_bias.end());
    for (Candidate& c : candidates) {
      if (const auto it = bias.find(c.token); it != bias.end()) c.logit += it->second;
    }
  }
  if (!allowed.empty()) {
    std::erase_if(candidates, [&](const Candidate& c) {
      const size_t word = static_cast<size_t>(c.token) / 64;
      return word >= allowed.size() || ((allowed[word] >> (c.token % 64)) & 1) == 0;
    });
  }
}

// Keeps the best k (0: all) in order; orders all when k is 0.
void KeepBest(std::vector<Candidate>& c, int k) {
  const size_t keep = k > 0 ? std::min<size_t>(k, c.size()) : c.size();
  std::partial_sort(c.begin(), c.begin() + keep, c.end(), Better);
  c.resize(keep);
}

struct Cut {
  size_t keep = 0;
  bool decided = true;  // false: tokens that are not candidates would be kept too
};

// How many of the ordered weights top-p and min-p keep. total: the weight of all tokens that
// compete.
Cut TopPMinP(const SamplingParams& p, absl::Span<const double> weights, double total,
             bool complete) {
  Cut cut{weights.size(), complete};
  if (p.min_p > 0) {
    const double floor = p.min_p * weights[0];
    const auto it =
        std::find_if(weights.begin(), weights.end(), [&](double w) { return w < floor; });
    cut.keep = std::max<size_t>(1, it - weights.begin());
    if (it != weights.end()) cut.decided = true;
  }
  if (p.top_p < 1) {
    double sum = 0;
    for (size_t i = 0; i < cut.keep; ++i) {
      sum += weights[i];
      if (sum >= p.top_p * total) {
        cut.keep = i + 1;
        cut.decided = true;
        break;
      }
    }
  }
  return cut;
}

std::optional<int32_t> Draw(const SamplingParams& p, std::vector<Candidate>& candidates,
                            bool complete, double log_sum_exp, size_t position) {
  KeepBest(candidates, p.top_k);
  // Fewer than top_k candidates are the whole vocabulary.
  const bool top_k_cuts = p.top_k > 0;
  std::vector<double> weights(candidates.size());
  const double scale = 1.0 / p.temperature;
  const double best = candidates[0].logit;
  double sum = 0;
  for (size_t i = 0; i < candidates.size(); ++i) {
    weights[i] = std::exp((candidates[i].logit - best) * scale);
    sum += weights[i];
  }
  const bool closed = complete || top_k_cuts;
  const double total = closed ? sum : std::exp(log_sum_exp - best * scale);
  const Cut cut = TopPMinP(p, weights, total, closed);
  if (!cut.decided) return std::nullopt;
  double kept = 0;
  for (size_t i = 0; i < cut.keep; ++i) kept += weights[i];
  double r = UniformAt(p.seed, position) * kept;
  for (size_t i = 0; i < cut.keep; ++i) {
    r -= weights[i];
    if (r < 0) return candidates[i].token;
  }
  return candidates[cut.keep - 1].token;
}

void FillLogprobs(int count, const std::vector<float>& all, Sample& sample) {
  const double norm = LogSumExp(all, 1);
  sample.logprob = static_cast<float>(all[sample.token] - norm);
  sample.top = TopCandidates(all, 0, count);
  for (Candidate& c : sample.top) c.logit = static_cast<float>(c.logit - norm);
}

}  // namespace

int CandidatesNeeded(const SamplingParams& p, absl::Span<const int32_t> history) {
  const bool may_rise = p.repeat_penalty < 1 || p.presence_penalty < 0 || p.frequency_penalty < 0;
  if (may_rise || !p.logit_bias.empty() || p.logprobs >= 0) return 0;
  const size_t sinking = HasPenalties(p) ? Counts(PenaltyWindow(p, history)).size() : 0;
  // Penalties change the sum over the vocabulary, which top-p without top-k needs.
  if (sinking > 0 && p.temperature > 0 && p.top_k <= 0) return 0;
  const size_t base = p.temperature <= 0 ? 1 : p.top_k > 0 ? p.top_k : kOpenCandidates;
  if (p.temperature > 0 && p.top_k <= 0 && p.top_p >= 1 && p.min_p <= 0) return 0;
  return base + sinking > kMaxCandidates ? 0 : static_cast<int>(base + sinking);
}

std::optional<Sample> SampleToken(const SamplingParams& p, absl::Span<const int32_t> history,
                                  RowLogits row, absl::Span<const uint64_t> allowed) {
  const bool complete = !row.all.empty();
  std::vector<Candidate>& c = row.candidates;
  if (complete) {
    c.resize(row.all.size());
    for (size_t i = 0; i < c.size(); ++i) c[i] = {static_cast<int32_t>(i), row.all[i]};
  } else if (!allowed.empty()) {
    return std::nullopt;
  }
  std::erase_if(c, [](const Candidate& x) { return std::isnan(x.logit); });
  Adjust(p, history, allowed, c);
  Sample sample;
  if (c.empty()) return sample;  // nothing is allowed or every logit is NaN: token 0
  if (p.temperature <= 0) {
    sample.token = std::min_element(c.begin(), c.end(), Better)->token;
  } else {
    const std::optional<int32_t> token = Draw(p, c, complete, row.log_sum_exp, history.size());
    if (!token.has_value()) return std::nullopt;
    sample.token = *token;
  }
  if (p.logprobs >= 0 && complete) FillLogprobs(p.logprobs, row.all, sample);
  return sample;
}

std::vector<Candidate> TopCandidates(absl::Span<const float> logits, int32_t first_token, int k) {
  std::vector<Candidate> heap;  // the worst of the best k on top
  if (k <= 0) return heap;
  heap.reserve(k);
  size_t i = 0;
  for (; i < logits.size() && heap.size() < static_cast<size_t>(k); ++i) {
    if (std::isnan(logits[i])) continue;
    heap.push_back({first_token + static_cast<int32_t>(i), logits[i]});
    std::push_heap(heap.begin(), heap.end(), Better);
  }
  while (i < logits.size()) {
    const absl::Span<const float> block = logits.subspan(i, kBlock);
    // NaN is above nothing, and an equal logit of a later token is no better. Nearly all blocks
    // hold no candidate; this loop has no branches, so that it becomes vector code.
    const float worst = heap.front().logit;
    int better = 0;
    for (const float x : block) better |= static_cast<int>(x > worst);
    for (size_t j = 0; better != 0 && j < block.size(); ++j) {
      if (!(block[j] > heap.front().logit)) continue;
      std::pop_heap(heap.begin(), heap.end(), Better);
      heap.back() = {first_token + static_cast<int32_t>(i + j), block[j]};
      std::push_heap(heap.begin(), heap.end(), Better);
    }
    i += block.size();
  }
  std::sort_heap(heap.begin(), heap.end(), Better);
  return heap;
}

std::vector<Candidate> MergeCandidates(std::vector<Candidate> shards, int k) {
  KeepBest(shards, k);
  return shards;
}

double LogSumExp(absl::Span<const float> logits, float scale) {
  // Each lane has its own maximum and sum, so that the compiler may use vectors.
  float most[kBlock];
  std::fill(most, most + kBlock, -std::numeric_limits<float>::infinity());
  ForBlocks(logits, [&](const float* x) {
    for (int i = 0; i < kBlock; ++i) most[i] = x[i] * scale > most[i] ? x[i] * scale : most[i];
  });
  const float best = *std::max_element(most, most + kBlock);
  if (!std::isfinite(best)) return best;
  double sums[kBlock] = {};
  ForBlocks(logits, [&](const float* x) {
    float e[kBlock];
    for (int i = 0; i < kBlock; ++i) e[i] = ExpOfNegative(x[i] * scale - best);
    for (int i = 0; i < kBlock; ++i) sums[i] += e[i];
  });
  return best + std::log(std::accumulate(sums, sums + kBlock, 0.0));
}

double UniformAt(uint64_t seed, uint64_t position) {
  uint64_t z = seed + (position + 1) * 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  z ^= z >> 31;
  return static_cast<double>(z >> 11) * 0x1.0p-53;
}

}  // namespace shoal
