// How fast the products run beside what the machine can do: `shoal bench --kernels`.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/dtype.h"

namespace shoal {

struct KernelBenchOptions {
  int threads = 0;           // as CpuOptions
  std::string level;         // as CpuOptions
  std::vector<DType> types;  // empty: all
  int64_t rows = 4096;       // of each weight matrix
  int64_t cols = 4096;       // a multiple of 256
  std::vector<int> decode_rows = {1};
  std::vector<int> prefill_rows = {512};
  int64_t memory_bytes = int64_t{1} << 30;  // weights walked through by decode: beyond any cache
  double seconds = 0.3;                     // time spent on each measurement
};

// Measured, not read from a data sheet. GB = 10^9 bytes; an operation is a multiplication or an
// addition.
struct MachineLimits {
  int threads = 0;
  std::string level;
  double read_gbps_one = 0;  // one thread reading huge pages
  double read_gbps_all = 0;  // all threads
  double int8_gops = 0;      // all threads, products of registers; 0 where the level has none
  double f32_gflops = 0;
  double bf16_gflops = 0;
};

struct KernelResult {
  DType type = DType::kF32;
  int64_t rows = 0, cols = 0;
  int batch = 0;  // activation rows
  bool prefill = false;
  double seconds = 0;  // of one product
  double gbps = 0;     // weight bytes read per second
  double gops = 0;
  double share =
      0;  // of the limit that is nearer: read bandwidth for decode, arithmetic for prefill
};

struct KernelReport {
  MachineLimits limits;
  std::vector<KernelResult> results;
};

// Runs for about (types x row counts x seconds). `progress` is called with each result as it is
// found; may be empty. kInvalidArgument for bad options, kResourceExhausted when memory_bytes
// cannot be had.
absl::StatusOr<KernelReport> BenchKernels(const KernelBenchOptions& options,
                                          const std::function<void(const KernelResult&)>& progress);

// GB/s that `threads` threads (0: as CpuOptions) read from so many bytes of huge pages: what bounds
// decode. Takes a third of a second, and the memory while it runs.
absl::StatusOr<double> MeasureReadBandwidth(int threads, int64_t bytes);

// The report as a table in Markdown.
std::string FormatKernelReport(const KernelReport& report);

}  // namespace shoal
