#include "kernels/cpu/kernel_bench.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "fmt/format.h"
#include "kernels/buffer.h"
#include "kernels/cpu/features.h"
#include "kernels/cpu/linear.h"
#include "kernels/cpu/linear_kernels.h"
#include "kernels/cpu/thread_pool.h"

namespace shoal {
namespace {

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The fastest of repeated calls within `seconds`, at least three: other work on the machine only
// ever slows one down.
template <typename Fn>
double BestSeconds(double seconds, Fn fn) {
  double best = 1e30;
  const double end = Now() + seconds;
  for (int i = 0; i < 3 || Now() < end; ++i) {
    const double begin = Now();
    fn();
    best = std::min(best, Now() - begin);
  }
  return best;
}

// Reads every cache line of [data, data + bytes).
uint64_t ReadAll(const uint8_t* data, int64_t bytes) {
  uint64_t sum[4] = {};
  for (int64_t i = 0; i + 64 <= bytes; i += 64) {
    __builtin_prefetch(data + i + 4096);
    uint64_t v[4];
    std::memcpy(v, data + i, 32);
    for (int j = 0; j < 4; ++j) sum[j] ^= v[j];
  }
  return sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
}

// GB/s of all the pool's threads, each over its own part of the memory.
double ReadGbps(ThreadPool* pool, const uint8_t* data, int64_t bytes, double seconds) {
  std::vector<uint64_t> sums(pool->threads() * 8);  // kept from being optimized away
  const double best = BestSeconds(seconds, [&] {
    pool->Run([&](int t) {
      const int64_t share = bytes / pool->threads() / 64 * 64;
      sums[8 * t] = ReadAll(data + t * share, share);
    });
  });
  return static_cast<double>(bytes) / best / 1e9;
}

struct Bench {
  const KernelBenchOptions& options;
  const LinearKernels kernels;
  ThreadPool* pool;
  LinearEngine* engine;
  Buffer* weights;
  KernelReport report;

  double MeasurePeak(int64_t (*peak)(int64_t)) {
    if (peak == nullptr) return 0;
    constexpr int64_t kLoops = 200'000;
    int64_t ops = 0;
    const double seconds = BestSeconds(options.seconds, [&] {
      pool->Run([&](int t) {
        const int64_t n = peak(kLoops);
        if (t == 0) ops = n;
      });
    });
    return static_cast<double>(ops) * pool->threads() / seconds / 1e9;
  }

  KernelResult Measure(DType type, int batch, bool prefill, const float* x, float* out) {
    KernelResult r{.type = type,
                   .rows = options.rows,
                   .cols = options.cols,
                   .batch = batch,
                   .prefill = prefill};
    PackedMatrix w;
    w.shape = MakePackedShape(type, r.rows, 0, r.cols);
    const int64_t bytes = w.shape.bytes();
    const int64_t copies = std::max<int64_t>(1, options.memory_bytes / bytes);
    const RowCount rows = prefill ? RowCount{0, batch} : RowCount{batch, 0};
    int64_t next = 0;
    const auto step = [&] {
      w.data = weights->data() + next++ % copies * bytes;
      const LinearOutput output{&w, nullptr, out, r.rows, false};
      engine->Linear(LinearInput::Plain(x, r.cols), static_cast<int>(r.cols), rows, {&output, 1});
    };
    // Decode is timed over a walk through all the memory, so that no cache helps.
    const int64_t steps = prefill ? 1 : copies;
    r.seconds = BestSeconds(options.seconds,
                            [&] {
                              for (int64_t i = 0; i < steps; ++i) step();
                            }) /
                static_cast<double>(steps);
    r.gbps = static_cast<double>(bytes) / r.seconds / 1e9;
    r.gops = 2.0 * static_cast<double>(r.rows * r.cols) * batch / r.seconds / 1e9;
    const MachineLimits& l = report.limits;
    const bool plain = type == DType::kF32 || type == DType::kF16;
    const bool is_float = plain || type == DType::kBF16;
    const double compute = prefill && !plain && l.bf16_gflops > 0 ? l.bf16_gflops
                           : is_float || l.int8_gops == 0         ? l.f32_gflops
                                                                  : l.int8_gops;
    r.share = r.gbps / l.read_gbps_all;
    if (compute > 0) r.share = std::max(r.share, r.gops / compute);
    return r;
  }
};

}  // namespace

absl::StatusOr<KernelReport> BenchKernels(
    const KernelBenchOptions& options, const std::function<void(const KernelResult&)>& progress) {
  if (options.rows <= 0 || options.cols <= 0 || options.cols % 256 != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("kernel bench: a matrix of ", options.rows, " x ", options.cols,
                     " cannot be measured; rows must be positive and columns a multiple of 256"));
  }
  absl::StatusOr<CpuLevel> level = ChooseCpuLevel(options.level);
  if (!level.ok()) return level.status();
  auto pool = ThreadPool::Create({.threads = options.threads});
  if (!pool.ok()) return pool.status();
  LinearEngine engine(*level, pool->get());
  int batch = 1;
  for (int b : options.decode_rows) batch = std::max(batch, b);
  for (int b : options.prefill_rows) batch = std::max(batch, b);
  if (absl::Status s = engine.Reserve({.rows = batch, .cols = static_cast<int>(options.cols)});
      !s.ok())
    return s;
  // Room for one matrix of the widest type at least.
  const int64_t widest = MakePackedShape(DType::kF32, options.rows, 0, options.cols).bytes();
  auto weights = Buffer::Allocate(std::max(options.memory_bytes, widest));
  if (!weights.ok()) return weights.status();
  auto x = Buffer::Allocate(batch * options.cols * sizeof(float));
  auto out = Buffer::Allocate(batch * options.rows * sizeof(float));
  if (!x.ok()) return x.status();
  if (!out.ok()) return out.status();
  // Bytes whose f16 and f32 readings are small normal numbers.
  uint32_t state = 1;
  const auto random = [&state] { return state = state * 1664525u + 1013904223u; };
  for (size_t i = 0; i < weights->size(); i += 4) {
    const uint32_t v = (random() & 0x1f1f1f1fu) | 0x20202020u;
    std::memcpy(weights->data() + i, &v, 4);
  }
  for (int64_t i = 0; i < batch * options.cols; ++i) {
    x->as<float>()[i] = static_cast<float>(static_cast<int32_t>(random())) * 0x1p-31f;
  }
  Bench bench{options, LinearKernelsOf(*level), pool->get(), &engine, &*weights, {}};
  bench.report.limits.threads = (*pool)->threads();
  bench.report.limits.level = CpuLevelName(*level);
  auto single = ThreadPool::Create({.threads = 1});
  if (!single.ok()) return single.status();
  bench.report.limits.read_gbps_one =
      ReadGbps(single->get(), weights->data(), options.memory_bytes, options.seconds);
  bench.report.limits.read_gbps_all =
      ReadGbps(pool->get(), weights->data(), options.memory_bytes, options.seconds);
  bench.report.limits.int8_gops = bench.MeasurePeak(bench.kernels.int8_peak);
  bench.report.limits.f32_gflops = bench.MeasurePeak(bench.kernels.f32_peak);
  bench.report.limits.bf16_gflops = bench.MeasurePeak(bench.kernels.bf16_peak);
  std::vector<DType> types = options.types;
  for (int t = 0; types.size() < kNumDTypes && options.types.empty(); ++t)
    types.push_back(static_cast<DType>(t));
  for (const bool prefill : {false, true}) {
    for (int rows : prefill ? options.prefill_rows : options.decode_rows) {
      for (DType type : types) {
        bench.report.results.push_back(
            bench.Measure(type, rows, prefill, x->as<float>(), out->as<float>()));
        if (progress) progress(bench.report.results.back());
      }
    }
  }
  return std::move(bench.report);
}

absl::StatusOr<double> MeasureReadBandwidth(int threads, int64_t bytes) {
  absl::StatusOr<std::unique_ptr<ThreadPool>> pool = ThreadPool::Create({.threads = threads});
  if (!pool.ok()) return pool.status();
  absl::StatusOr<Buffer> memory = Buffer::Allocate(bytes);
  if (!memory.ok()) return memory.status();
  std::memset(memory->data(), 1, memory->size());  // untouched pages would all be the zero page
  return ReadGbps(pool->get(), memory->data(), bytes, KernelBenchOptions().seconds);
}

std::string FormatKernelReport(const KernelReport& report) {
  const MachineLimits& l = report.limits;
  std::string s = fmt::format(
      "{}, {} threads: reads {:.1f} GB/s with one thread, {:.1f} GB/s with all; int8 {:.0f} GOP/s, "
      "f32 {:.0f} "
      "GFLOP/s, bf16 {:.0f} GFLOP/s\n\n",
      l.level, l.threads, l.read_gbps_one, l.read_gbps_all, l.int8_gops, l.f32_gflops,
      l.bf16_gflops);
  s += "| type | matrix | phase | rows | us | GB/s | GOP/s | share of limit "
       "|\n|---|---|---|---|---|---|---|---|\n";
  for (const KernelResult& r : report.results) {
    s += fmt::format("| {} | {}x{} | {} | {} | {:.1f} | {:.1f} | {:.0f} | {:.0f} % |\n",
                     Info(r.type).name, r.rows, r.cols, r.prefill ? "prefill" : "decode", r.batch,
                     r.seconds * 1e6, r.gbps, r.gops, r.share * 100);
  }
  return s;
}

}  // namespace shoal
