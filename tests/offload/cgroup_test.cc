// What cgroups say, read from a /proc and a /sys of the test's own.
#include "offload/cgroup.h"

#include <sys/sysmacros.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "gtest/gtest.h"

namespace shoal {
namespace {

namespace fs = std::filesystem;

class CgroupTest : public testing::Test {
 protected:
  CgroupTest() : root_(testing::TempDir() + "/cgroup_" + std::to_string(getpid())) {
    fs::remove_all(root_);
  }
  ~CgroupTest() override { fs::remove_all(root_); }
  void Write(const std::string& path, const std::string& text) {
    fs::create_directories(fs::path(root_ + path).parent_path());
    std::ofstream(root_ + path) << text;
  }
  // Of a disk, 254:0, and its first partition.
  int64_t DiskLimit() const { return DiskReadLimit(makedev(254, 0), root_); }
  int64_t PartitionLimit() const { return DiskReadLimit(makedev(254, 1), root_); }

  const std::string root_;
};

TEST_F(CgroupTest, WithoutCgroupsThereIsNoLimit) {
  EXPECT_TRUE(CgroupsOf("memory", root_).empty());
  EXPECT_EQ(DiskLimit(), 0);
}

TEST_F(CgroupTest, V1ThrottleOfAParentCounts) {
  Write("/proc/self/cgroup", "7:blkio:/job/leaf\n4:memory:/\n0::/\n");
  Write("/proc/self/mountinfo",
        "31 20 0:27 / /sys/fs/cgroup/blkio rw,relatime - cgroup cgroup rw,blkio\n");
  const std::vector<CgroupFolder> groups = CgroupsOf("blkio", root_);
  ASSERT_EQ(groups.size(), 3);
  EXPECT_EQ(groups[0].path, root_ + "/sys/fs/cgroup/blkio/job/leaf");
  EXPECT_EQ(groups[1].name, "/job");
  EXPECT_EQ(groups[2].name, "/");
  const std::string file = "/blkio.throttle.read_bps_device";
  Write("/sys/fs/cgroup/blkio/job" + file, "8:0 5\n254:0 1000000000\n");
  EXPECT_EQ(DiskLimit(), 1'000'000'000);
  Write("/sys/fs/cgroup/blkio/job/leaf" + file, "254:0 2000000000\n");
  EXPECT_EQ(DiskLimit(), 1'000'000'000);
  Write("/sys/fs/cgroup/blkio/job/leaf" + file, "254:0 500\n");
  EXPECT_EQ(DiskLimit(), 500);
}

TEST_F(CgroupTest, V2LimitIsTheDisksNotThePartitions) {
  Write("/proc/self/cgroup", "0::/job\n");
  Write("/proc/self/mountinfo",
        "30 20 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n");
  Write("/sys/fs/cgroup/job/io.max", "254:0 rbps=700 wbps=max riops=max wiops=max\n");
  EXPECT_EQ(DiskLimit(), 700);
  EXPECT_EQ(PartitionLimit(), 0);
  Write("/sys/devices/vda/dev", "254:0\n");
  Write("/sys/devices/vda/vda1/partition", "1\n");
  fs::create_directories(root_ + "/sys/dev/block");
  fs::create_directory_symlink(root_ + "/sys/devices/vda/vda1", root_ + "/sys/dev/block/254:1");
  EXPECT_EQ(PartitionLimit(), 700);
  Write("/sys/fs/cgroup/job/io.max", "254:0 rbps=max wbps=100 riops=max wiops=max\n");
  EXPECT_EQ(DiskLimit(), 0);
}

}  // namespace
}  // namespace shoal
