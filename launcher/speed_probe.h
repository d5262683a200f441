// Short measurements of this machine, made as a streamed pass uses it.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/dtype.h"
#include "shard/checkpoint.h"
#include "shard/weight_layout.h"

namespace shoal {

struct MultiplySpeed {
  double decode = 0;   // bytes of weights per second, with one row
  double prefill = 0;  // with a batch, counted once per row
};
// Of `memory` bytes it takes a third at most, and 96 MiB at least.
absl::StatusOr<MultiplySpeed> MeasureMultiplying(DType type, const CpuOptions& cpu, int64_t memory);

// Bytes of KV cache per second that rows attend to, counted once per row.
struct AttentionSpeed {
  double decode = 0;   // one row
  double prefill = 0;  // a batch of one sequence
};
absl::StatusOr<AttentionSpeed> MeasureAttention(const AttentionShape& shape, KvType type,
                                                const CpuOptions& cpu);

// A smaller file says nothing about its disk.
inline constexpr int64_t kReadSampleBytes = 64 << 20;

struct ReadSpeed {
  double bytes_per_s = 0;  // past the page cache
  // How much longer each takes beside the other.
  double read_slowdown = 1, decode_slowdown = 1, prefill_slowdown = 1;
};
// Reads `path` alone, then beside weights of `type` being multiplied: about six seconds. Memory
// as above.
// REQUIRES: it has kReadSampleBytes.
absl::StatusOr<ReadSpeed> MeasureReading(const std::string& path, DType type, const CpuOptions& cpu,
                                         int64_t memory);

// Bytes of a rank's weights per second, read and packed from a checkpoint by `threads` threads.
absl::StatusOr<double> MeasurePacking(const Checkpoint& checkpoint, const WeightLayout& layout,
                                      int threads);

}  // namespace shoal
