// Operands made on the device against the CPU's scalar functions.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "kernels/cpu/elementwise.h"
#include "kernels/cpu/linear_kernels.h"
#include "kernels/cuda/linear_ops.h"
#include "simt/runner.h"

namespace shoal::cuda {
namespace {

std::vector<float> Gaussian(int64_t n, uint32_t seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> gauss(0, 2);
  std::vector<float> x(n);
  for (float& v : x) v = gauss(rng);
  return x;
}

struct Case {
  InputRows::Kind kind;
  int rows, cols;
  Activation activation = Activation::kSwiGlu;
};

// The rows as the CPU's scalar functions make them, before the conversion.
std::vector<float> Expected(const Case& c, const InputRows& in) {
  const LinearKernels& cpu = ScalarLinearKernels();
  std::vector<float> out(int64_t{c.rows} * c.cols);
  for (int r = 0; r < c.rows; ++r) {
    const int64_t source = r * in.stride;
    const float* x = in.x + source;
    float* row = &out[int64_t{r} * c.cols];
    if (c.kind == InputRows::Kind::kRmsNorm) {
      const float mean = cpu.sum_squares(x, c.cols) / static_cast<float>(c.cols);
      cpu.scale(x, in.weight, in.scale / std::sqrt(mean + in.eps), c.cols, row);
    } else if (c.kind == InputRows::Kind::kLayerNorm) {
      const Moments m = MomentsOf(x, c.cols);
      Normalize(x, in.weight, m.mean,
                in.scale / std::sqrt(m.squares / static_cast<float>(c.cols) + in.eps), c.cols, row);
    } else if (c.kind == InputRows::Kind::kGated) {
      cpu.gated[static_cast<int>(c.activation)](x, in.up + source, c.cols, row);
    } else {
      std::copy(x, x + c.cols, row);
    }
  }
  return out;
}

void CheckInt8(const Case& c) {
  SCOPED_TRACE(testing::Message() << static_cast<int>(c.kind) << " [" << c.rows << ", " << c.cols
                                  << "]");
  const int64_t stride = c.cols + 3, row_stride = c.rows + 2;
  auto x = Gaussian(c.rows * stride, 1);
  const auto up = Gaussian(c.rows * stride, 2), weight = Gaussian(c.cols, 3);
  for (int i = 0; i < 32; ++i) x[i] = 0;
  const InputRows in{c.kind, x.data(), up.data(), weight.data(), stride,      1e-5f,
                     c.rows, c.cols,   0.75f,     nullptr,       c.activation};
  const int64_t blocks = c.cols / 32;
  std::vector<int8_t> q(blocks * row_stride * 32, 99);
  std::vector<float> scale(blocks * row_stride, NAN), sums(blocks * row_stride * 2, NAN);
  QuantizeRows(in, {q.data(), scale.data(), sums.data(), row_stride}, nullptr);
  const std::vector<float> expected = Expected(c, in);
  for (int r = 0; r < c.rows; ++r) {
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t at = b * row_stride + r;
      float extreme = 0;
      int sum[2] = {};
      for (int i = 0; i < 32; ++i) {
        const float e = expected[r * c.cols + b * 32 + i];
        extreme = std::max(extreme, std::fabs(e));
        const int word = i / 4;
        const int value = q[at * 32 + (word % 4 * 2 + word / 4) * 4 + i % 4];
        sum[i / 16] += value;
        ASSERT_NEAR(static_cast<float>(value) * scale[at], e, 0.501f * scale[at] + 1e-30f);
      }
      ASSERT_NEAR(scale[at], extreme / 127, 1e-5f * scale[at]);
      for (int h = 0; h < 2; ++h) {
        ASSERT_FLOAT_EQ(sums[2 * at + h], scale[at] * static_cast<float>(sum[h]));
      }
    }
  }
  for (int64_t at = 0; at < blocks * row_stride; ++at) {
    if (at % row_stride >= c.rows) {
      ASSERT_TRUE(std::isnan(scale[at])) << "wrote past the rows";
    }
  }
}

TEST(Activations, Int8) {
  for (int seed = 0; seed < 3; ++seed) {
    simt::SetSeed(seed);
    for (const auto kind : {InputRows::Kind::kPlain, InputRows::Kind::kRmsNorm,
                            InputRows::Kind::kLayerNorm, InputRows::Kind::kGated}) {
      for (int a = 0; a < (kind == InputRows::Kind::kGated ? kNumActivations : 1); ++a) {
        const auto activation = static_cast<Activation>(a);
        for (const Case& c : {Case{kind, 1, 32, activation}, Case{kind, 3, 160, activation},
                              Case{kind, 2, 1056, activation}, Case{kind, 9, 2048, activation}}) {
          CheckInt8(c);
        }
      }
    }
  }
}

}  // namespace
}  // namespace shoal::cuda
