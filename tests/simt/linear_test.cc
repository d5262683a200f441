// Products on the device against sums in double over the dequantized weights, for every type.
#include "kernels/cuda/linear.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "simt/runner.h"
#include "tests/kernels/random_matrix.h"

namespace shoal::cuda {
namespace {

std::vector<float> Gaussian(int64_t n, uint32_t seed, float scale = 1) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> gauss(0, scale);
  std::vector<float> x(n);
  for (float& v : x) v = gauss(rng);
  return x;
}

struct Engine : LinearEngine {
  std::vector<uint8_t> memory;
  explicit Engine(const Backend::Limits& limits, LinearEngine engine = LinearEngine(true))
      : LinearEngine(std::move(engine)) {
    memory.assign(WorkspaceBytes(limits) + 256, 0xFF);
    auto at = reinterpret_cast<uintptr_t>(memory.data());
    SetWorkspace(limits, memory.data() + (256 - at % 256) % 256);
  }
};

// A matrix in memory aligned as the device's.
struct DeviceMatrix {
  RandomMatrix random;
  std::vector<uint8_t> bytes;
  PackedMatrix packed;
  DeviceMatrix(DType type, int64_t rows, int64_t cols, int64_t begin, uint32_t seed)
      : random(type, rows, cols, begin, seed), bytes(random.storage.size() + 16) {
    uint8_t* at = bytes.data() + (16 - reinterpret_cast<uintptr_t>(bytes.data()) % 16) % 16;
    std::copy(random.storage.begin(), random.storage.end(), at);
    packed = {random.packed.shape, at};
  }
};

enum class Path { kInt8, kF32, kF16, kBf16 };
Path PathOf(DType type, bool tiles) {
  if (type == DType::kF32) return Path::kF32;
  if (type == DType::kBF16) return tiles ? Path::kBf16 : Path::kF32;
  if (type == DType::kF16) return tiles ? Path::kF16 : Path::kF32;
  return tiles ? Path::kF16 : Path::kInt8;
}

// What one product may be off by; x is the row in double.
//   int8: half a step of each activation, 1/254 of its block's largest value.
//   f16: the activation is off by 2^-11 of itself at most (and by 2^-25 of the row's 2^10 at most),
//   the weight by two roundings of 2^-11 of its largest part. bf16: each by 2^-9. f32 sums: 2^-24
//   of the sum of magnitudes for each of a few in a row, which grows with their root.
double Bound(const float* w, const double* x, int64_t cols, Path path) {
  double bound = 0, magnitude = 0, row_extreme = 0;
  float largest = 0;
  for (int64_t i = 0; i < cols; ++i) {
    largest = std::max(largest, std::fabs(w[i]));
    row_extreme = std::max(row_extreme, std::fabs(x[i]));
  }
  for (int64_t b = 0; b < cols; b += 32) {
    const int64_t end = std::min(b + 32, cols);
    double extreme = 0;
    for (int64_t i = b; i < end; ++i) extreme = std::max(extreme, std::fabs(x[i]));
    for (int64_t i = b; i < end; ++i) {
      const double wx = std::fabs(w[i] * x[i]);
      if (path == Path::kInt8) bound += std::fabs(w[i]) * extreme / 254;
      if (path == Path::kBf16) bound += wx * 0x1p-7;
      if (path == Path::kF16) {
        bound += wx * 0x1p-11 + std::fabs(w[i]) * row_extreme * 0x1p-34 +
                 std::max(largest, std::fabs(w[i])) * std::fabs(x[i]) * 0x1p-10;
      }
      magnitude += std::max<double>(largest, std::fabs(w[i])) * extreme;
    }
  }
  return bound * 1.001 + magnitude * 0x1p-24 * (8 + std::sqrt(static_cast<double>(cols)));
}

void ExpectProduct(const RandomMatrix& w, const std::vector<double>& x, const float* out,
                   const float* bias, const float* residual, Path path) {
  const int64_t cols = w.packed.shape.cols, rows = w.packed.shape.rows;
  double error = 0, signal = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = &w.values[r * cols];
    double product = 0;
    for (int64_t i = 0; i < cols; ++i) product += row[i] * x[i];
    const double b = bias != nullptr ? bias[r] : 0, old = residual != nullptr ? residual[r] : 0;
    const double expected = product + b + old;
    const double sums = (std::fabs(product) + std::fabs(b) + std::fabs(old)) * 0x1p-22;
    ASSERT_NEAR(out[r], expected, Bound(row, x.data(), cols, path) + sums) << "row " << r;
    error += (out[r] - expected) * (out[r] - expected);
    signal += product * product;
  }
  if (rows >= 16) {
    EXPECT_LE(error, (path == Path::kInt8 ? 5e-4 : 5e-5) * signal);
  }
}

struct Shape {
  int64_t rows, cols, begin;
};

void CheckPlain(DType type, const Shape& s, RowCount rows) {
  SCOPED_TRACE(testing::Message() << Info(type).name << " [" << s.rows << ", " << s.cols
                                  << "] from column " << s.begin << ", rows " << rows.decode << "+"
                                  << rows.prefill);
  const DeviceMatrix w(type, s.rows, s.cols, s.begin, static_cast<uint32_t>(s.rows * 31 + s.cols));
  const int64_t stride = s.cols + 3, out_stride = s.rows + 5;
  const auto x = Gaussian(rows.total() * stride, 5);
  const auto bias = Gaussian(s.rows, 6, 10);
  const auto residual = Gaussian(rows.total() * out_stride, 7, 10);
  auto out = residual;
  Engine engine({.rows = rows.total(), .cols = static_cast<int>(s.cols)});
  const LinearOutput output{&w.packed, bias.data(), out.data(), out_stride, true};
  engine.Linear(LinearInput::Plain(x.data(), stride), static_cast<int>(s.cols), rows, {&output, 1},
                nullptr);
  for (int r = 0; r < rows.total(); ++r) {
    const std::vector<double> row(&x[r * stride], &x[r * stride] + s.cols);
    ExpectProduct(w.random, row, &out[r * out_stride], bias.data(), &residual[r * out_stride],
                  PathOf(type, r >= rows.decode && rows.prefill >= 16));
    for (int64_t i = s.rows; i < out_stride; ++i) {
      ASSERT_EQ(out[r * out_stride + i], residual[r * out_stride + i]) << "wrote past the row";
    }
    if (testing::Test::HasFatalFailure()) return;
  }
}

TEST(CudaLinear, EveryTypeAndShape) {
  std::mt19937 rng(3);
  for (int t = 0; t < kNumDTypes; ++t) {
    const DType type = static_cast<DType>(t);
    for (const Shape& s : {Shape{40, 256, 0}, Shape{1, 32, 0}, Shape{17, 544, 0}}) {
      if (s.cols % Info(type).block_elems != 0 && Info(type).block_elems == 256) continue;
      for (RowCount rows : {RowCount{1, 0}, RowCount{11, 0}, RowCount{2, 17}}) {
        if (t % 5 == 1 && rows.prefill > 0) rows.prefill = 70;  // more than a block takes
        simt::SetSeed(rng());
        CheckPlain(type, s, rows);
        if (testing::Test::HasFatalFailure()) return;
      }
    }
  }
}

TEST(CudaLinear, SlicesCutInsideASuperBlock) {
  for (int t = 0; t < kNumDTypes; ++t) {
    const DType type = static_cast<DType>(t);
    if (Info(type).block_elems != 256) continue;
    for (const Shape& s : {Shape{20, 32, 224}, Shape{20, 320, 96}, Shape{33, 640, 160}}) {
      for (const RowCount rows : {RowCount{3, 0}, RowCount{0, 20}}) {
        CheckPlain(type, s, rows);
        if (testing::Test::HasFatalFailure()) return;
      }
    }
  }
}

TEST(CudaLinear, OddColumnsOfTheFloatTypes) {
  for (const DType type : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const int64_t cols : {1, 7, 333}) {
      CheckPlain(type, {19, cols, 0}, {2, 17});
      if (testing::Test::HasFatalFailure()) return;
    }
  }
}

TEST(CudaLinear, ADecodeRowDependsNeitherOnTheBatchNorOnTheSchedule) {
  for (const DType type : {DType::kQ4_0, DType::kQ4_K, DType::kQ6_K, DType::kQ8_0, DType::kQ2_K,
                           DType::kMXFP4, DType::kF16}) {
    const DeviceMatrix w(type, 48, 512, 0, 9);
    const auto x = Gaussian(33 * 512, 5);
    const auto run = [&](int first, int rows, int pass_rows = kInt8PassRows) {
      Engine engine({.rows = rows, .cols = 512});
      engine.SetPassRows(pass_rows);
      std::vector<float> out(rows * 48);
      const LinearOutput output{&w.packed, nullptr, out.data(), 48, false};
      engine.Linear(LinearInput::Plain(&x[first * 512], 512), 512, {rows, 0}, {&output, 1},
                    nullptr);
      return out;
    };
    const auto all = run(0, 33);
    for (const int row : {0, 7, 8, 32}) {
      simt::SetSeed(row);
      const auto one = run(row, 1);
      for (int i = 0; i < 48; ++i) ASSERT_EQ(one[i], all[row * 48 + i]) << Info(type).name;
    }
    EXPECT_EQ(run(0, 33, 16), all) << Info(type).name;
    EXPECT_EQ(run(0, 33, 8), all) << Info(type).name;
    // As many rows as take tiles by one, two and four, even and odd.
    for (const int rows : {2, 7, 8, 9, 15, 17, 25}) {
      const auto some = run(0, rows);
      for (int i = 0; i < rows * 48; ++i) {
        ASSERT_EQ(some[i], all[i]) << Info(type).name << " " << rows << " " << i;
      }
    }
  }
}

// Several outputs of different types from one normed input: q, k, v.
TEST(CudaLinear, OutputsOfOneInput) {
  const DeviceMatrix q(DType::kQ4_K, 48, 512, 0, 1), k(DType::kQ4_K, 17, 512, 0, 2),
      v(DType::kQ6_K, 16, 512, 0, 3), f(DType::kF32, 5, 512, 0, 4), b(DType::kBF16, 20, 512, 0, 5);
  const DeviceMatrix* const sets[2][4] = {{&q, &k, &v, &f}, {&b, &k, &f, &q}};
  const auto weight = Gaussian(512, 8);
  for (const auto kind : {LinearInput::Kind::kRmsNorm, LinearInput::Kind::kGated}) {
    for (const auto& set : sets) {
      const RowCount rows{3, 21};
      const auto x = Gaussian(24 * 512, 5), up = Gaussian(24 * 512, 6);
      LinearInput input = LinearInput::RmsNorm(x.data(), 512, weight.data(), 1e-5f);
      if (kind == LinearInput::Kind::kGated) {
        input = LinearInput::Gated(Activation::kSwiGlu, x.data(), up.data(), 512);
      }
      std::vector<std::vector<float>> out(4);
      std::vector<LinearOutput> outputs;
      for (int i = 0; i < 4; ++i) {
        const int64_t n = set[i]->packed.shape.rows;
        out[i].resize(24 * n);
        outputs.push_back({&set[i]->packed, nullptr, out[i].data(), n, false});
      }
      Engine engine({.rows = 24, .cols = 512});
      engine.Linear(input, 512, rows, outputs, nullptr);
      for (int r = 0; r < 24; ++r) {
        std::vector<double> row(512);
        double squares = 0;
        for (int i = 0; i < 512; ++i) squares += double{x[r * 512 + i]} * x[r * 512 + i];
        const double norm = 1 / std::sqrt(squares / 512 + 1e-5);
        for (int i = 0; i < 512; ++i) {
          const double v = x[r * 512 + i];
          row[i] = kind == LinearInput::Kind::kRmsNorm ? v * norm * weight[i]
                                                       : v / (1 + std::exp(-v)) * up[r * 512 + i];
        }
        for (int i = 0; i < 4; ++i) {
          const PackedShape& shape = set[i]->packed.shape;
          ExpectProduct(set[i]->random, row, &out[i][r * shape.rows], nullptr, nullptr,
                        PathOf(shape.type, r >= rows.decode));
          if (testing::Test::HasFatalFailure()) return;
        }
      }
    }
  }
}

// f16 ends at 65504; a row with larger values must not.
TEST(CudaLinear, PromptRowsBeyondTheRangeOfF16) {
  const DeviceMatrix w(DType::kQ4_0, 32, 64, 0, 1);
  auto x = Gaussian(16 * 64, 5);
  for (float& v : x) v *= 1e6f;
  std::fill(x.begin(), x.begin() + 64, 0.0f);
  Engine engine({.rows = 16, .cols = 64});
  std::vector<float> out(16 * 32);
  const LinearOutput output{&w.packed, nullptr, out.data(), 32, false};
  engine.Linear(LinearInput::Plain(x.data(), 64), 64, {0, 16}, {&output, 1}, nullptr);
  for (int r = 0; r < 16; ++r) {
    ExpectProduct(w.random, {&x[r * 64], &x[r * 64] + 64}, &out[r * 32], nullptr, nullptr,
                  Path::kF16);
  }
}

// A library's product, by the host.
struct HostGemm : HalfGemm {
  int calls = 0;
  void Multiply(int m, int n, int k, const uint16_t* a, const uint16_t* b, const float* alpha,
                bool accumulate, float* c, int64_t stride) override {
    ++calls;
    for (int j = 0; j < n; ++j) {
      for (int i = 0; i < m; ++i) {
        double sum = 0;
        for (int l = 0; l < k; ++l) {
          sum += double{HalfToFloat(a[int64_t{i} * k + l])} * HalfToFloat(b[int64_t{j} * k + l]);
        }
        float& out = c[j * stride + i];
        out = static_cast<float>(*alpha * sum) + (accumulate ? out : 0);
      }
    }
  }
};

// Long prompts where a library multiplies: the weights are unpacked for it, a few panels at a time.
TEST(CudaLinear, LongPromptsTakeALibrarysProduct) {
  constexpr int kRows = kGemmRows;
  for (int t = 0; t < kNumDTypes; ++t) {
    const DType type = static_cast<DType>(t);
    if (Info(type).block_elems == 1) continue;
    const bool super = Info(type).block_elems == 256;
    const Shape s = super ? Shape{17, 96, 192} : Shape{17, 64, 0};
    SCOPED_TRACE(Info(type).name);
    const DeviceMatrix w(type, s.rows, s.cols, s.begin, t), f32(DType::kF32, 5, s.cols, 0, t);
    const auto x = Gaussian(kRows * s.cols, 5), bias = Gaussian(s.rows, 6);
    const auto residual = Gaussian(kRows * s.rows, 7, 10);
    auto out = residual, with_bias = residual, floats = residual;
    HostGemm gemm;
    Engine engine({.rows = kRows + 1, .cols = static_cast<int>(s.cols)},
                  LinearEngine(true, &gemm, s.cols * kPanelRows * 2));
    // The one with a bias and the f32 one take the tiles.
    const LinearOutput outputs[] = {{&w.packed, nullptr, out.data(), s.rows, true},
                                    {&w.packed, bias.data(), with_bias.data(), s.rows, false},
                                    {&f32.packed, nullptr, floats.data(), s.rows, false}};
    engine.Linear(LinearInput::Plain(x.data(), s.cols), static_cast<int>(s.cols), {0, kRows},
                  outputs, nullptr);
    EXPECT_EQ(gemm.calls, 2);  // a panel at a time
    for (int r = 0; r < kRows; r += 15) {
      const std::vector<double> row(&x[r * s.cols], &x[r * s.cols] + s.cols);
      const int64_t at = r * s.rows;
      ExpectProduct(w.random, row, &out[at], nullptr, &residual[at], Path::kF16);
      ExpectProduct(w.random, row, &with_bias[at], bias.data(), nullptr, Path::kF16);
      ExpectProduct(f32.random, row, &floats[at], nullptr, nullptr, Path::kF32);
      if (HasFatalFailure()) return;
    }
  }
}

TEST(CudaLinear, WithoutBf16TilesBf16WeightsTakeFloats) {
  const DeviceMatrix w(DType::kBF16, 32, 64, 0, 1);
  const auto x = Gaussian(20 * 64, 5);
  Engine engine({.rows = 20, .cols = 64}, LinearEngine(false));
  std::vector<float> out(20 * 32);
  const LinearOutput output{&w.packed, nullptr, out.data(), 32, false};
  engine.Linear(LinearInput::Plain(x.data(), 64), 64, {0, 20}, {&output, 1}, nullptr);
  for (int r = 0; r < 20; ++r) {
    ExpectProduct(w.random, {&x[r * 64], &x[r * 64] + 64}, &out[r * 32], nullptr, nullptr,
                  Path::kF32);
  }
}

// Experts against the same linear layers, one row and one expert at a time.
void CheckExperts(DType gate_type, DType down_type, RowCount rows, bool biased = false) {
  SCOPED_TRACE(testing::Message() << Info(gate_type).name << " " << rows.decode << "+"
                                  << rows.prefill);
  constexpr int kExperts = 5, kUsed = 3, kCols = 256, kFfn = 256, kOut = 40;
  std::vector<std::unique_ptr<DeviceMatrix>> owned;
  std::vector<PackedMatrix> parts[3];
  for (int e = 0; e < kExperts; ++e) {
    for (int part = 0; part < 3; ++part) {
      owned.push_back(part < 2
                          ? std::make_unique<DeviceMatrix>(gate_type, kFfn, kCols, 0, 7 * e + part)
                          : std::make_unique<DeviceMatrix>(down_type, kOut, kFfn, 0, 7 * e + part));
      parts[part].push_back(owned.back()->packed);
    }
  }
  std::vector<std::vector<float>> biases[3];
  std::vector<const float*> bias_views[3];
  for (int e = 0; e < kExperts && biased; ++e) {
    for (int part = 0; part < 3; ++part) {
      biases[part].push_back(Gaussian(part < 2 ? kFfn : kOut, 90 + 3 * e + part, 3));
      bias_views[part].push_back(biases[part].back().data());
    }
  }
  const Activation activation = biased ? Activation::kClampedSwiGlu : Activation::kSwiGlu;
  const ExpertWeights experts{parts[0],      parts[1],      parts[2],  bias_views[0],
                              bias_views[1], bias_views[2], activation};
  const auto bias = [&](int part, int e) { return biased ? bias_views[part][e] : nullptr; };
  const int n = rows.total();
  std::mt19937 rng(n);
  std::vector<int32_t> ids(n * kUsed);
  std::vector<float> weights = Gaussian(n * kUsed, 4);
  for (int r = 0; r < n; ++r) {
    int order[kExperts] = {0, 1, 2, 3, 4};
    std::shuffle(order, order + kExperts, rng);
    for (int k = 0; k < kUsed; ++k) ids[r * kUsed + k] = rng() % 5 == 0 ? -1 : order[k];
    // One expert has every row, more than fit in a group.
    std::replace(&ids[r * kUsed], &ids[r * kUsed] + kUsed, 2, -1);
    ids[r * kUsed + r % kUsed] = 2;
  }
  const auto x = Gaussian(n * kCols, 5, 0.01f), norm = Gaussian(kCols, 6);
  const LinearInput input = LinearInput::RmsNorm(x.data(), kCols, norm.data(), 1e-5f);
  std::vector<float> out(n * (kOut + 2), 77.0f);
  Engine engine({.rows = n, .cols = kCols, .experts_used = kUsed, .expert_cols = kFfn});
  engine.Experts(input, kCols, rows, ids.data(), weights.data(), kUsed, experts, out.data(),
                 kOut + 2, nullptr);
  for (int r = 0; r < n; r += r < rows.decode ? 1 : 13) {
    std::vector<float> expected(kOut);
    double scale = 0;
    for (int k = 0; k < kUsed; ++k) {
      const int e = ids[r * kUsed + k];
      if (e < 0) continue;
      std::vector<float> gate(kFfn), up(kFfn), down(kOut);
      const LinearOutput pair[2] = {{&parts[0][e], bias(0, e), gate.data(), kFfn, false},
                                    {&parts[1][e], bias(1, e), up.data(), kFfn, false}};
      LinearInput one = input;
      one.x += r * kCols;
      engine.Linear(one, kCols, {1, 0}, pair, nullptr);
      const LinearOutput last{&parts[2][e], bias(2, e), down.data(), kOut, false};
      engine.Linear(LinearInput::Gated(activation, gate.data(), up.data(), kFfn), kFfn, {1, 0},
                    {&last, 1}, nullptr);
      for (int i = 0; i < kOut; ++i) {
        expected[i] += weights[r * kUsed + k] * down[i];
        scale = std::max<double>(scale, std::fabs(weights[r * kUsed + k] * down[i]));
      }
    }
    for (int i = 0; i < kOut; ++i) {
      if (r < rows.decode) {  // the very products, in the same order; a GPU fuses the sums
        ASSERT_NEAR(out[r * (kOut + 2) + i], expected[i], kUsed * 0x1p-23 * scale) << "row " << r;
      } else {
        ASSERT_NEAR(out[r * (kOut + 2) + i], expected[i], 0.05 * scale) << "row " << r;
      }
    }
    ASSERT_EQ(out[r * (kOut + 2) + kOut], 77.0f) << "wrote past the row";
  }
}

TEST(CudaExperts, AreTheSameAsOneAtATime) {
  CheckExperts(DType::kQ4_K, DType::kQ6_K, {1, 0});
  CheckExperts(DType::kMXFP4, DType::kMXFP4, {9, 3});
  CheckExperts(DType::kMXFP4, DType::kMXFP4, {9, 20}, /*biased=*/true);
  CheckExperts(DType::kF32, DType::kBF16, {3, 20}, /*biased=*/true);
  CheckExperts(DType::kQ4_0, DType::kQ8_0, {5, 70});
  CheckExperts(DType::kBF16, DType::kF16, {2, 20});
}

}  // namespace
}  // namespace shoal::cuda
