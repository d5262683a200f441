#include "comm/comm_bench.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <vector>

#include "absl/strings/str_format.h"
#include "comm/wire.h"
#include "kernels/check.h"
#include "kernels/status_macros.h"

namespace shoal {
namespace {

constexpr int kWarmUps = 3;
constexpr int kRepeatsMax = 10000;

float TestValue(int rank, int64_t i) { return static_cast<float>(rank + 1 + i % 7); }

// Elements of one checked all-reduce that are further from the true sum than encoding allows.
absl::StatusOr<int64_t> CountWrong(Communicator& comm, Wire wire, std::vector<float>& data) {
  const int64_t count = static_cast<int64_t>(data.size());
  for (int64_t i = 0; i < count; ++i) data[i] = TestValue(comm.rank(), i);
  SHOAL_RETURN_IF_ERROR(comm.AllReduceSum(data.data(), count, wire));
  const int size = comm.size();
  // The addends are whole numbers below size+7, so only the wire can err: once for each of them,
  // which is at most half of 2^-10 (f16) or of 1/127 with its scale's rounding (q8) of the largest,
  // and once for the sum.
  const float relative = wire == Wire::kF32 ? 0 : wire == Wire::kF16 ? 0x1p-11f : 0.501f / 127;
  const float largest = static_cast<float>(size) * static_cast<float>(size + 7);
  const float tolerance = size == 1 ? 0 : 2.01f * relative * largest;
  int64_t wrong = 0;
  for (int64_t i = 0; i < count; ++i) {
    float expected = 0;
    for (int r = 0; r < size; ++r) expected += TestValue(r, i);
    wrong += !(std::abs(data[i] - expected) <= tolerance);
  }
  return wrong;
}

// Seconds for one all-reduce of zeros (a sum that is summed again would overflow), mean of
// `repeats`.
absl::StatusOr<double> Time(Communicator& comm, Wire wire, std::vector<float>& data, int repeats) {
  std::fill(data.begin(), data.end(), 0.0f);
  SHOAL_RETURN_IF_ERROR(comm.Barrier());
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < repeats; ++i) {
    SHOAL_RETURN_IF_ERROR(comm.AllReduceSum(data.data(), static_cast<int64_t>(data.size()), wire));
  }
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  return elapsed.count() / repeats;
}

}  // namespace

absl::Status RunCommBench(Communicator& comm, const CommBenchOptions& options,
                          const std::function<void(const CommBenchRow&)>& on_row) {
  SHOAL_CHECK(options.factor >= 2 && options.bytes_min >= 4, "sizes must grow from 4 bytes");
  std::vector<float> data;
  for (int64_t bytes = options.bytes_min; bytes <= options.bytes_max; bytes *= options.factor) {
    data.resize(bytes / sizeof(float));
    SHOAL_ASSIGN_OR_RETURN(const int64_t wrong, CountWrong(comm, options.wire, data));
    SHOAL_ASSIGN_OR_RETURN(const double estimate, Time(comm, options.wire, data, kWarmUps));
    int32_t repeats = static_cast<int32_t>(
        std::clamp(absl::ToDoubleSeconds(options.time_per_size) / std::max(estimate, 1e-9), 3.0,
                   static_cast<double>(kRepeatsMax)));
    SHOAL_RETURN_IF_ERROR(comm.Broadcast(&repeats, sizeof repeats, 0));

    struct Result {
      double seconds;
      int64_t wrong;
    };
    SHOAL_ASSIGN_OR_RETURN(const double seconds, Time(comm, options.wire, data, repeats));
    const Result own{seconds, wrong};
    std::vector<Result> results(comm.size());
    SHOAL_RETURN_IF_ERROR(comm.AllGather(&own, sizeof own, results.data()));
    Result mean{0, 0};
    for (const Result& result : results) {
      mean.seconds += result.seconds / comm.size();
      mean.wrong += result.wrong;
    }
    if (comm.rank() != 0) continue;
    const double algbw = static_cast<double>(bytes) / std::max(mean.seconds, 1e-12) * 1e-9;
    on_row({bytes, static_cast<int64_t>(data.size()), options.wire, mean.seconds * 1e6, algbw,
            algbw * 2 * (comm.size() - 1) / comm.size(), mean.wrong});
  }
  return absl::OkStatus();
}

std::string CommBenchHeader() {
  return absl::StrFormat(
      "#%11s %13s %9s %7s %6s %8s %7s %7s %6s\n#%11s %13s %9s %7s %6s %8s %7s %7s", "size", "count",
      "type", "redop", "root", "time", "algbw", "busbw", "#wrong", "(B)", "(elements)", "", "", "",
      "(us)", "(GB/s)", "(GB/s)");
}

std::string FormatCommBenchRow(const CommBenchRow& row) {
  // The type is the wire's: what arrives is float in every case.
  const char* const type = row.wire == Wire::kF32   ? "float"
                           : row.wire == Wire::kF16 ? "half"
                                                    : "q8";
  return absl::StrFormat("%12d %13d %9s %7s %6d %8.2f %7.2f %7.2f %6d", row.bytes, row.count, type,
                         "sum", -1, row.micros, row.algbw_gbps, row.busbw_gbps, row.wrong);
}

}  // namespace shoal
