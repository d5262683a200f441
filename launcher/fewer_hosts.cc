#include "launcher/fewer_hosts.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <optional>

#include "absl/status/status.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "comm/net_interface.h"
#include "launcher/process_tree.h"

namespace shoal {
namespace {

constexpr unsigned kPauseUs = 10'000;

// The command that runs `true` on a host.
std::vector<std::string> Question(const std::string& host) {
  const char* const agent = std::getenv("OMPI_MCA_plm_rsh_agent");
  std::vector<std::string> command = {"/usr/bin/env"};
  for (const absl::string_view word :
       absl::StrSplit(agent != nullptr ? agent : "ssh", ' ', absl::SkipEmpty())) {
    command.emplace_back(word);
  }
  command.insert(command.end(), {"-o", "BatchMode=yes", "-o", "ConnectTimeout=8", host, "true"});
  return command;
}

}  // namespace

std::vector<bool> AskHosts(const std::vector<JobHost>& hosts, absl::Duration timeout) {
  const absl::Time end = absl::Now() + timeout;
  const absl::StatusOr<std::vector<NetInterface>> interfaces = ListInterfaces();
  std::vector<bool> answers(hosts.size(), false);
  std::vector<ChildProcess> asking(hosts.size());
  for (size_t i = 0; i < hosts.size(); ++i) {
    if (interfaces.ok() && IsThisMachine(*interfaces, hosts[i].name)) {
      answers[i] = true;
      continue;
    }
    absl::StatusOr<ChildProcess> child = StartProcess(Question(hosts[i].name));
    if (child.ok()) asking[i] = *child;
  }
  for (bool waiting = true; waiting;) {
    waiting = false;
    const bool late = absl::Now() >= end;
    for (size_t i = 0; i < hosts.size(); ++i) {
      ChildProcess& child = asking[i];
      if (child.pid <= 0) continue;
      if (late) kill(-child.pid, SIGKILL);  // it leads a session of its own
      int status = 0;
      const pid_t ended = waitpid(child.pid, &status, late ? 0 : WNOHANG);
      if (ended == 0) {
        waiting = true;
        continue;
      }
      answers[i] = ended == child.pid && WIFEXITED(status) && WEXITSTATUS(status) == 0;
      close(child.output_fd);
      child = {};
    }
    if (waiting) usleep(kPauseUs);
  }
  return answers;
}

absl::StatusOr<JobPlacement> PlaceOnFewer(const JobPlacement& job,
                                          const std::vector<bool>& answers) {
  JobPlacement fewer;
  int room = 0;
  for (size_t i = 0; i < job.hosts.size(); ++i) {
    if (!answers[i]) continue;
    fewer.hosts.push_back(job.hosts[i]);
    room += job.hosts[i].ranks;
  }
  if (room == 0) return absl::UnavailableError("none of the job's hosts answers");
  fewer.tp = std::min(job.tp, room);
  fewer.pp = std::min(job.pp, room / fewer.tp);
  return fewer;
}

}  // namespace shoal
