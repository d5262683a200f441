// What `shoal doctor` concludes from the facts: pure functions, so that every illness can be tested
// without having it.
#pragma once

#include <string>
#include <vector>

#include "comm/link_bench.h"
#include "launcher/machine_facts.h"

namespace shoal {

struct Finding {
  bool wrong = false;  // else a remark: all works, but it could be better
  std::string what;
  std::string advice;  // what to do
};

// One host of a cluster, as it was asked for.
struct HostReport {
  std::string name;
  MachineFacts facts;       // valid when `unreachable` is empty
  std::string unreachable;  // why nothing is known
  std::string advice;       // what to do about that
};

struct DoctorReport {
  std::vector<HostReport> hosts;  // one without a name: this machine alone
  std::vector<LinkSpeed> links;
  std::vector<Finding> findings;
  bool healthy() const;
};

// Of one machine. `ranks_elsewhere`: it is one of several that work together.
std::vector<Finding> DiagnoseMachine(const MachineFacts& facts, bool ranks_elsewhere);
// What does not fit together, and who is missing.
std::vector<Finding> DiagnoseCluster(const std::vector<HostReport>& hosts);
std::vector<Finding> DiagnoseLinks(const std::vector<LinkSpeed>& links);

std::string DoctorText(const DoctorReport& report);
std::string DoctorJson(const DoctorReport& report);

}  // namespace shoal
