#include "kernels/cpu/elementwise.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/check.h"

namespace shoal {
namespace {

constexpr int64_t kSerialFloats = 32768;  // less work than this costs less than waking the team
constexpr int kLanes = 16;                // partial sums of a reduction: fixed, so that results are

// fn(begin, end) over parts of [0, n); on the caller alone when the work is small.
template <typename Fn>
void ForRows(ThreadPool* pool, int n, int64_t floats_per_row, const Fn& fn) {
  if (n * floats_per_row < kSerialFloats) {
    fn(0, n);
    return;
  }
  const int64_t threads = pool->threads();
  pool->Run([&](int thread) {
    fn(static_cast<int>(n * thread / threads), static_cast<int>(n * (thread + 1) / threads));
  });
}

// The sum of term(x[i]).
template <typename Term>
float SumOf(const float* x, int64_t n, const Term& term) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) lanes[l] += term(x[i + l]);
  }
  double sum = 0;
  for (; i < n; ++i) sum += term(static_cast<double>(x[i]));
  for (float lane : lanes) sum += lane;
  return static_cast<float>(sum);
}

// Chooses the `used` largest of n scores, best first, the lower id first among equals.
void ChooseBest(const float* scores, int n, int used, int32_t* ids) {
  int count = 0;
  for (int e = 0; e < n; ++e) {
    int at = count;
    while (at > 0 && scores[e] > scores[ids[at - 1]]) --at;
    if (at >= used) continue;
    count = std::min(count + 1, used);
    for (int i = count - 1; i > at; --i) ids[i] = ids[i - 1];
    ids[at] = e;
  }
}

// Leaves the experts of all but the best groups no score.
void KeepBestGroups(const RouterArgs& args, float* scores) {
  const int size = args.experts / args.groups;
  float sums[kMaxExpertGroups];
  for (int g = 0; g < args.groups; ++g) {
    int32_t best[2];
    ChooseBest(scores + g * size, size, 2, best);
    sums[g] = scores[g * size + best[0]] + scores[g * size + best[1]];
  }
  int32_t kept[kMaxExpertGroups];
  ChooseBest(sums, args.groups, args.groups_used, kept);
  for (int g = 0; g < args.groups; ++g) {
    if (std::find(kept, kept + args.groups_used, g) != kept + args.groups_used) continue;
    std::fill_n(scores + g * size, size, -std::numeric_limits<float>::infinity());
  }
}

float Sigmoid(float x) { return 1 / (1 + std::exp(-x)); }

void RouteSigmoid(const RouterArgs& args, const float* logits, int32_t* ids, float* weights) {
  float scores[kMaxRoutedExperts];
  // Without a bias and groups by the logits: large ones have the same sigmoid.
  const bool by_logits = args.choice_bias == nullptr && args.groups == 1;
  for (int e = 0; !by_logits && e < args.experts; ++e) {
    scores[e] = Sigmoid(logits[e]) + (args.choice_bias != nullptr ? args.choice_bias[e] : 0);
  }
  if (args.groups > 1) KeepBestGroups(args, scores);
  ChooseBest(by_logits ? logits : scores, args.experts, args.used, ids);
  float total = 0;
  for (int i = 0; i < args.used; ++i) total += weights[i] = Sigmoid(logits[ids[i]]);
  if (!args.renormalize) total = 1;
  for (int i = 0; i < args.used; ++i) weights[i] = weights[i] / total * args.scale;
}

void RouteRow(const RouterArgs& args, const float* logits, int32_t* ids, float* weights) {
  if (args.sigmoid) return RouteSigmoid(args, logits, ids, weights);
  ChooseBest(logits, args.experts, args.used, ids);
  // Softmax keeps the order, so the best logit is the largest of both sets.
  const float max = logits[ids[0]];
  float chosen = 0;
  for (int i = 0; i < args.used; ++i) {
    weights[i] = std::exp(logits[ids[i]] - max);
    chosen += weights[i];
  }
  float total = chosen;
  if (args.softmax_all && !args.renormalize) {
    total = 0;
    for (int e = 0; e < args.experts; ++e) total += std::exp(logits[e] - max);
  }
  for (int i = 0; i < args.used; ++i) weights[i] = weights[i] / total * args.scale;
}

}  // namespace

void EmbedRows(ThreadPool* pool, const PackedMatrix& table, absl::Span<const int32_t> ids,
               float scale, float* out) {
  const int64_t cols = table.shape.cols;
  for (const int32_t id : ids) SHOAL_CHECK(id < table.shape.rows, "token id beyond the embedding");
  ForRows(pool, static_cast<int>(ids.size()), cols, [&](int begin, int end) {
    for (int i = begin; i < end; ++i) {
      float* row = out + i * cols;
      if (ids[i] < 0) {
        std::fill(row, row + cols, 0.0f);
      } else {
        DequantizePanelRow(table.shape, table.panel(ids[i] / kPanelRows), ids[i] % kPanelRows, row);
        for (int64_t c = 0; c < cols; ++c) row[c] *= scale;
      }
    }
  });
}

Moments MomentsOf(const float* x, int64_t n) {
  const float mean = SumOf(x, n, [](auto v) { return v; }) / static_cast<float>(n);
  return {mean, SumOf(x, n, [mean](auto v) { return (v - mean) * (v - mean); })};
}

void Normalize(const float* x, const float* weight, float mean, float factor, int64_t n,
               float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = (x[i] - mean) * factor * weight[i];
}

void NormRows(ThreadPool* pool, const LinearInput& input, int rows, int cols, float* out,
              int64_t out_stride) {
  const bool layer = input.kind == LinearInput::Kind::kLayerNorm;
  SHOAL_CHECK(layer || input.kind == LinearInput::Kind::kRmsNorm, "a norm is wanted");
  ForRows(pool, rows, cols, [&](int begin, int end) {
    for (int r = begin; r < end; ++r) {
      const float* in = input.x + r * input.stride;
      const Moments m =
          layer ? MomentsOf(in, cols) : Moments{0, SumOf(in, cols, [](auto v) { return v * v; })};
      const float inverse = 1 / std::sqrt(m.squares / static_cast<float>(cols) + input.eps);
      const float scale =
          input.row_scale != nullptr ? input.scale * input.row_scale[r] : input.scale;
      Normalize(in, input.weight, m.mean, inverse * scale, cols, out + r * out_stride);
    }
  });
}

void SumRowSquares(ThreadPool* pool, const float* x, int64_t stride, const ColumnRun (&runs)[2],
                   int rows, float* sums) {
  const int64_t cols = runs[0].end - runs[0].begin + runs[1].end - runs[1].begin;
  ForRows(pool, rows, cols, [&](int begin, int end) {
    for (int64_t r = begin; r < end; ++r) {
      for (int i = 0; i < 2; ++i) {
        sums[2 * r + i] = SumOf(x + r * stride + runs[i].begin, runs[i].end - runs[i].begin,
                                [](auto v) { return v * v; });
      }
    }
  });
}

void AddRows(ThreadPool* pool, float* x, int64_t x_stride, const float* y, int64_t y_stride,
             int rows, int cols) {
  ForRows(pool, rows, cols, [&](int begin, int end) {
    for (int r = begin; r < end; ++r) {
      float* to = x + r * x_stride;
      const float* from = y + r * y_stride;
      for (int c = 0; c < cols; ++c) to[c] += from[c];
    }
  });
}

void RouteRows(ThreadPool* pool, const RouterArgs& args, int rows, int32_t* ids, float* weights) {
  SHOAL_CHECK(args.used >= 1 && args.used <= args.experts && args.experts <= kMaxRoutedExperts,
              "experts out of range");
  SHOAL_CHECK(
      args.groups == 1 || (args.sigmoid && args.groups <= kMaxExpertGroups &&
                           args.groups_used >= 1 && args.groups_used <= args.groups &&
                           args.experts % args.groups == 0 && args.experts / args.groups >= 2 &&
                           args.used <= args.experts / args.groups * args.groups_used),
      "groups of experts out of range");
  ForRows(pool, rows, args.experts * int64_t{4}, [&](int begin, int end) {
    for (int64_t r = begin; r < end; ++r) {
      RouteRow(args, args.logits + r * args.experts, ids + r * args.used, weights + r * args.used);
    }
  });
}

}  // namespace shoal
