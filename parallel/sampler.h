// From logits to the next token.
//
// Order: bias and penalties, temperature, top-k, top-p, min-p (as vLLM and the OpenAI API read
// them: top-p and min-p see the tempered distribution). The random number depends on (seed,
// position) alone, so neither the number of ranks nor other requests change a text.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "absl/types/span.h"

namespace shoal {

struct SamplingParams {
  float temperature = 0.8f;  // 0: greedy
  int top_k = 40;            // 0: off
  float top_p = 0.95f;       // 1: off
  float min_p = 0.05f;       // 0: off
  float repeat_penalty = 1;  // divides positive logits, multiplies negative ones (CTRL paper)
  float presence_penalty = 0;
  float frequency_penalty = 0;
  int penalty_last_n = 64;  // tokens of history that the penalties see; -1: all
  uint64_t seed = 0;
  int logprobs = -1;  // -1: none; 0: the chosen token's; n: and the n best
  std::vector<std::pair<int32_t, float>> logit_bias;
  friend bool operator==(const SamplingParams&, const SamplingParams&) = default;
};

struct Candidate {
  int32_t token = 0;
  float logit = 0;
};

// What rank 0 knows of one row. Either every logit, or the best of each vocabulary shard.
struct RowLogits {
  std::vector<float> all;  // [vocab], or empty
  std::vector<Candidate>
      candidates;  // best first when `all` is empty; every absent token is no better than the last
  // log of the sum over the vocabulary of exp(logit / temperature); only with candidates.
  double log_sum_exp = 0;
};

struct Sample {
  int32_t token = 0;
  float logprob = 0;           // of the untempered distribution; set when asked for
  std::vector<Candidate> top;  // `logit` holds the log-probability
};

// Candidates per shard that are enough to decide most draws; 0: the whole row is needed at once.
int CandidatesNeeded(const SamplingParams& params, absl::Span<const int32_t> history);

// history: the sequence so far, prompt included; its length is the position drawn for. allowed: one
// bit for each token, or empty for all. nullopt: these candidates cannot decide, ask for the whole
// row.
std::optional<Sample> SampleToken(const SamplingParams& params, absl::Span<const int32_t> history,
                                  RowLogits row, absl::Span<const uint64_t> allowed);

// The k best of a shard's logits, best first, ties to the lower token; tokens are numbered from
// first_token.
std::vector<Candidate> TopCandidates(absl::Span<const float> logits, int32_t first_token, int k);

// The k best of the candidates of several shards, each of which sent its k best: only those are
// sure to be the best of the whole vocabulary.
std::vector<Candidate> MergeCandidates(std::vector<Candidate> shards, int k);

// log sum exp(scale * x), to about 1e-7; NaN counts as -inf.
double LogSumExp(absl::Span<const float> logits, float scale);

// Uniform in [0, 1) from (seed, position), by splitmix64's finalizer.
double UniformAt(uint64_t seed, uint64_t position);

}  // namespace shoal
