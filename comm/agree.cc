#include "comm/agree.h"

#include <cstdio>
#include <vector>

#include "kernels/status_macros.h"

namespace shoal {

absl::StatusOr<bool> AllAgree(Communicator& host, const absl::Status& mine, std::string* why_not) {
  struct Answer {
    bool ok = true;
    char why_not[255] = {};
  };
  Answer answer;
  answer.ok = mine.ok();
  std::snprintf(answer.why_not, sizeof answer.why_not, "%s", std::string(mine.message()).c_str());
  std::vector<Answer> all(host.size());
  SHOAL_RETURN_IF_ERROR(host.AllGather(&answer, sizeof answer, all.data()));
  for (const Answer& a : all) {
    if (a.ok) continue;
    *why_not = a.why_not;
    return false;
  }
  return true;
}

}  // namespace shoal
