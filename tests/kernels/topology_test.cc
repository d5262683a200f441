#include "kernels/cpu/topology.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <hwloc.h>

#include <vector>

namespace shoal {
namespace {

using testing::ElementsAre;

// A machine that is only described: hwloc's words for it, such as "numa:2 core:2 pu:2".
class Described : public testing::Test {
 protected:
  void Describe(const char* words) {
    ASSERT_EQ(hwloc_topology_init(&topology_), 0);
    ASSERT_EQ(hwloc_topology_set_synthetic(topology_, words), 0);
    ASSERT_EQ(hwloc_topology_load(topology_), 0);
  }
  void SetEfficiency(std::vector<int> cpus, int efficiency) {
    hwloc_bitmap_t set = hwloc_bitmap_alloc();
    for (int cpu : cpus) hwloc_bitmap_set(set, cpu);
    ASSERT_EQ(hwloc_cpukinds_register(topology_, set, efficiency, 0, nullptr, 0), 0);
    hwloc_bitmap_free(set);
  }
  ~Described() override {
    if (topology_ != nullptr) hwloc_topology_destroy(topology_);
  }

  hwloc_topology_t topology_ = nullptr;
};

TEST_F(Described, OneHardwareThreadOfEachCoreIsTaken) {
  Describe("core:3 pu:2");
  EXPECT_THAT(CoresInOrder(topology_, {0, 1, 2, 3, 4, 5}), ElementsAre(0, 2, 4));
  EXPECT_THAT(CoresInOrder(topology_, {1, 2, 3}), ElementsAre(1, 2));
  EXPECT_THAT(CoresInOrder(topology_, {}), ElementsAre());
}

TEST_F(Described, FastCoresComeFirst) {
  Describe("core:4 pu:1");
  SetEfficiency({0, 1}, 0);
  SetEfficiency({2, 3}, 1);
  EXPECT_THAT(CoresInOrder(topology_, {0, 1, 2, 3}), ElementsAre(2, 3, 0, 1));
}

TEST_F(Described, CoresOfANodeStandTogether) {
  Describe("numa:2 core:2 pu:1(indexes=0,2,1,3)");  // node 0 has CPUs 0 and 2
  EXPECT_THAT(CoresInOrder(topology_, {0, 1, 2, 3}), ElementsAre(0, 2, 1, 3));
}

TEST(UsableCores, AreThere) { EXPECT_FALSE(UsableCores().empty()); }

}  // namespace
}  // namespace shoal
