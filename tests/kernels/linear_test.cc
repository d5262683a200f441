// Every level's products against sums in double over the dequantized weights.
#include "kernels/cpu/linear.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "tests/kernels/random_matrix.h"

namespace shoal {
namespace {

std::vector<float> Gaussian(int64_t n, uint32_t seed, float scale = 1) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> gauss(0, scale);
  std::vector<float> x(n);
  for (float& v : x) v = gauss(rng);
  return x;
}

std::vector<CpuLevel> Levels() {
  const CpuFeatures features = DetectCpuFeatures();
  std::vector<CpuLevel> levels;
  for (int i = 0; i < kNumCpuLevels; ++i) {
    if (features.Has(static_cast<CpuLevel>(i))) levels.push_back(static_cast<CpuLevel>(i));
  }
  return levels;
}

struct Machine {
  std::unique_ptr<ThreadPool> pool;
  std::unique_ptr<LinearEngine> engine;
  Machine(CpuLevel level, int threads, const Backend::Limits& limits) {
    pool = ThreadPool::Create({.threads = threads, .pin = false}).value();
    engine = std::make_unique<LinearEngine>(level, pool.get());
    EXPECT_TRUE(engine->Reserve(limits).ok());
  }
};

// What one product may be off by. x: the input row as computed in double.
//   int8: each activation is off by half a step, 1/254 of its block's largest value.
//   bf16: weight and activation are each off by 2^-8 at most (a rounded value by 2^-9, a truncated
//   one by 2^-8). f32 sums: (terms) * 2^-24 of the sum of magnitudes; codes and minimums are summed
//   apart, so magnitudes are taken from the largest weight.
double Bound(const float* w, const double* x, int64_t cols, bool int8, bool bf16) {
  double bound = 0, magnitude = 0;
  float largest = 0;
  for (int64_t i = 0; i < cols; ++i) largest = std::max(largest, std::fabs(w[i]));
  for (int64_t b = 0; b < cols; b += 32) {
    double extreme = 0;
    for (int64_t i = b; i < std::min(b + 32, cols); ++i)
      extreme = std::max(extreme, std::fabs(x[i]));
    for (int64_t i = b; i < std::min(b + 32, cols); ++i) {
      const double wx = std::fabs(w[i] * x[i]);
      if (int8) bound += std::fabs(w[i]) * extreme / 254;
      if (bf16) bound += wx * 0x1p-7;
      magnitude += std::max<double>(largest, std::fabs(w[i])) * extreme;
    }
  }
  return bound * 1.001 + magnitude * 0x1p-24 * (4 + std::sqrt(static_cast<double>(cols)));
}

void ExpectProduct(const RandomMatrix& w, const double* x, const float* out, const float* bias,
                   const float* residual, bool bf16) {
  const int64_t cols = w.packed.shape.cols, rows = w.packed.shape.rows;
  const bool int8 = Info(w.packed.shape.type).block_elems > 1 && !bf16;
  double error = 0, signal = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = &w.values[r * cols];
    double product = 0;
    for (int64_t i = 0; i < cols; ++i) product += row[i] * x[i];
    const double b = bias != nullptr ? bias[r] : 0, old = residual != nullptr ? residual[r] : 0;
    const double expected = product + b + old;
    const double sums = (std::fabs(product) + std::fabs(b) + std::fabs(old)) * 0x1p-22;
    ASSERT_NEAR(out[r], expected, Bound(row, x, cols, int8, bf16) + sums) << "row " << r;
    error += (out[r] - expected) * (out[r] - expected);
    signal += product * product;
  }
  if (rows >= 16) {
    EXPECT_LE(error, 5e-4 * signal);
  }
}

struct Shape {
  int64_t rows, cols, begin;
};

class LinearTest : public testing::TestWithParam<CpuLevel> {
 protected:
  // Prefill rows may go through bf16 tiles.
  static bool Bf16(DType type, const RowCount& rows, int row) {
    return GetParam() == CpuLevel::kAmx && row >= rows.decode && type != DType::kF32 &&
           type != DType::kF16;
  }
};

void CheckPlain(CpuLevel level, DType type, const Shape& s, RowCount rows, bool bf16_level) {
  SCOPED_TRACE(testing::Message() << CpuLevelName(level) << " " << Info(type).name << " [" << s.rows
                                  << ", " << s.cols << "] from column " << s.begin << ", rows "
                                  << rows.decode << "+" << rows.prefill);
  const RandomMatrix w(type, s.rows, s.cols, s.begin, static_cast<uint32_t>(s.rows * 31 + s.cols),
                       3 * 4);
  const int64_t stride = s.cols + 3, out_stride = s.rows + 5;
  const auto x = Gaussian(rows.total() * stride, 5);
  const auto bias = Gaussian(s.rows, 6, 10);
  const auto residual = Gaussian(rows.total() * out_stride, 7, 10);
  auto out = residual;
  Machine machine(level, 2, {.rows = rows.total(), .cols = static_cast<int>(s.cols)});
  const LinearOutput output{&w.packed, bias.data(), out.data(), out_stride, true};
  machine.engine->Linear(LinearInput::Plain(x.data(), stride), static_cast<int>(s.cols), rows,
                         {&output, 1});
  const int step = rows.total() > 100 ? 23 : 1;  // of many rows, some of each block
  for (int r = 0; r < rows.total(); r += step) {
    const std::vector<double> row(&x[r * stride], &x[r * stride] + s.cols);
    const bool bf16 = bf16_level && r >= rows.decode && type != DType::kF32 && type != DType::kF16;
    ExpectProduct(w, row.data(), &out[r * out_stride], bias.data(), &residual[r * out_stride],
                  bf16);
    for (int64_t i = s.rows; i < out_stride; ++i) {
      ASSERT_EQ(out[r * out_stride + i], residual[r * out_stride + i]) << "wrote past the row";
    }
    if (testing::Test::HasFatalFailure()) return;
  }
}

TEST_P(LinearTest, EveryTypeAndShape) {
  const bool amx = GetParam() == CpuLevel::kAmx;
  for (int t = 0; t < kNumDTypes; ++t) {
    const DType type = static_cast<DType>(t);
    for (const Shape& s : {Shape{40, 256, 0}, Shape{1, 32, 0}, Shape{17, 1056, 0}}) {
      if (s.cols % Info(type).block_elems != 0 && Info(type).block_elems == 256) continue;
      for (const RowCount rows : {RowCount{1, 0}, RowCount{3, 0}, RowCount{2, 37}}) {
        CheckPlain(GetParam(), type, s, rows, amx);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_P(LinearTest, SlicesCutInsideASuperBlock) {
  const bool amx = GetParam() == CpuLevel::kAmx;
  for (int t = 0; t < kNumDTypes; ++t) {
    const DType type = static_cast<DType>(t);
    if (Info(type).block_elems != 256) continue;
    for (const Shape& s : {Shape{20, 32, 224}, Shape{20, 96, 32}, Shape{20, 640, 96},
                           Shape{20, 1120, 160}, Shape{20, 32, 0}, Shape{20, 288, 480}}) {
      CheckPlain(GetParam(), type, s, {1, 20}, amx);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(LinearTest, FloatsOfAnyWidth) {
  for (DType type : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (int64_t cols : {1, 2, 31, 172, 513, 1027}) {
      CheckPlain(GetParam(), type, {37, cols, 0}, {2, 18}, GetParam() == CpuLevel::kAmx);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(LinearTest, RandomShapes) {
  std::mt19937 rng(static_cast<uint32_t>(GetParam()) + 1);
  const auto pick = [&rng](int64_t from, int64_t to) {
    return std::uniform_int_distribution<int64_t>(from, to)(rng);
  };
  for (int i = 0; i < 60; ++i) {
    const DType type = static_cast<DType>(pick(0, kNumDTypes - 1));
    const bool is_float = Info(type).block_elems == 1;
    const Shape s{pick(1, 150), is_float ? pick(1, 700) : 32 * pick(1, 40),
                  is_float ? 0 : 32 * pick(0, 20)};
    const RowCount rows{static_cast<int>(pick(0, 10)), static_cast<int>(pick(0, 1) * pick(1, 70))};
    if (rows.total() == 0) continue;
    CheckPlain(GetParam(), type, s, rows, GetParam() == CpuLevel::kAmx);
    if (HasFatalFailure()) return;
  }
}

TEST_P(LinearTest, ManyPrefillRows) {
  const bool amx = GetParam() == CpuLevel::kAmx;
  const int rows = GetParam() == CpuLevel::kScalar ? 20 : 600;  // beyond one block of tile rows
  CheckPlain(GetParam(), DType::kQ4_K, {300, 1280, 0}, {2, rows}, amx);
  CheckPlain(GetParam(), DType::kQ8_0, {33, 1056, 0}, {0, rows}, amx);
}

TEST_P(LinearTest, ADecodeRowDoesNotDependOnItsNeighboursNorOnThreads) {
  const int cols = 544, most = 11;
  const auto x = Gaussian(most * cols, 9);
  for (int t = 0; t < kNumDTypes; ++t) {
    const DType type = static_cast<DType>(t);
    const RandomMatrix w(type, 100, cols, 0, 3);
    std::vector<float> alone(most * 100);
    Machine single(GetParam(), 1, {.rows = most, .cols = cols});
    for (int r = 0; r < most; ++r) {
      const LinearOutput output{&w.packed, nullptr, &alone[r * 100], 100, false};
      single.engine->Linear(LinearInput::Plain(&x[r * cols], cols), cols, {1, 0}, {&output, 1});
    }
    for (int rows = 2; rows <= most; rows += 3) {
      std::vector<float> together(most * 100);
      Machine several(GetParam(), 3, {.rows = most, .cols = cols});
      const LinearOutput output{&w.packed, nullptr, together.data(), 100, false};
      several.engine->Linear(LinearInput::Plain(x.data(), cols), cols, {rows, 0}, {&output, 1});
      for (int i = 0; i < rows * 100; ++i) {
        ASSERT_EQ(together[i], alone[i]) << Info(type).name << " row " << i / 100 << " of " << rows;
      }
    }
  }
}

double Gate(Activation activation, double gate, double up) {
  if (activation == Activation::kSwiGlu) return gate / (1 + std::exp(-gate)) * up;
  if (activation == Activation::kGeGlu) {
    const double inner = std::sqrt(2 / M_PI) * (gate + 0.044715 * std::pow(gate, 3));
    return gate * (1 + std::tanh(inner)) / 2 * up;
  }
  const double g = std::min(gate, 7.0), u = std::clamp(up, -7.0, 7.0);
  return g / (1 + std::exp(-1.702 * g)) * (u + 1);
}

TEST_P(LinearTest, FusedNormAndSwiGlu) {
  const int cols = 544, rows = 19;
  const auto x = Gaussian(rows * cols, 1, 3), up = Gaussian(rows * cols, 2, 3),
             weight = Gaussian(cols, 4);
  const RandomMatrix q(DType::kQ8_0, 35, cols, 0, 5), f(DType::kF32, 35, cols, 0, 6);
  const float eps = 0.5f;  // large enough that leaving it out would be seen
  Machine machine(GetParam(), 2, {.rows = rows, .cols = cols});
  for (int kind = 0; kind < 2 + kNumActivations; ++kind) {
    const bool layer = kind == 1, norm = kind < 2;
    const Activation activation = norm ? Activation::kSwiGlu : static_cast<Activation>(kind - 2);
    std::vector<float> out_q(rows * 35), out_f(rows * 35);
    const LinearOutput outputs[] = {{&q.packed, nullptr, out_q.data(), 35, false},
                                    {&f.packed, nullptr, out_f.data(), 35, false}};
    LinearInput input = norm ? LinearInput::Norm(layer ? NormKind::kLayer : NormKind::kRms,
                                                 x.data(), cols, weight.data(), eps)
                             : LinearInput::Gated(activation, x.data(), up.data(), cols);
    input.scale = 0.5f;  // of norms only, as this
    const std::vector<float> row_scale = Gaussian(rows, 8, 1);
    if (layer) input.row_scale = row_scale.data();
    machine.engine->Linear(input, cols, {2, rows - 2}, outputs);
    for (int r = 0; r < rows; ++r) {
      const float* row = &x[r * cols];
      std::vector<double> expected(cols);
      double mean = 0, squares = 0;
      for (int i = 0; i < cols && layer; ++i) mean += row[i] / static_cast<double>(cols);
      for (int i = 0; i < cols; ++i) squares += (row[i] - mean) * (row[i] - mean);
      for (int i = 0; i < cols; ++i) {
        expected[i] = norm ? (layer ? row_scale[r] : 1) * 0.5 * (row[i] - mean) * weight[i] /
                                 std::sqrt(squares / cols + eps)
                           : Gate(activation, row[i], up[r * cols + i]);
      }
      ExpectProduct(q, expected.data(), &out_q[r * 35], nullptr, nullptr,
                    Bf16(DType::kQ8_0, {2, rows - 2}, r));
      ExpectProduct(f, expected.data(), &out_f[r * 35], nullptr, nullptr, false);
    }
  }
}

TEST_P(LinearTest, ExtremeActivations) {
  const int cols = 64;
  const RandomMatrix w(DType::kQ4_0, 16, cols, 0, 1);
  Machine machine(GetParam(), 1, {.rows = 1, .cols = cols});
  for (float value : {0.0f, 1e-38f, 1e30f, -88.5f}) {
    const std::vector<float> x(cols, value);
    std::vector<float> out(16);
    const LinearOutput output{&w.packed, nullptr, out.data(), 16, false};
    machine.engine->Linear(LinearInput::Plain(x.data(), cols), cols, {1, 0}, {&output, 1});
    for (int r = 0; r < 16; ++r) {
      double sum = 0, magnitude = 0;
      for (int i = 0; i < cols; ++i) {
        sum += w.values[r * cols + i];
        magnitude += std::fabs(w.values[r * cols + i]);
      }
      EXPECT_NEAR(out[r], sum * value, magnitude * std::fabs(value) / 250 + 1e-35);
    }
    // silu of anything stays finite.
    for (const Activation a :
         {Activation::kSwiGlu, Activation::kClampedSwiGlu, Activation::kGeGlu}) {
      const LinearInput gated = LinearInput::Gated(a, x.data(), x.data(), cols);
      if (value != -88.5f) continue;
      machine.engine->Linear(gated, cols, {1, 0}, {&output, 1});
      for (float v : out) EXPECT_NEAR(v, 0, 1e-3);
    }
  }
}

// ---- Gated FFNs.

struct Ffn {
  int64_t cols, width;
  RandomMatrix gate, up, down;
  Activation activation;

  Ffn(const DType (&types)[3], int64_t cols, int64_t width, Activation activation)
      : cols(cols),
        width(width),
        gate(types[0], width, cols, 0, 11),
        up(types[1], width, cols, 0, 12),
        down(types[2], cols, width, 0, 13),
        activation(activation) {}

  Backend::Limits Limits(int rows) const {
    return {.rows = rows, .cols = static_cast<int>(std::max(cols, width))};
  }
  // out [rows, cols + 3], accumulated.
  void Run(LinearEngine& engine, const float* x, RowCount rows, std::vector<float>* out) const {
    std::vector<float> gate_rows(rows.total() * width), up_rows(rows.total() * width);
    engine.Ffn(LinearInput::Plain(x, cols), static_cast<int>(cols), rows,
               {&gate.packed, &up.packed, activation}, gate_rows.data(), up_rows.data(),
               {&down.packed, nullptr, out->data(), cols + 3, true});
  }
  std::vector<double> Expected(const float* x) const {
    std::vector<double> h(width), out(cols);
    for (int64_t f = 0; f < width; ++f) {
      double g = 0, u = 0;
      for (int64_t i = 0; i < cols; ++i) {
        g += gate.values[f * cols + i] * x[i];
        u += up.values[f * cols + i] * x[i];
      }
      h[f] = Gate(activation, g, u);
    }
    for (int64_t c = 0; c < cols; ++c) {
      for (int64_t f = 0; f < width; ++f) out[c] += down.values[c * width + f] * h[f];
    }
    return out;
  }
};

TEST_P(LinearTest, FfnIsDownOfGatedRows) {
  constexpr DType kF32 = DType::kF32, kF16 = DType::kF16, kBF16 = DType::kBF16, kQ4 = DType::kQ4_0,
                  kQ5 = DType::kQ5_0, kQ8 = DType::kQ8_0;
  struct Case {
    DType types[3];
    int64_t cols, width;
  };
  for (const Case& c : {Case{{kF32, kF32, kF32}, 70, 45}, Case{{kQ4, kQ4, kQ4}, 288, 544},
                        Case{{kQ8, kQ5, kBF16}, 96, 172}, Case{{kBF16, kBF16, kBF16}, 61, 40},
                        Case{{kQ8, kQ8, kF16}, 64, 37}, Case{{kQ5, kF16, kQ8}, 64, 96}}) {
    for (const RowCount rows : {RowCount{3, 77}, RowCount{0, 250}, RowCount{2, 1}}) {
      for (const Activation activation :
           {Activation::kSwiGlu, Activation::kClampedSwiGlu, Activation::kGeGlu}) {
        SCOPED_TRACE(testing::Message() << Info(c.types[0]).name << ", width " << c.width << ", "
                                        << rows.decode << "+" << rows.prefill);
        const Ffn ffn(c.types, c.cols, c.width, activation);
        const auto x = Gaussian(rows.total() * c.cols, 3, 0.3f);
        const auto residual = Gaussian(rows.total() * (c.cols + 3), 4);
        auto out = residual;
        Machine machine(GetParam(), 2, ffn.Limits(rows.total()));
        ffn.Run(*machine.engine, x.data(), rows, &out);
        const double limit = c.types[0] == kF32 ? 1e-9 : 2e-3;
        for (int r = 0; r<rows.total(); r += rows.total()> 100 ? 23 : 1) {
          const auto expected = ffn.Expected(&x[r * c.cols]);
          const float* row = &out[r * (c.cols + 3)];
          const float* old = &residual[r * (c.cols + 3)];
          double error = 0, signal = 0;
          for (int i = 0; i < c.cols; ++i) {
            error += std::pow(row[i] - old[i] - expected[i], 2);
            signal += expected[i] * expected[i];
          }
          ASSERT_LE(error, limit * signal + 1e-9) << "row " << r;
          for (int64_t i = c.cols; i < c.cols + 3; ++i) ASSERT_EQ(row[i], old[i]);
        }
      }
    }
  }
}

TEST_P(LinearTest, AnFfnLeavesNothingOfAWiderOneBehind) {
  const DType bf16[] = {DType::kBF16, DType::kBF16, DType::kBF16};
  const Ffn wide(bf16, 64, 64, Activation::kSwiGlu), narrow(bf16, 64, 40, Activation::kSwiGlu);
  const auto x = Gaussian(5 * 64, 3), huge = Gaussian(5 * 64, 3, 1e30f);
  Machine machine(GetParam(), 1, wide.Limits(5));
  std::vector<float> overflown(5 * 67), out(5 * 67);
  wide.Run(*machine.engine, huge.data(), {0, 5}, &overflown);
  narrow.Run(*machine.engine, x.data(), {0, 5}, &out);
  for (float v : out) EXPECT_TRUE(std::isfinite(v));
}

TEST_P(LinearTest, APromptsRowDoesNotDependOnItsNeighbours) {
  const int rows = GetParam() == CpuLevel::kScalar ? 40 : 300;
  for (const DType type : {DType::kQ4_0, DType::kQ8_0, DType::kBF16}) {
    const DType types[] = {type, type, type};
    const Ffn ffn(types, 288, 320, Activation::kSwiGlu);
    const auto x = Gaussian(rows * 288, 3);
    const int stride = 291;
    std::vector<float> whole(rows * stride);
    Machine machine(GetParam(), 2, ffn.Limits(rows));
    ffn.Run(*machine.engine, x.data(), {0, rows}, &whole);
    for (int first = 0, count = 1; first < rows; first += count, count = 37) {
      count = std::min(count, rows - first);
      std::vector<float> part(count * stride);
      ffn.Run(*machine.engine, &x[first * 288], {0, count}, &part);
      for (int i = 0; i < count * stride; ++i) {
        ASSERT_EQ(part[i], whole[first * stride + i])
            << Info(type).name << " row " << first + i / stride;
      }
    }
  }
}

// ---- Experts.

struct Moe {
  int cols = 128, ffn = 96, experts = 5, used = 2;
  std::vector<std::unique_ptr<RandomMatrix>> gate, up, down;
  std::vector<PackedMatrix> gate_views, up_views, down_views;
  std::vector<float> x, weights;
  std::vector<int32_t> ids;
  // With biases and the clamped activation, whose limits the biases reach.
  bool biased = false;
  std::vector<std::vector<float>> biases[3];
  std::vector<const float*> bias_views[3];

  Moe(DType type, int rows, bool with_biases = false) : biased(with_biases) {
    for (int e = 0; e < experts && biased; ++e) {
      for (int i = 0; i < 3; ++i) {
        biases[i].push_back(Gaussian(i < 2 ? ffn : cols, 40 + 3 * e + i, i < 2 ? 5 : 1));
        bias_views[i].push_back(biases[i].back().data());
      }
    }
    for (int e = 0; e < experts; ++e) {
      gate.push_back(std::make_unique<RandomMatrix>(type, ffn, cols, 0, 10 + e));
      up.push_back(std::make_unique<RandomMatrix>(type, ffn, cols, 0, 20 + e));
      down.push_back(std::make_unique<RandomMatrix>(type, cols, ffn, 0, 30 + e));
      gate_views.push_back(gate.back()->packed);
      up_views.push_back(up.back()->packed);
      down_views.push_back(down.back()->packed);
    }
    x = Gaussian(rows * cols, 8, 0.2f);
    weights = Gaussian(rows * used, 9);
    for (int r = 0; r < rows; ++r) {
      // The last expert gets few rows, which take the decode way even in a prompt.
      const int first = r % 9 == 0 ? experts - 1 : r % (experts - 1);
      ids.push_back(first);
      ids.push_back(first == experts - 1 ? r % (experts - 1) : (first + 1) % (experts - 1));
    }
  }
  ExpertWeights Views() const {
    return {gate_views,
            up_views,
            down_views,
            bias_views[0],
            bias_views[1],
            bias_views[2],
            biased ? Activation::kClampedSwiGlu : Activation::kSwiGlu};
  }
  Backend::Limits Limits(int rows) const {
    return {.rows = rows, .cols = cols, .experts_used = used, .expert_cols = ffn};
  }
  std::vector<double> Expected(int row) const {
    std::vector<double> out(cols);
    for (int u = 0; u < used; ++u) {
      const int e = ids[row * used + u];
      std::vector<double> h(ffn);
      for (int f = 0; f < ffn; ++f) {
        double g = biased ? biases[0][e][f] : 0, v = biased ? biases[1][e][f] : 0;
        for (int i = 0; i < cols; ++i) {
          g += gate[e]->values[f * cols + i] * x[row * cols + i];
          v += up[e]->values[f * cols + i] * x[row * cols + i];
        }
        h[f] = Gate(biased ? Activation::kClampedSwiGlu : Activation::kSwiGlu, g, v);
      }
      for (int c = 0; c < cols; ++c) {
        double sum = biased ? biases[2][e][c] : 0;
        for (int f = 0; f < ffn; ++f) sum += down[e]->values[c * ffn + f] * h[f];
        out[c] += weights[row * used + u] * sum;
      }
    }
    return out;
  }
};

TEST_P(LinearTest, ExpertsAreWeightedSums) {
  for (DType type : {DType::kF32, DType::kQ8_0, DType::kMXFP4, DType::kBF16}) {
    const RowCount rows{3, 77};
    const Moe moe(type, rows.total(), type == DType::kF32 || type == DType::kMXFP4);
    Machine machine(GetParam(), 2, moe.Limits(rows.total()));
    std::vector<float> out(rows.total() * moe.cols, 1e9f);
    machine.engine->Experts(LinearInput::Plain(moe.x.data(), moe.cols), moe.cols, rows,
                            moe.ids.data(), moe.weights.data(), moe.used, moe.Views(), out.data(),
                            moe.cols);
    // Two roundings of activations on the way: compare by energy over a row.
    const double limit = type == DType::kF32 ? 1e-10 : 2e-3;
    for (int r = 0; r < rows.total(); ++r) {
      const auto expected = moe.Expected(r);
      double error = 0, signal = 0;
      for (int c = 0; c < moe.cols; ++c) {
        error += (out[r * moe.cols + c] - expected[c]) * (out[r * moe.cols + c] - expected[c]);
        signal += expected[c] * expected[c];
      }
      EXPECT_LE(error, limit * signal) << Info(type).name << " row " << r;
    }
  }
}

TEST_P(LinearTest, ExpertsOfOtherRanksAreLeftOutAndDecodeRowsStandAlone) {
  const int rows = 7;
  Moe moe(DType::kQ4_0, rows);
  moe.ids[2 * 4] = -1;
  moe.ids[2 * 5] = moe.ids[2 * 5 + 1] = -1;
  const auto run = [&](int first, int count, int threads) {
    Machine machine(GetParam(), threads, moe.Limits(rows));
    std::vector<float> out(count * moe.cols, 7.0f);
    machine.engine->Experts(LinearInput::Plain(&moe.x[first * moe.cols], moe.cols), moe.cols,
                            {count, 0}, &moe.ids[2 * first], &moe.weights[2 * first], 2,
                            moe.Views(), out.data(), moe.cols);
    return out;
  };
  const auto together = run(0, rows, 3);
  for (int c = 0; c < moe.cols; ++c) EXPECT_EQ(together[5 * moe.cols + c], 0.0f);
  for (int r = 0; r < rows; ++r) {
    const auto alone = run(r, 1, 1);
    for (int c = 0; c < moe.cols; ++c)
      ASSERT_EQ(together[r * moe.cols + c], alone[c]) << "row " << r;
  }
}

INSTANTIATE_TEST_SUITE_P(Levels, LinearTest, testing::ValuesIn(Levels()),
                         [](const auto& param) { return std::string(CpuLevelName(param.param)); });

}  // namespace
}  // namespace shoal
