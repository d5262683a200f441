#include "launcher/fewer_hosts.h"

#include <gtest/gtest.h>
#include <stdlib.h>

#include <fstream>
#include <string>
#include <vector>

#include "tests/shard/temp_dir.h"

namespace shoal {
namespace {

TEST(FewerHosts, StagesGoBeforeTensorParallelRanks) {
  const JobPlacement job{2, 3, {{"a", 2}, {"b", 2}, {"c", 2}}};
  absl::StatusOr<JobPlacement> fewer = PlaceOnFewer(job, {true, false, true});
  ASSERT_TRUE(fewer.ok()) << fewer.status();
  EXPECT_EQ(fewer->tp, 2);
  EXPECT_EQ(fewer->pp, 2);
  EXPECT_EQ(fewer->hosts, (std::vector<JobHost>{{"a", 2}, {"c", 2}}));

  fewer = PlaceOnFewer({4, 1, {{"a", 1}, {"b", 1}, {"c", 1}, {"d", 1}}}, {true, true, true, false});
  ASSERT_TRUE(fewer.ok()) << fewer.status();
  EXPECT_EQ(fewer->tp, 3) << "any number of ranks shares a layer";
  EXPECT_EQ(fewer->pp, 1);

  fewer = PlaceOnFewer({2, 2, {{"a", 1}, {"b", 3}}}, {true, false});
  ASSERT_TRUE(fewer.ok()) << fewer.status();
  EXPECT_EQ(fewer->tp * fewer->pp, 1);
}

TEST(FewerHosts, NoMoreRanksThanThereWere) {
  const absl::StatusOr<JobPlacement> fewer =
      PlaceOnFewer({2, 1, {{"a", 8}, {"b", 8}}}, {true, false});
  ASSERT_TRUE(fewer.ok()) << fewer.status();
  EXPECT_EQ(fewer->tp, 2);
  EXPECT_EQ(fewer->pp, 1);
}

TEST(FewerHosts, NobodyLeftIsAnError) {
  EXPECT_EQ(PlaceOnFewer({2, 1, {{"a", 1}, {"b", 1}}}, {false, false}).status().code(),
            absl::StatusCode::kUnavailable);
}

TEST(FewerHosts, AskedAreTheOthersByTheRemoteShellOfMpirun) {
  const TempDir dir;
  const std::string agent = dir.path() + "/agent";
  // Host 203.0.113.1 answers, 203.0.113.2 refuses, 203.0.113.3 hangs.
  std::ofstream(agent) << "#!/bin/sh\n"
                          "shift 4\n"  // -o BatchMode=yes -o ConnectTimeout=8
                          "case \"$1\" in\n"
                          "203.0.113.1) [ \"$2\" = true ] ;;\n"
                          "203.0.113.2) exit 255 ;;\n"
                          "*) exec sleep 600 ;;\n"
                          "esac\n";
  ASSERT_EQ(system(("chmod +x " + agent).c_str()), 0);
  ASSERT_EQ(setenv("OMPI_MCA_plm_rsh_agent", agent.c_str(), 1), 0);
  const std::vector<bool> answers =
      AskHosts({{"127.0.0.1", 1}, {"203.0.113.1", 1}, {"203.0.113.2", 1}, {"203.0.113.3", 1}},
               absl::Seconds(2));
  EXPECT_EQ(answers, (std::vector<bool>{true, true, false, false}));
}

}  // namespace
}  // namespace shoal
