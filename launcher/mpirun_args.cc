// mpirun's command line: what one has to know so that it just works.
#include <algorithm>
#include <fstream>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "launcher/mpirun.h"

namespace shoal {
namespace {

void Mca(std::vector<std::string>& argv, std::string name, std::string value) {
  argv.insert(argv.end(), {"--mca", std::move(name), std::move(value)});
}

struct HostList {
  std::vector<std::string> names;
  std::vector<int> slots;  // 1 where none are given
  bool gives_slots = false;

  void Add(const std::string& name, int more) {
    const auto it = std::find(names.begin(), names.end(), name);
    if (it != names.end()) {
      slots[it - names.begin()] += more;
    } else {
      names.push_back(name);
      slots.push_back(more);
    }
  }
};

// What mpirun makes of nonsense it says itself.
int SlotsIn(const std::string& text) {
  int slots = 0;
  return absl::SimpleAtoi(text, &slots) && slots > 0 ? slots : 1;
}

absl::StatusOr<HostList> ReadHosts(const MpirunJob& job) {
  HostList list;
  if (!job.hosts.empty()) {
    const std::vector<std::string> hosts = absl::StrSplit(job.hosts, ',', absl::SkipWhitespace());
    for (const std::string& host : hosts) {
      const size_t colon = host.find(':');
      list.gives_slots |= colon != std::string::npos;
      list.Add(host.substr(0, colon),
               colon != std::string::npos ? SlotsIn(host.substr(colon + 1)) : 1);
    }
    return list;
  }
  std::ifstream file(job.hostfile);
  if (!file) {
    return absl::NotFoundError(absl::StrCat("cannot read the host file ", job.hostfile));
  }
  std::string line;
  while (std::getline(file, line)) {
    line = line.substr(0, line.find('#'));
    const std::vector<std::string> words =
        absl::StrSplit(line, absl::ByAnyChar(" \t\r"), absl::SkipEmpty());
    if (words.empty()) continue;
    int slots = 1;
    for (const std::string& word : words) {
      if (word.rfind("slots=", 0) == 0) slots = SlotsIn(word.substr(6));
    }
    list.Add(words[0], slots);
    list.gives_slots |= line.find("slots") != std::string::npos;
  }
  return list;
}

}  // namespace

absl::StatusOr<HostPlan> PlanHosts(const MpirunJob& job) {
  if (job.hosts.empty() && job.hostfile.empty()) return HostPlan{};
  if (!job.hosts.empty() && !job.hostfile.empty()) {
    return absl::InvalidArgumentError("give the hosts once: --host or --hostfile, not both");
  }
  absl::StatusOr<HostList> list = ReadHosts(job);
  if (!list.ok()) return list.status();
  const int hosts = static_cast<int>(list->names.size());
  if (hosts == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(job.hosts.empty() ? job.hostfile : std::string("--host"),
                     " names no host; write one per line, or a list such as --host a,b"));
  }
  if (list->gives_slots) return HostPlan{list->names, list->slots, 0};
  const int each = (job.ranks + hosts - 1) / hosts;
  return HostPlan{list->names, std::vector<int>(hosts, each), each};
}

std::vector<std::string> MpirunArguments(const MpirunJob& job, const MpirunHost& host,
                                         int ranks_per_host) {
  std::vector<std::string> argv = {host.program, "-np", absl::StrCat(job.ranks)};
  if (host.is_root) argv.push_back("--allow-run-as-root");
  // Ranks share the cores themselves; mpirun would count them its own way, and refuse or pin.
  argv.insert(argv.end(), {"--oversubscribe", "--bind-to", "none"});
  if (!job.hostfile.empty()) argv.insert(argv.end(), {"--hostfile", job.hostfile});
  if (!job.hosts.empty()) argv.insert(argv.end(), {"--host", job.hosts});
  if (ranks_per_host > 0) {
    // Neighbours in rank are neighbours on a host, so that tensor parallelism stays inside it.
    argv.insert(argv.end(), {"--map-by", absl::StrCat("ppr:", ranks_per_host, ":node")});
  }
  if (host.subnet.empty()) {
    Mca(argv, "btl", "self,vader");  // shared memory: no card to choose wrongly
    Mca(argv, "oob_tcp_if_include", "lo");
    // Else Open MPI wants ssh, though there is no host to reach.
    if (job.hosts.empty() && job.hostfile.empty()) Mca(argv, "plm", "isolated");
  } else {
    Mca(argv, "btl_tcp_if_include", host.subnet);
    Mca(argv, "oob_tcp_if_include", host.subnet);
    // A password prompt or a dead host would wait for ever; and this host alone needs keys for the
    // others.
    Mca(argv, "plm_rsh_args", "-o BatchMode=yes -o ConnectTimeout=8");
    Mca(argv, "plm_rsh_no_tree_spawn", "1");
  }
  // A token's partial sums (8 KiB at dim 2048) go without a handshake: beyond the default of 4 KiB
  // their sum takes twice as long.
  Mca(argv, "btl_vader_eager_limit", "32768");
  if (!host.can_read_peers) Mca(argv, "btl_vader_single_copy_mechanism", "none");
  Mca(argv, "opal_signal", "");  // no stack trace of Open MPI's own over a rank's end
  Mca(argv, "btl_base_warn_component_unused", "0");
  for (const std::string& name : host.environment) argv.insert(argv.end(), {"-x", name});
  argv.insert(argv.end(), job.command.begin(), job.command.end());
  return argv;
}

}  // namespace shoal
