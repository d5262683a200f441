// The write of q, k and v into the cache, against the CPU's.
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "../kernels/kv_fixture.h"
#include "kernels/cpu/attention_kernels.h"
#include "kernels/cpu/kv_store.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/planner.h"
#include "simt/runner.h"

namespace shoal::cuda {
namespace {

struct Case {
  KvType type;
  int head_dim;
  int rotary_dim;  // 0: no rotation
  bool neox;
  bool norm;
  QkNorm kind = QkNorm::kHeadRms;
};

void PrintTo(const Case& c, std::ostream* out) {
  *out << KvTypeName(c.type) << " head_dim " << c.head_dim << " rotary " << c.rotary_dim
       << (c.neox ? " neox" : " norm") << (c.norm ? " with q/k norm" : "");
}

constexpr int kQHeads = 5, kKvHeads = 3, kPositions = 100, kRows = 51;

// A batch and two equal caches: one for each device.
struct Problem {
  explicit Problem(const Case& c)
      : half(c.rotary_dim / 2),
        cos(kPositions * half + 1),
        sin(kPositions * half + 1),
        rope{cos.data(), sin.data(), c.rotary_dim, kPositions, c.neox},
        stride((kQHeads + 2 * kKvHeads) * c.head_dim + 3) {
    std::mt19937 rng(7);
    for (size_t i = 0; i < cos.size(); ++i) {
      cos[i] = std::cos(0.37f * static_cast<float>(i));
      sin[i] = std::sin(0.37f * static_cast<float>(i));
    }
    x = RandomFloats(kRows * stride, rng);
    x[2] = 1e6f;  // more than f16 holds
    for (int d = 0; d < c.head_dim; ++d) x[stride + kQHeads * c.head_dim + d] = 0;
    q_norm = RandomFloats(kQHeads * c.head_dim, rng);
    k_norm = RandomFloats(kKvHeads * c.head_dim, rng);
    for (int i = 0; i < 2 * kRows; ++i) squares.push_back(100 + 3 * static_cast<float>(i));
    for (int i = 0; i < kPositions; ++i) temperatures.push_back(1 + 0.01f * static_cast<float>(i));
  }
  QkvArgs Args(const Case& c, std::vector<float>& rows) const {
    return {.q = rows.data(),
            .k = rows.data() + kQHeads * c.head_dim,
            .v = rows.data() + (kQHeads + kKvHeads) * c.head_dim,
            .stride = stride,
            .norm = c.kind,
            .q_norm = c.norm ? q_norm.data() : nullptr,
            .k_norm = c.norm ? k_norm.data() : nullptr,
            .eps = 1e-5f,
            .squares = squares.data(),
            .q_cols = 300,
            .k_cols = 200,
            .q_scale = c.kind == QkNorm::kPlain ? temperatures.data() : nullptr,
            .rope = c.rotary_dim > 0 ? &rope : nullptr};
  }
  int half;
  std::vector<float> cos, sin;
  RopeTable rope;
  int64_t stride;
  std::vector<float> x, q_norm, k_norm, squares, temperatures;
};

void Check(const Case& c) {
  const Problem p(c);
  std::mt19937 rng(1), same(1);
  TestKv expected(KvShape{c.type, kKvHeads, c.head_dim}, 20, rng);
  TestKv cache(KvShape{c.type, kKvHeads, c.head_dim}, 20, same);
  const AttentionShape shape{.q_heads = kQHeads, .head_dim = c.head_dim, .group = 2, .scale = 1};
  // The first sequence starts in the middle of a block; row 29 belongs to nobody.
  const auto segments = [](const TestKv& kv) {
    return std::vector<Segment>{{0, 29, 21, kv.table(0), false}, {30, 21, 0, kv.table(10), true}};
  };
  std::vector<float> by_cpu = p.x, by_gpu = p.x;
  auto pool = ThreadPool::Create({.threads = 1, .pin = false}).value();
  KvStore(ScalarAttentionKernels().to_half, pool.get())
      .Write(p.Args(c, by_cpu), shape, expected.layer(), segments(expected));
  Backend::Limits limits;
  limits.rows = kRows;
  limits.heads = kQHeads;
  limits.context = kPositions;
  Planner planner(limits);
  std::vector<uint8_t> memory(planner.MaxBytes());
  const BatchPlan plan =
      planner.Build(segments(cache), shape, {0, 64}, memory.data(), memory.data());
  QkvToCache(p.Args(c, by_gpu), shape, cache.layer(), plan, nullptr);

  // The norm sums in another order, and a GPU fuses the rotation's products; all else is the same
  // arithmetic. A rotated value is as wrong as the larger of its pair.
  const float relative = c.norm || c.kind == QkNorm::kPlain ? 1e-5f
                         : c.rotary_dim > 0                 ? 0x1p-23f
                                                            : 0;
  for (size_t i = 0; i < by_cpu.size(); ++i) {
    const float size =
        c.rotary_dim > 0 && !c.norm ? 16 + std::fabs(by_cpu[i]) : 1 + std::fabs(by_cpu[i]);
    ASSERT_NEAR(by_gpu[i], by_cpu[i], relative * size) << i;
  }
  for (const Segment& s : segments(cache)) {
    for (int pos = s.pos; pos < s.pos + s.rows; ++pos) {
      for (int h = 0; h < kKvHeads; ++h) {
        float largest = 0;
        for (int d = 0; d < c.head_dim; ++d) {
          largest = std::max(largest, std::fabs(expected.Get(true, s.blocks, pos, h, d)));
        }
        // A last bit moves a value to the next step of its type at most.
        const float step = c.type == KvType::kQ8_0 ? 1.01f / 127 : 1.0f / 1024;
        for (int d = 0; d < c.head_dim; ++d) {
          ASSERT_NEAR(cache.Get(true, s.blocks, pos, h, d), expected.Get(true, s.blocks, pos, h, d),
                      c.norm || c.rotary_dim > 0 ? largest * step : 0);
          ASSERT_EQ(cache.Get(false, s.blocks, pos, h, d),
                    expected.Get(false, s.blocks, pos, h, d));
        }
      }
    }
  }
  // Bytes that no token owns stay as they were.
  EXPECT_TRUE(std::isnan(cache.Get(true, cache.table(0), 20, 0, 0)));
  EXPECT_TRUE(std::isnan(cache.Get(false, cache.table(0), 50, 0, 0)));
}

TEST(CudaQkvToCache, AgreesWithTheCpu) {
  int seed = 0;
  for (const Case& c :
       {Case{KvType::kF32, 8, 8, false, false}, Case{KvType::kF32, 64, 64, true, true},
        Case{KvType::kF32, 96, 24, true, false}, Case{KvType::kF16, 128, 64, false, true},
        Case{KvType::kF16, 8, 4, true, false}, Case{KvType::kF16, 80, 0, true, false},
        Case{KvType::kQ8_0, 64, 64, true, false}, Case{KvType::kQ8_0, 80, 80, false, true},
        Case{KvType::kQ8_0, 256, 128, true, false}, Case{KvType::kQ8_0, 14, 8, true, false},
        Case{KvType::kF32, 96, 96, false, true, QkNorm::kHeadLayer},
        Case{KvType::kF16, 128, 128, false, true, QkNorm::kHeadLayer},
        Case{KvType::kF32, 64, 32, true, true, QkNorm::kRowRms},
        Case{KvType::kQ8_0, 128, 64, true, true, QkNorm::kRowRms},
        Case{KvType::kF32, 96, 64, true, true, QkNorm::kHeadRmsBehind},
        Case{KvType::kF32, 128, 128, false, false, QkNorm::kPlain}}) {
    simt::SetSeed(seed++);
    SCOPED_TRACE(testing::PrintToString(c));
    Check(c);
    if (HasFatalFailure()) return;
  }
}

}  // namespace
}  // namespace shoal::cuda
