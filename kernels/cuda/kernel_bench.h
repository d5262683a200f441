// How fast the GPU's kernels run beside what the chip can do: `shoal bench --kernels --device
// cuda`.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/dtype.h"

namespace shoal::cuda {

struct KernelBenchOptions {
  int device = 0;
  std::vector<DType> types;  // empty: Q4_0, Q4_K, Q8_0
  std::vector<int> decode_rows = {1, 8, 32};
  int prefill_rows = 2048;
  int64_t memory_bytes = int64_t{2} << 30;  // weights walked through: beyond any L2 cache
  double seconds = 0.03;                    // time spent on each measurement
};

// Measured, not read from a data sheet. GB = 10^9 bytes; an operation is a multiplication or an
// addition.
struct ChipLimits {
  std::string name;
  int multiprocessors = 0;
  double read_gbps = 0;    // a kernel that reads memory and does nothing else
  double mma_tflops = 0;   // f16 mma.sync with f32 sums, from registers
  double gemm_tflops = 0;  // cuBLAS, f16 with f32 sums, 8192^3, random values; 0: not installed
  double pinned_gbps = 0;  // pinned host memory to the GPU
  double launch_us = 0;    // an empty kernel in a stream of them, host side included
  double matrix_tflops() const { return gemm_tflops > mma_tflops ? gemm_tflops : mma_tflops; }
};

struct KernelResult {
  std::string what;  // "decode 4096x14336 q4_0", "attention decode f16 at 4096", ..
  int rows = 0;      // of activations
  double seconds = 0;
  double gbps = 0;    // of weights, or of the KV cache
  double tflops = 0;  // 0 where bandwidth is what counts
  double share = 0;   // of read_gbps (decode) or matrix_tflops() (prefill)
};

struct KernelReport {
  ChipLimits limits;
  std::vector<KernelResult> results;
};

// The products of a layer of an 8B and of a 70B model, each alone and the layer's one after the
// other with the steps between them, and attention. `progress` is called with each result; may be
// empty. kUnavailable without a GPU, kResourceExhausted when its memory does not suffice.
absl::StatusOr<KernelReport> BenchKernels(const KernelBenchOptions& options,
                                          const std::function<void(const KernelResult&)>& progress);

// The limits alone, in a fraction of a second; takes up to 1 GiB of the GPU's memory meanwhile.
absl::StatusOr<ChipLimits> MeasureChip(int device);

// GB/s that a kernel reads on the calling thread's GPU: what bounds decode. Takes 20 ms and
// `bytes` of memory while it runs.
absl::StatusOr<double> MeasureReadBandwidth(int64_t bytes);

// The report as a table in Markdown.
std::string FormatKernelReport(const KernelReport& report);

}  // namespace shoal::cuda
