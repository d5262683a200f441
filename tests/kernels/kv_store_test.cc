#include "kernels/cpu/kv_store.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/attention.h"
#include "kv_fixture.h"

namespace shoal {
namespace {

struct Case {
  KvType type;
  int head_dim;
  int rotary_dim;
  bool neox;
  bool norm;
  QkNorm kind = QkNorm::kHeadRms;
};

void PrintTo(const Case& c, std::ostream* out) {
  *out << KvTypeName(c.type) << " head_dim " << c.head_dim << " rotary " << c.rotary_dim
       << (c.neox ? " neox" : " norm") << (c.norm ? " with q/k norm" : "");
}

// Norm and rotation of one head by the formulas, in double.
std::vector<double> Expected(const float* x, const Case& c, const std::vector<float>& weights,
                             int head, float eps, const RopeTable& rope, int pos,
                             double row_square) {
  std::vector<double> y(x, x + c.head_dim);
  const bool behind = c.kind == QkNorm::kHeadRmsBehind;
  const bool each = c.kind != QkNorm::kHeadRms && !behind;
  const float* weight = weights.data() + (each ? head * c.head_dim : 0);
  const auto norm_head = [&] {
    double mean = 0, squares = 0;
    for (double v : y) mean += c.kind == QkNorm::kHeadLayer ? v / c.head_dim : 0;
    for (double v : y) squares += (v - mean) * (v - mean);
    if (c.kind == QkNorm::kRowRms) squares = row_square * c.head_dim;
    for (int d = 0; d < c.head_dim; ++d) {
      y[d] = (y[d] - mean) * weight[d] / std::sqrt(squares / c.head_dim + eps);
    }
  };
  if (c.norm && !behind) norm_head();
  const int half = c.rotary_dim / 2;
  for (int i = 0; i < half; ++i) {
    const int a = c.neox ? i : 2 * i, b = c.neox ? i + half : 2 * i + 1;
    const double cos = rope.cos[pos * half + i], sin = rope.sin[pos * half + i];
    const double ya = y[a], yb = y[b];
    y[a] = ya * cos - yb * sin;
    y[b] = yb * cos + ya * sin;
  }
  if (c.norm && behind) norm_head();
  if (c.kind == QkNorm::kPlain) {
    double squares = 0;
    for (double v : y) squares += v * v;
    for (double& v : y) v /= std::sqrt(squares / c.head_dim + eps);
  }
  return y;
}

class KvStoreOf : public testing::TestWithParam<Case> {};
INSTANTIATE_TEST_SUITE_P(
    Shapes, KvStoreOf,
    testing::Values(Case{KvType::kF32, 8, 8, false, false}, Case{KvType::kF32, 64, 64, true, true},
                    Case{KvType::kF32, 96, 24, true, false},
                    Case{KvType::kF16, 128, 64, false, true}, Case{KvType::kF16, 8, 4, true, false},
                    Case{KvType::kQ8_0, 64, 64, true, false},
                    Case{KvType::kQ8_0, 80, 80, false, true},
                    Case{KvType::kQ8_0, 8, 8, true, false},
                    Case{KvType::kF32, 128, 128, false, true, QkNorm::kHeadLayer},
                    Case{KvType::kF32, 64, 32, true, true, QkNorm::kRowRms},
                    Case{KvType::kF32, 96, 64, true, true, QkNorm::kHeadRmsBehind},
                    Case{KvType::kF32, 64, 64, false, false, QkNorm::kPlain}));

TEST_P(KvStoreOf, RotatesInPlaceAndWritesKAndVWhereTheLayoutSays) {
  const Case c = GetParam();
  std::mt19937 rng(7);
  constexpr int kQHeads = 5, kKvHeads = 3, kPositions = 100, kRows = 50;
  const int dims = c.head_dim, half = c.rotary_dim / 2;
  std::vector<float> cos(kPositions * half), sin(kPositions * half);
  for (int i = 0; i < kPositions * half; ++i) {
    cos[i] = std::cos(0.37f * i);
    sin[i] = std::sin(0.37f * i);
  }
  const RopeTable rope{cos.data(), sin.data(), c.rotary_dim, kPositions, c.neox};
  TestKv cache(KvShape{c.type, kKvHeads, dims}, 20, rng);
  // Two sequences, the first in the middle of a block, so that blocks are filled by more than one
  // call.
  const int32_t* tables[] = {cache.table(0), cache.table(10)};
  const Segment segments[] = {{0, 29, 21, tables[0], false}, {29, 21, 0, tables[1], true}};
  const int64_t stride = (kQHeads + 2 * kKvHeads) * dims + 3;
  std::vector<float> x = RandomFloats(kRows * stride, rng);
  const std::vector<float> before = x;
  const std::vector<float> q_norm = RandomFloats(kQHeads * dims, rng),
                           k_norm = RandomFloats(kKvHeads * dims, rng);
  std::vector<float> squares;  // as if there were more heads than these
  for (int i = 0; i < 2 * kRows; ++i) squares.push_back(100 + 3 * static_cast<float>(i));
  std::vector<float> temperatures;
  for (int i = 0; i < kPositions; ++i) temperatures.push_back(1 + 0.01f * static_cast<float>(i));
  const QkvArgs args{.q = x.data(),
                     .k = x.data() + kQHeads * dims,
                     .v = x.data() + (kQHeads + kKvHeads) * dims,
                     .stride = stride,
                     .norm = c.kind,
                     .q_norm = c.norm ? q_norm.data() : nullptr,
                     .k_norm = c.norm ? k_norm.data() : nullptr,
                     .eps = 1e-5f,
                     .squares = squares.data(),
                     .q_cols = 300,
                     .k_cols = 200,
                     .q_scale = c.kind == QkNorm::kPlain ? temperatures.data() : nullptr,
                     .rope = &rope};
  const AttentionShape shape{.q_heads = kQHeads, .head_dim = dims, .group = 2, .scale = 1};
  auto pool = ThreadPool::Create({.threads = 3, .pin = false}).value();
  KvStore store(ScalarAttentionKernels().to_half, pool.get());
  store.Write(args, shape, cache.layer(), segments);

  for (const Segment& s : segments) {
    for (int r = 0; r < s.rows; ++r) {
      const int pos = s.pos + r;
      const float* in = before.data() + (s.row + r) * stride;
      const float* out = x.data() + (s.row + r) * stride;
      for (int h = 0; h < kQHeads; ++h) {
        const auto q = Expected(in + h * dims, c, q_norm, h, args.eps, rope, pos,
                                squares[2 * (s.row + r)] / static_cast<double>(args.q_cols));
        const double factor = args.q_scale != nullptr ? args.q_scale[pos] : 1;
        // A handful of float roundings of values of this size.
        for (int d = 0; d < dims; ++d) ASSERT_NEAR(out[h * dims + d], q[d] * factor, 1e-5) << d;
      }
      for (int h = 0; h < kKvHeads; ++h) {
        const auto k = Expected(in + (kQHeads + h) * dims, c, k_norm, h, args.eps, rope, pos,
                                squares[2 * (s.row + r) + 1] / static_cast<double>(args.k_cols));
        const float* v = in + (kQHeads + kKvHeads + h) * dims;
        for (int d = 0; d < dims; ++d) {
          double k_part = 0, v_part = 0;  // largest magnitudes that share the scale
          for (int i = d / 32 * 32; i < std::min(dims, d / 32 * 32 + 32); ++i) {
            k_part = std::max(k_part, std::fabs(k[i]));
            v_part = std::max(v_part, std::fabs(static_cast<double>(v[i])));
          }
          // f16 keeps 11 bits; q8_0 rounds to half a step of largest / 127, and the scale to 11
          // bits.
          const double relative = c.type == KvType::kF16 ? 1 / 2048.0 : 0;
          const double step = c.type == KvType::kQ8_0 ? 0.5 / 127 + 1 / 2048.0 : 0;
          ASSERT_NEAR(cache.Get(true, s.blocks, pos, h, d), k[d],
                      std::fabs(k[d]) * relative + k_part * step + 1e-5);
          ASSERT_NEAR(cache.Get(false, s.blocks, pos, h, d), v[d],
                      std::fabs(v[d]) * relative + v_part * step + 1e-7);
        }
      }
    }
  }
}

TEST(KvStore, HalfSaturatesInsteadOfBecomingInfinite) {
  const float x[4] = {1e6f, -1e6f, 65504, 0.1f};
  uint16_t half[4];
  ScalarAttentionKernels().to_half(x, half, 4);
  EXPECT_EQ(HalfToFloat(half[0]), 65504);
  EXPECT_EQ(HalfToFloat(half[1]), -65504);
  EXPECT_EQ(HalfToFloat(half[2]), 65504);
  EXPECT_NEAR(HalfToFloat(half[3]), 0.1f, 0.1f / 2048);
}

TEST(KvShape, BlocksAreMultiplesOf64Bytes) {
  for (const KvType type : {KvType::kF32, KvType::kF16, KvType::kQ8_0}) {
    for (const int head_dim : {2, 8, 64, 80, 96, 128, 256}) {
      for (const int heads : {1, 3, 8}) {
        const KvShape shape{type, heads, head_dim};
        EXPECT_EQ(shape.block_bytes() % 64, 0) << KvTypeName(type) << head_dim << heads;
        EXPECT_EQ(shape.k_bytes(), shape.v_bytes());
      }
    }
  }
  EXPECT_EQ((KvShape{KvType::kF16, 8, 64}).block_bytes(), 2 * 8 * 64 * 16 * 2);
  EXPECT_EQ((KvShape{KvType::kQ8_0, 8, 64}).block_bytes(), 2 * 8 * (64 * 16 + 2 * 16 * 2));
}

}  // namespace
}  // namespace shoal
