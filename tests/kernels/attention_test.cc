#include "kernels/cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/kv_store.h"
#include "kv_fixture.h"

namespace shoal {
namespace {

std::vector<CpuLevel> LevelsHere() {
  std::vector<CpuLevel> levels;
  const CpuFeatures features = DetectCpuFeatures();
  for (int i = 0; i < kNumCpuLevels; ++i) {
    const CpuLevel level = static_cast<CpuLevel>(i);
    // Attention has nothing to gain from AVX-VNNI: that level uses the AVX2 kernels.
    if (features.Has(level) && level != CpuLevel::kAvxVnni) levels.push_back(level);
  }
  return levels;
}

struct Shape {
  AttentionShape attention;
  KvShape kv;
};

Backend::Limits LimitsFor(const Shape& shape, int rows, int context) {
  return {.rows = rows,
          .cols = 1,
          .out_rows = 1,
          .heads = shape.attention.q_heads,
          .head_dim = shape.attention.head_dim,
          .context = context};
}

// A batch over a filled cache: what every test needs.
struct Problem {
  Shape shape;
  int context;
  std::mt19937 rng;
  TestKv cache;
  std::vector<Segment> segments;
  int rows = 0;
  int64_t stride;
  std::vector<float> q;

  // Each entry of `runs` is (first position, rows, decode) of one sequence; positions before are in
  // the cache too.
  struct SequenceRun {
    int pos, rows;
    bool decode;
  };
  Problem(const Shape& s, const std::vector<SequenceRun>& runs, int seed)
      : shape(s), context(Context(runs)), rng(seed), cache(s.kv, Blocks(runs), rng) {
    stride = s.attention.q_heads * s.attention.head_dim + 5;
    auto pool = ThreadPool::Create({.threads = 1, .pin = false}).value();
    KvStore store(ScalarAttentionKernels().to_half, pool.get());
    int block = 0;
    for (const SequenceRun& run : runs) {
      const int tokens = run.pos + run.rows;
      segments.push_back({rows, run.rows, run.pos, cache.table(block), run.decode});
      rows += run.rows;
      const int width = s.kv.kv_heads * s.kv.head_dim;
      std::vector<float> k = RandomFloats(int64_t{tokens} * width, rng);
      const std::vector<float> v = RandomFloats(int64_t{tokens} * width, rng);
      std::vector<float> no_q(tokens * width);
      AttentionShape no_heads = s.attention;
      no_heads.q_heads = 0;
      const Segment all[] = {{0, tokens, 0, cache.table(block), false}};
      store.Write({.q = no_q.data(), .k = k.data(), .v = v.data(), .stride = width}, no_heads,
                  cache.layer(), all);
      block += (tokens + 15) / 16;
    }
    q = RandomFloats(rows * stride, rng, 2);
  }
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

  std::vector<float> Run(CpuLevel level, int threads, absl::Span<const Segment> part) const {
    auto pool = ThreadPool::Create({.threads = threads, .pin = false}).value();
    AttentionEngine engine(level, pool.get());
    EXPECT_TRUE(engine.Reserve(LimitsFor(shape, rows, context)).ok());
    std::vector<float> out(rows * stride, std::numeric_limits<float>::quiet_NaN());
    engine.Run(q.data(), stride, shape.attention, cache.layer(), part, out.data(), stride);
    return out;
  }
  std::vector<float> Run(CpuLevel level, int threads) const {
    return Run(level, threads, segments);
  }
};

// Unit roundoffs of the path under test.
struct Precision {
  double qk;  // of q and k as they enter their product
  double p;
  double v;
};
constexpr double kFloat = 0x1p-24;
constexpr Precision kFloatMath = {0, 0, 0};
// Two bf16 numbers for q, k and v, the product of the low parts left out; one for p: see
// attention_kernels.h.
constexpr Precision kSplitBf16 = {0x1p-15, 0x1p-9, 0x1p-14};

// What a sequence holds of one KV head, as doubles: [token, dim].
struct Head {
  Head(const Problem& p, const Segment& s, bool is_k, int kv_head) {
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
// make: a score is off by at most ds = scale * (rounding of operands + (dims + 2) float roundings)
// * sum |q k|, which moves every p by a factor within exp(2 ds); p, v and the sums add their own
// roundings.
void CheckHead(const Problem& p, const Head& k, const Head& v, int pos, const float* q,
               const float* out, const Precision& precision) {
  const AttentionShape& a = p.shape.attention;
  const int dims = a.head_dim;
  const int first = a.window > 0 ? std::max(0, pos - a.window + 1) : 0;
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
    ds = std::max(ds, a.scale * magnitude * (2 * precision.qk + (dims + 2) * kFloat));
  }
  double sum = 0;
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
  const double relative =
      std::expm1(2 * ds) + precision.p + precision.v + (n + n / 256 + 16) * kFloat;
  for (int d = 0; d < dims; ++d) {
    ASSERT_NEAR(out[d], expected[d], 2 * magnitude[d] * relative + 1e-7)
        << "pos " << pos << " dim " << d;
  }
}

void CheckAll(const Problem& p, const std::vector<float>& out, CpuLevel level) {
  const AttentionShape& a = p.shape.attention;
  for (const Segment& s : p.segments) {
    const bool tiles = level == CpuLevel::kAmx && !s.decode && p.shape.kv.type != KvType::kF32;
    const Precision precision = tiles ? kSplitBf16 : kFloatMath;
    for (int kv_head = 0; kv_head < p.shape.kv.kv_heads; ++kv_head) {
      const Head k(p, s, true, kv_head), v(p, s, false, kv_head);
      for (int head = 0; head < a.q_heads; ++head) {
        if ((a.q_head_begin + head) / a.group - a.kv_head_begin != kv_head) continue;
        // The first and last rows, and one in seven between: the reference takes most of the time.
        for (int r = 0; r < s.rows;
             r += r < 2 || r >= s.rows - 3 ? 1 : std::min(7, s.rows - 2 - r)) {
          const int64_t at = (s.row + r) * p.stride + head * a.head_dim;
          CheckHead(p, k, v, s.pos + r, p.q.data() + at, out.data() + at, precision);
          if (testing::Test::HasFatalFailure()) FAIL() << "row " << s.row + r << " head " << head;
        }
      }
    }
  }
}

Shape MakeShape(KvType type, int head_dim, int q_heads, int group, int window = 0,
                int q_head_begin = 0) {
  Shape s;
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

class AttentionAt : public testing::TestWithParam<CpuLevel> {};
INSTANTIATE_TEST_SUITE_P(Levels, AttentionAt, testing::ValuesIn(LevelsHere()),
                         [](const auto& level) { return CpuLevelName(level.param); });

TEST_P(AttentionAt, AgreesWithTheTextbookOverShapesWindowsAndGroupings) {
  std::mt19937 rng(11);
  const int head_dims[] = {2, 8, 14, 32, 64, 72, 80, 96, 128, 256};
  const int groups[] = {1, 2, 3, 4, 5, 7, 8, 12, 16, 20};
  for (int i = 0; i < 40; ++i) {
    const KvType type = static_cast<KvType>(i % 3);
    const int group = groups[rng() % 10];
    const int q_heads = 1 + rng() % (2 * group);
    const int window = rng() % 2 == 0 ? 0 : 1 + rng() % 300;
    const Shape shape =
        MakeShape(type, head_dims[i % 10], q_heads, group, window, rng() % (3 * group));
    const Problem p(shape,
                    {{static_cast<int>(rng() % 600), 1, true},
                     {static_cast<int>(rng() % 40), 1 + static_cast<int>(rng() % 70), false},
                     {0, 1, true},
                     {250 + static_cast<int>(rng() % 20), 1 + static_cast<int>(rng() % 20), false}},
                    i);
    SCOPED_TRACE(testing::Message()
                 << KvTypeName(type) << " head_dim " << shape.attention.head_dim << " q_heads "
                 << q_heads << " from " << shape.attention.q_head_begin << " group " << group
                 << " window " << window);
    CheckAll(p, p.Run(GetParam(), 2), GetParam());
    if (HasFatalFailure()) return;
  }
}

TEST_P(AttentionAt, DecodeRowsAreBitIdenticalWhateverTheThreadsAndNeighbours) {
  for (const KvType type : {KvType::kF32, KvType::kF16, KvType::kQ8_0}) {
    for (const int group : {1, 4, 7}) {
      const Problem p(MakeShape(type, 64, 2 * group, group),
                      {{700, 1, true}, {3, 1, true}, {255, 2, true}, {100, 9, false}}, 5);
      const std::vector<float> one = p.Run(GetParam(), 1);   // walks
      const std::vector<float> many = p.Run(GetParam(), 9);  // splits by runs
      const int width = 2 * group * 64;
      for (const Segment& s : p.segments) {
        const std::vector<float> alone = p.Run(GetParam(), 3, {&s, 1});
        for (int r = s.row; r < s.row + s.rows; ++r) {
          const float* expected = one.data() + r * p.stride;
          EXPECT_TRUE(std::equal(expected, expected + width, many.data() + r * p.stride)) << r;
          EXPECT_TRUE(std::equal(expected, expected + width, alone.data() + r * p.stride)) << r;
        }
      }
    }
  }
}

TEST_P(AttentionAt, APromptInOneChunkAgreesWithTokenByToken) {
  for (const KvType type : {KvType::kF32, KvType::kF16, KvType::kQ8_0}) {
    Problem p(MakeShape(type, 64, 4, 2), {{0, 300, false}}, 3);
    CheckAll(p, p.Run(GetParam(), 2), GetParam());
    p.segments[0].decode = true;
    CheckAll(p, p.Run(GetParam(), 2), GetParam());
    if (HasFatalFailure()) return;
  }
}

TEST_P(AttentionAt, LargeScoresDoNotOverflow) {
  Shape shape = MakeShape(KvType::kF32, 64, 4, 2);
  Problem p(shape, {{400, 1, true}, {300, 20, false}}, 9);
  for (float& x : p.q) x *= 1000;  // scores of several thousands
  const std::vector<float> out = p.Run(GetParam(), 2);
  for (int r = 0; r < p.rows; ++r) {
    for (int i = 0; i < 4 * 64; ++i) ASSERT_LT(std::fabs(out[r * p.stride + i]), 10) << r;
  }
}

TEST(AttentionEngine, WorkspaceIsWhatReserveTakesAndGrowsWithTheLimits) {
  auto pool = ThreadPool::Create({.threads = 2, .pin = false}).value();
  const AttentionEngine engine(CpuLevel::kScalar, pool.get());
  const Shape shape = MakeShape(KvType::kF16, 64, 32, 4);
  const int64_t small = engine.WorkspaceBytes(LimitsFor(shape, 1, 256));
  const int64_t large = engine.WorkspaceBytes(LimitsFor(shape, 512, 131072));
  EXPECT_GT(small, 0);
  EXPECT_GT(large, small);
  EXPECT_LT(large, 64 << 20);
}

TEST(AttentionEngineDeathTest, RefusesWhatIsBeyondTheLimits) {
  auto pool = ThreadPool::Create({.threads = 1, .pin = false}).value();
  AttentionEngine engine(CpuLevel::kScalar, pool.get());
  const Shape shape = MakeShape(KvType::kF32, 8, 2, 1);
  const Problem p(shape, {{10, 2, false}}, 1);
  std::vector<float> out(p.rows * p.stride);
  const auto run = [&] {
    engine.Run(p.q.data(), p.stride, shape.attention, p.cache.layer(), p.segments, out.data(),
               p.stride);
  };
  EXPECT_DEATH(run(), "call Reserve");
  ASSERT_TRUE(engine.Reserve(LimitsFor(shape, 2, 11)).ok());
  EXPECT_DEATH(run(), "positions are beyond Limits");
}

}  // namespace
}  // namespace shoal
