#include "kernels/cpu/kernel_bench.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <string>

#include "kernels/cpu/features.h"

namespace shoal {
namespace {

KernelBenchOptions Small() {
  KernelBenchOptions options;
  options.threads = 2;
  options.rows = 64;
  options.cols = 256;
  options.memory_bytes = 1 << 20;
  options.seconds = 0;
  options.decode_rows = {1, 9};
  options.prefill_rows = {33};
  return options;
}

TEST(KernelBench, MeasuresEveryTypeAndRowCount) {
  int seen = 0;
  const auto report = BenchKernels(Small(), [&](const KernelResult&) { ++seen; });
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->results.size(), 3u * kNumDTypes);
  EXPECT_EQ(seen, 3 * kNumDTypes);
  EXPECT_EQ(report->limits.threads, 2);
  EXPECT_GT(report->limits.read_gbps_one, 0);
  for (const KernelResult& r : report->results) {
    EXPECT_GT(r.seconds, 0);
    EXPECT_TRUE(std::isfinite(r.share));
    EXPECT_GT(r.gops, 0);
    // The figures must be of one measurement: the product's size over its time.
    EXPECT_NEAR(r.gops * r.seconds, 2e-9 * 64 * 256 * r.batch, 1e-12);
  }
  const std::string table = FormatKernelReport(*report);
  EXPECT_THAT(table, testing::HasSubstr("| q4_k | 64x256 | decode | 9 |"));
  EXPECT_THAT(table, testing::HasSubstr("| mxfp4 | 64x256 | prefill | 33 |"));
}

TEST(KernelBench, ReadBandwidthIsOfTheThreadsAskedFor) {
  for (const int threads : {1, 2}) {
    const auto gbps = MeasureReadBandwidth(threads, 8 << 20);
    ASSERT_TRUE(gbps.ok()) << gbps.status();
    EXPECT_GT(*gbps, 0);
  }
  EXPECT_EQ(MeasureReadBandwidth(-1, 8 << 20).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(KernelBench, RefusesWhatItCannotMeasure) {
  KernelBenchOptions options = Small();
  options.cols = 100;
  auto report = BenchKernels(options, {});
  EXPECT_EQ(report.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(report.status().message()), testing::HasSubstr("multiple of 256"));
  options = Small();
  options.level = "sse9";
  EXPECT_EQ(BenchKernels(options, {}).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(KernelBench, MeasuresTheLevelThatIsAskedFor) {
  KernelBenchOptions options = Small();
  options.level = "scalar";
  options.types = {DType::kQ8_0};
  const auto report = BenchKernels(options, {});
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->limits.level, "scalar");
  EXPECT_EQ(report->limits.int8_gops, 0);  // no peak is known without vectors
  EXPECT_EQ(report->results.size(), 3u);
}

}  // namespace
}  // namespace shoal
