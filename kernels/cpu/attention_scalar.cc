// The oracle of attention kernels: plain loops in the order of the formula.
#include <algorithm>
#include <cmath>

#include "kernels/cpu/attention_kernels.h"
#include "kernels/dtype.h"
#include "kernels/kv_layout.h"

namespace shoal {
namespace {

constexpr int kTokens = kKvBlockTokens;

// Values of one head of a block by token and dim; kv_layout.h has the layouts.
struct F32Values {
  static float K(const uint8_t* k, int dims, int dim, int token) {
    return reinterpret_cast<const float*>(k)[dim * kTokens + token];
  }
  static float V(const uint8_t* v, int dims, int dim, int token) {
    return reinterpret_cast<const float*>(v)[token * dims + dim];
  }
};

struct F16Values {
  static float K(const uint8_t* k, int dims, int dim, int token) {
    return HalfToFloat(reinterpret_cast<const uint16_t*>(k)[dim * kTokens + token]);
  }
  static float V(const uint8_t* v, int dims, int dim, int token) {
    return HalfToFloat(reinterpret_cast<const uint16_t*>(v)[token * dims + dim]);
  }
};

struct Q8Values {
  static float Scale(const uint8_t* x, int dim, int token) {
    return HalfToFloat(reinterpret_cast<const uint16_t*>(x)[dim / kKvPartDims * kTokens + token]);
  }
  static const int8_t* Ints(const uint8_t* x, int dims) {
    return reinterpret_cast<const int8_t*>(x + 2 * kTokens * KvParts(dims));
  }
  static float K(const uint8_t* k, int dims, int dim, int token) {
    return Scale(k, dim, token) * Ints(k, dims)[dim * kTokens + token];
  }
  static float V(const uint8_t* v, int dims, int dim, int token) {
    return Scale(v, dim, token) * Ints(v, dims)[token * dims + dim];
  }
};

template <typename Values>
void AttendOne(const AttendArgs& args, int query) {
  const int dims = args.head_dim;
  const float* q = args.q[query];
  float* acc = args.acc + static_cast<int64_t>(query) * args.acc_stride;
  float max = kNoScore;
  for (int t = args.begin[query]; t < args.end[query]; ++t) {
    float dot = 0;
    for (int d = 0; d < dims; ++d) {
      dot += q[d] * Values::K(args.k[t / kTokens], dims, d, t % kTokens);
    }
    args.scores[t] = dot * args.scale;
    max = std::max(max, args.scores[t]);
  }
  float sum = 0;
  std::fill(acc, acc + dims, 0.0f);
  for (int t = args.begin[query]; t < args.end[query]; ++t) {
    const float p = std::exp(args.scores[t] - max);
    sum += p;
    for (int d = 0; d < dims; ++d) {
      acc[d] += p * Values::V(args.v[t / kTokens], dims, d, t % kTokens);
    }
  }
  args.max[query] = max;
  args.sum[query] = sum;
}

template <typename Values>
void Attend(const AttendArgs& args) {
  for (int i = 0; i < args.queries; ++i) AttendOne<Values>(args, i);
}

void Merge(const MergeArgs& args) {
  for (int i = 0; i < args.queries; ++i) {
    const float max = std::max(args.max[i], args.run_max[i]);
    const float keep = std::exp(args.max[i] - max);
    const float add = std::exp(args.run_max[i] - max);
    args.max[i] = max;
    args.sum[i] = args.sum[i] * keep + args.run_sum[i] * add;
    float* acc = args.acc + static_cast<int64_t>(i) * args.stride;
    const float* run = args.run_acc + static_cast<int64_t>(i) * args.stride;
    for (int d = 0; d < args.dims; ++d) acc[d] = acc[d] * keep + run[d] * add;
  }
}

void ToHalf(const float* x, uint16_t* out, int n) {
  constexpr float kHalfMax = 65504;
  for (int i = 0; i < n; ++i) out[i] = FloatToHalf(std::clamp(x[i], -kHalfMax, kHalfMax));
}

}  // namespace

const AttentionKernels& ScalarAttentionKernels() {
  static constexpr AttentionKernels kKernels = {Attend<F32Values>, Attend<F16Values>,
                                                Attend<Q8Values>, Merge, ToHalf};
  return kKernels;
}

}  // namespace shoal
