// Attention over a filled paged cache, its answer by the textbook, and how far a path may be from
// it.
#pragma once

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/backend.h"
#include "kernels/cpu/attention_kernels.h"
#include "kernels/cpu/kv_store.h"
#include "kv_fixture.h"

namespace shoal {

struct AttentionCase {
  AttentionShape attention;
  KvShape kv;
};

// Query heads [q_head_begin, + q_heads) of a model, with the KV heads that they read.
inline AttentionCase MakeAttentionCase(KvType type, int head_dim, int q_heads, int group,
                                       int window = 0, int q_head_begin = 0) {
  AttentionCase s;
  const int kv_begin = q_head_begin / group;
  const int kv_end = (q_head_begin + q_heads - 1) / group + 1;
  s.attention = {q_heads,
                 head_dim,
                 q_head_begin,
                 kv_begin,
                 group,
                 window,
                 1 / std::sqrt(static_cast<float>(head_dim))};
  s.kv = {type, kv_end - kv_begin, head_dim};
  return s;
}

// A batch over a filled cache: what every test needs.
struct AttentionProblem {
  AttentionCase shape;
  int context;
  std::mt19937 rng;
  TestKv cache;
  std::vector<Segment> segments;
  int rows = 0;
  int64_t stride;
  std::vector<float> q;
  std::vector<float> sinks;  // see AddSinks

  // Each entry of `runs` is (first position, rows, decode) of one sequence; positions before are in
  // the cache too.
  struct SequenceRun {
    int pos, rows;
    bool decode;
  };
  enum class Keys {
    kNormal,
    // Two dims of a hundred times the others' size, whose products with a query nearly cancel.
    kLarge,
  };
  AttentionProblem(const AttentionCase& s, const std::vector<SequenceRun>& runs, int seed,
                   Keys keys = Keys::kNormal)
      : shape(s), context(Context(runs)), rng(seed), cache(s.kv, Blocks(runs), rng) {
    stride = s.attention.q_heads * s.attention.head_dim + 5;
    int block = 0;
    for (const SequenceRun& run : runs) {
      segments.push_back({rows, run.rows, run.pos, cache.table(block), run.decode});
      rows += run.rows;
      Fill(run.pos + run.rows, cache.table(block), keys);
      block += (run.pos + run.rows + 15) / 16;
    }
    q = RandomFloats(rows * stride, rng, 2);
    if (keys == Keys::kNormal) return;
    shape.attention.scale = 1;
    for (float& x : q) x /= 8;
    for (int64_t at = 0; at < rows * stride; at += stride) {
      for (int head = 0; head < s.attention.q_heads; ++head) {
        float* x = &q[at + int64_t{head} * s.attention.head_dim];
        x[1] = -3 + x[1] / 50;
        x[0] = 3 + x[0] / 50;
      }
    }
  }

  // One for each head: far below the scores, among them, far above.
  void AddSinks() {
    for (int head = 0; head < shape.attention.q_heads; ++head) {
      sinks.push_back(head % 4 == 3 ? 50 : head % 4 == 2 ? -90 : 1.5f * static_cast<float>(head));
    }
    shape.attention.sinks = sinks.data();
  }

 private:
  static int Context(const std::vector<SequenceRun>& runs) {
    int context = 0;
    for (const SequenceRun& run : runs) context = std::max(context, run.pos + run.rows);
    return context;
  }
  static int Blocks(const std::vector<SequenceRun>& runs) {
    int blocks = 0;
    for (const SequenceRun& run : runs) blocks += (run.pos + run.rows + 15) / 16;
    return blocks;
  }
  void Fill(int tokens, const int32_t* table, Keys keys) {
    const int width = shape.kv.kv_heads * shape.kv.head_dim;
    std::vector<float> k = RandomFloats(int64_t{tokens} * width, rng);
    const std::vector<float> v = RandomFloats(int64_t{tokens} * width, rng);
    if (keys == Keys::kLarge) {
      const std::vector<float> large = RandomFloats(int64_t{tokens} * shape.kv.kv_heads, rng, 150);
      for (size_t i = 0; i < large.size(); ++i) {
        k[i * shape.kv.head_dim] = large[i];
        k[i * shape.kv.head_dim + 1] = large[i];
      }
    }
    std::vector<float> no_q(tokens * width);
    AttentionShape no_heads = shape.attention;
    no_heads.q_heads = 0;
    const Segment all[] = {{0, tokens, 0, table, false}};
    auto pool = ThreadPool::Create({.threads = 1, .pin = false}).value();
    KvStore(ScalarAttentionKernels().to_half, pool.get())
        .Write({.q = no_q.data(), .k = k.data(), .v = v.data(), .stride = width}, no_heads,
               cache.layer(), all);
  }
};

// Unit roundoffs of the path under test.
struct AttentionPrecision {
  double qk = 0;  // of q and k as they enter their product
  double p = 0;
  double v = 0;
  double terms = 1;  // products that make up one q * k
};

// What a sequence holds of one KV head, as doubles: [token, dim].
struct CachedHead {
  CachedHead(const AttentionProblem& p, const Segment& s, bool is_k, int kv_head) {
    dims = p.shape.kv.head_dim;
    for (int t = 0; t < s.pos + s.rows; ++t) {
      for (int d = 0; d < dims; ++d) x.push_back(p.cache.Get(is_k, s.blocks, t, kv_head, d));
    }
  }
  const double* at(int token) const { return x.data() + token * dims; }
  int dims;
  std::vector<double> x;
};

// One query head's output by the textbook in double, and a bound of the error that the path may
// make: a score is off by at most ds = scale * (rounding of operands + (terms + 6) float roundings)
// * sum |q k|, which moves every p by a factor within exp(2 ds); p, v and the sums add their own
// roundings.
inline void CheckHead(const AttentionProblem& p, const CachedHead& k, const CachedHead& v, int pos,
                      int head, const float* q, const float* out,
                      const AttentionPrecision& precision) {
  constexpr double kFloat = 0x1p-24;
  const AttentionShape& a = p.shape.attention;
  const int dims = a.head_dim;
  const int first = a.window == 0 ? 0
                    : a.chunked   ? pos - pos % a.window
                                  : std::max(0, pos - a.window + 1);
  std::vector<double> scores;
  double ds = 0, max = -1e300;
  for (int t = first; t <= pos; ++t) {
    double dot = 0, magnitude = 0;
    for (int d = 0; d < dims; ++d) {
      const double product = double{q[d]} * k.at(t)[d];
      dot += product;
      magnitude += std::fabs(product);
    }
    scores.push_back(dot * a.scale);
    max = std::max(max, scores.back());
    const double roundings = (precision.terms * dims + 6) * kFloat;
    ds = std::max(ds, a.scale * magnitude * (2 * precision.qk + roundings));
  }
  double sum = a.sinks == nullptr ? 0 : std::exp(a.sinks[head] - max);
  for (double& score : scores) sum += score = std::exp(score - max);
  const int n = static_cast<int>(scores.size());
  std::vector<double> expected(dims), magnitude(dims);
  for (int i = 0; i < n; ++i) {
    for (int d = 0; d < dims; ++d) {
      expected[d] += scores[i] / sum * v.at(first + i)[d];
      magnitude[d] += scores[i] / sum * std::fabs(v.at(first + i)[d]);
    }
  }
  // exp() itself is good to about 4 roundings; merging runs adds one per run.
  const int merges = n / kRunTokens;
  const double relative =
      std::expm1(2 * ds) + precision.p + precision.v + (n + merges + 16) * kFloat;
  for (int d = 0; d < dims; ++d) {
    ASSERT_NEAR(out[d], expected[d], 2 * magnitude[d] * relative + 1e-7)
        << "pos " << pos << " dim " << d;
  }
}

// Checks out [rows, stride] of every segment; precision(segment) says how it was computed.
template <typename PrecisionOf>
void CheckAttention(const AttentionProblem& p, const std::vector<float>& out,
                    const PrecisionOf& precision) {
  const AttentionShape& a = p.shape.attention;
  for (const Segment& s : p.segments) {
    for (int kv_head = 0; kv_head < p.shape.kv.kv_heads; ++kv_head) {
      const CachedHead k(p, s, true, kv_head), v(p, s, false, kv_head);
      for (int head = 0; head < a.q_heads; ++head) {
        if ((a.q_head_begin + head) / a.group - a.kv_head_begin != kv_head) continue;
        // The first and last rows, and one in seven between: the reference takes most of the time.
        for (int r = 0; r < s.rows;
             r += r < 2 || r >= s.rows - 3 ? 1 : std::min(7, s.rows - 2 - r)) {
          const int64_t at = (s.row + r) * p.stride + head * a.head_dim;
          CheckHead(p, k, v, s.pos + r, head, p.q.data() + at, out.data() + at, precision(s));
          if (testing::Test::HasFatalFailure()) FAIL() << "row " << s.row + r << " head " << head;
        }
      }
    }
  }
}

}  // namespace shoal
