#include "kernels/cpu/elementwise.h"

#include <algorithm>
#include <cmath>

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

float SumOfSquares(const float* x, int n) {
  float lanes[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) lanes[l] += x[i + l] * x[i + l];
  }
  double sum = 0;
  for (; i < n; ++i) sum += static_cast<double>(x[i]) * x[i];
  for (float lane : lanes) sum += lane;
  return static_cast<float>(sum);
}

// Chooses the `used` largest logits, best first, the lower id first among equals.
void ChooseExperts(const float* logits, int experts, int used, int32_t* ids) {
  int count = 0;
  for (int e = 0; e < experts; ++e) {
    int at = count;
    while (at > 0 && logits[e] > logits[ids[at - 1]]) --at;
    if (at >= used) continue;
    count = std::min(count + 1, used);
    for (int i = count - 1; i > at; --i) ids[i] = ids[i - 1];
    ids[at] = e;
  }
}

float Sigmoid(float x) { return 1 / (1 + std::exp(-x)); }

void RouteSigmoid(const RouterArgs& args, const float* logits, int32_t* ids, float* weights) {
  float scores[kMaxRoutedExperts];
  for (int e = 0; e < args.experts; ++e) {
    scores[e] = Sigmoid(logits[e]) + (args.choice_bias != nullptr ? args.choice_bias[e] : 0);
  }
  ChooseExperts(scores, args.experts, args.used, ids);
  float total = 0;
  for (int i = 0; i < args.used; ++i) total += weights[i] = Sigmoid(logits[ids[i]]);
  if (!args.renormalize) total = 1;
  for (int i = 0; i < args.used; ++i) weights[i] = weights[i] / total * args.scale;
}

void RouteRow(const RouterArgs& args, const float* logits, int32_t* ids, float* weights) {
  if (args.sigmoid) return RouteSigmoid(args, logits, ids, weights);
  ChooseExperts(logits, args.experts, args.used, ids);
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
               float* out) {
  const int64_t cols = table.shape.cols;
  for (const int32_t id : ids) SHOAL_CHECK(id < table.shape.rows, "token id beyond the embedding");
  ForRows(pool, static_cast<int>(ids.size()), cols, [&](int begin, int end) {
    for (int i = begin; i < end; ++i) {
      float* row = out + i * cols;
      if (ids[i] < 0) {
        std::fill(row, row + cols, 0.0f);
      } else {
        DequantizePanelRow(table.shape, table.panel(ids[i] / kPanelRows), ids[i] % kPanelRows, row);
      }
    }
  });
}

void RmsNormRows(ThreadPool* pool, const float* x, int64_t stride, const float* weight, float eps,
                 int rows, int cols, float* out, int64_t out_stride) {
  ForRows(pool, rows, cols, [&](int begin, int end) {
    for (int r = begin; r < end; ++r) {
      const float* in = x + r * stride;
      float* y = out + r * out_stride;
      const float inverse = 1 / std::sqrt(SumOfSquares(in, cols) / static_cast<float>(cols) + eps);
      for (int c = 0; c < cols; ++c) y[c] = in[c] * inverse * weight[c];
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
  ForRows(pool, rows, args.experts * int64_t{4}, [&](int begin, int end) {
    for (int64_t r = begin; r < end; ++r) {
      RouteRow(args, args.logits + r * args.experts, ids + r * args.used, weights + r * args.used);
    }
  });
}

}  // namespace shoal
