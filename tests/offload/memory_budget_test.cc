#include "offload/memory_budget.h"

#include <filesystem>
#include <fstream>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace shoal {
namespace {

using ::testing::HasSubstr;

constexpr int64_t kGiB = int64_t{1} << 30;

TEST(ParseBytes, UnitsOfAUser) {
  EXPECT_EQ(*ParseBytes("4G"), 4 * kGiB);
  EXPECT_EQ(*ParseBytes("512M"), 512 << 20);
  EXPECT_EQ(*ParseBytes("1.5GiB"), kGiB * 3 / 2);
  EXPECT_EQ(*ParseBytes("2gb"), 2 * kGiB);
  EXPECT_EQ(*ParseBytes("4096"), 4096);
  for (const char* bad : {"", "G", "-1G", "4X", "4 apples", "nan", "1e30", "99999999T"}) {
    EXPECT_EQ(ParseBytes(bad).status().code(), absl::StatusCode::kInvalidArgument) << bad;
  }
}

TEST(FormatBytes, ThreeDigits) {
  EXPECT_EQ(FormatBytes(0), "0 B");
  EXPECT_EQ(FormatBytes(4 * kGiB), "4.00 GiB");
  EXPECT_EQ(FormatBytes(512 << 20), "512 MiB");
  EXPECT_EQ(FormatBytes(-2048), "-2.00 KiB");
}

class FreeMemoryTest : public testing::Test {
 protected:
  void SetUp() override {
    root_ = testing::TempDir() + "/free_memory";
    std::filesystem::remove_all(root_);
    Write("/proc/meminfo", "MemTotal: 99 kB\nMemAvailable:   16777216 kB\n");  // 16 GiB
  }
  void Write(const std::string& path, const std::string& text) {
    std::filesystem::create_directories(std::filesystem::path(root_ + path).parent_path());
    std::ofstream(root_ + path) << text;
  }
  std::string root_;
};

TEST_F(FreeMemoryTest, WithoutCgroupsIsMemAvailable) {
  auto free = ReadFreeMemory(root_);
  ASSERT_TRUE(free.ok());
  EXPECT_EQ(free->available, 16 * kGiB);
  EXPECT_EQ(free->bound, "MemAvailable");
  // What the rest of the machine may come to want.
  EXPECT_EQ(DefaultMargin(*free), 16 * kGiB / 20);
}

TEST_F(FreeMemoryTest, V2LimitOfAParentCounts) {
  Write("/proc/self/cgroup", "0::/user.slice/job/leaf\n");
  Write("/proc/self/mountinfo",
        "30 20 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n");
  const std::string base = "/sys/fs/cgroup/user.slice/job";
  Write(base + "/leaf/memory.max", "max\n");
  Write(base + "/leaf/memory.current", "1000\n");
  Write(base + "/memory.max", std::to_string(4 * kGiB) + "\n");
  Write(base + "/memory.current", std::to_string(3 * kGiB) + "\n");
  // 2 GiB of what is used is page cache that goes when it must.
  Write(base + "/memory.stat", "anon 5\nactive_file " + std::to_string(kGiB) + "\ninactive_file " +
                                   std::to_string(kGiB) + "\n");
  auto free = ReadFreeMemory(root_);
  ASSERT_TRUE(free.ok());
  EXPECT_EQ(free->available, 3 * kGiB);
  EXPECT_EQ(free->bound, "cgroup /user.slice/job");
}

TEST_F(FreeMemoryTest, V1LimitCountsBesideAnEmptyV2) {
  Write("/proc/self/cgroup", "9:name=systemd:/\n4:memory:/capped\n0::/\n");
  Write("/proc/self/mountinfo",
        "31 20 0:27 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
        "32 20 0:28 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n");
  Write("/sys/fs/cgroup/memory/capped/memory.limit_in_bytes", std::to_string(2 * kGiB) + "\n");
  Write("/sys/fs/cgroup/memory/capped/memory.usage_in_bytes", std::to_string(kGiB) + "\n");
  Write("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
  Write("/sys/fs/cgroup/memory/memory.usage_in_bytes", "123\n");
  auto free = ReadFreeMemory(root_);
  ASSERT_TRUE(free.ok());
  EXPECT_EQ(free->available, kGiB);
  EXPECT_EQ(free->bound, "cgroup /capped");
  // Nobody else has that memory.
  EXPECT_LT(DefaultMargin(*free), kGiB / 25);
}

TEST_F(FreeMemoryTest, ContainerSeesItsCgroupAtTheMount) {
  Write("/proc/self/cgroup", "4:memory:/docker/abc\n");
  Write("/proc/self/mountinfo",
        "31 20 0:27 /docker/abc /sys/fs/cgroup/memory ro,nosuid - cgroup cgroup rw,memory\n");
  Write("/sys/fs/cgroup/memory/memory.limit_in_bytes", std::to_string(2 * kGiB) + "\n");
  Write("/sys/fs/cgroup/memory/memory.usage_in_bytes", "0\n");
  EXPECT_EQ(ReadFreeMemory(root_)->available, 2 * kGiB);
}

TEST(MemoryBudget, RefusesWithATableOfWhatIsTaken) {
  MemoryBudget budget(4 * kGiB, "--ram");
  ASSERT_TRUE(budget.Reserve("weights", 3 * kGiB).ok());
  ASSERT_TRUE(budget.Reserve("weights", kGiB / 2).ok());
  absl::Status s = budget.Reserve("KV cache", kGiB);
  EXPECT_EQ(s.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(s.message()),
              AllOf(HasSubstr("KV cache needs 1.00 GiB, but 512 MiB of 4.00 GiB are free"),
                    HasSubstr("weights"), HasSubstr("3.50 GiB"), HasSubstr("--ram")));
  EXPECT_EQ(budget.free(), kGiB / 2);
  budget.Release("weights");
  EXPECT_TRUE(budget.Reserve("KV cache", kGiB).ok());
  EXPECT_EQ(budget.free(), 3 * kGiB);
}

}  // namespace
}  // namespace shoal
