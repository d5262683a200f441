#include "launcher/world.h"

#include <sys/uio.h>
#include <unistd.h>

#include <climits>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "comm/net_interface.h"
#include "kernels/status_macros.h"
#include "launcher/exit_code.h"
#include "launcher/mpirun.h"

extern char** environ;

namespace shoal {
namespace {

// Set for the ranks by the process that starts mpirun: which of 0, 1 and 2 are the user's terminal.
constexpr char kTerminals[] = "SHOAL_TERMINALS";
// Set for the ranks that this program started by way of mpirun.
constexpr char kLaunched[] = "SHOAL_LAUNCHED";
// The network that was chosen for the job.
constexpr char kNet[] = "SHOAL_NET";

int EnvironmentNumber(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  int number = 0;
  return text != nullptr && absl::SimpleAtoi(text, &number) ? number : otherwise;
}

// Containers often forbid a process to read another's memory, and Open MPI finds out too late.
bool CanReadPeers() {
  char from = 1, to = 0;
  const iovec source{&from, 1}, destination{&to, 1};
  return process_vm_readv(getpid(), &destination, 1, &source, 1, 0) == 1;
}

std::vector<std::string> EnvironmentForRanks() {
  std::vector<std::string> names;
  for (char** variable = environ; *variable != nullptr; ++variable) {
    const std::string_view text = *variable;
    const std::string name(text.substr(0, text.find('=')));
    if (name.rfind("SHOAL_", 0) == 0 || name == "NO_COLOR") names.push_back(name);
  }
  return names;
}

// The network that leads to the job's hosts; empty when they are all this machine.
absl::StatusOr<std::string> ChooseSubnet(const HostPlan& plan, const std::string& wanted) {
  SHOAL_ASSIGN_OR_RETURN(std::vector<NetInterface> interfaces, ListInterfaces());
  if (wanted.empty()) {
    const std::optional<NetInterface> towards = InterfaceTowards(interfaces, plan.hosts);
    return towards.has_value() ? towards->subnet : std::string();
  }
  absl::StatusOr<NetInterface> chosen = ChooseInterface(interfaces, wanted);
  if (!chosen.ok()) return WithExitCode(chosen.status(), kExitUsage);
  return chosen->subnet;
}

}  // namespace

absl::StatusOr<std::string> ThisProgram() {
  char path[PATH_MAX];
  const ssize_t n = readlink("/proc/self/exe", path, sizeof path);
  if (n < 0) return absl::InternalError("/proc/self/exe cannot be read: is /proc mounted?");
  return std::string(path, n);
}

std::string MpirunFor(const std::string& program) {
  std::string beside = absl::StrCat(program.substr(0, program.rfind('/')), "/mpirun");
  return access(beside.c_str(), X_OK) == 0 ? beside : "mpirun";
}

bool IsMpiRank() { return std::getenv("OMPI_COMM_WORLD_SIZE") != nullptr; }
int MpiWorldSize() { return EnvironmentNumber("OMPI_COMM_WORLD_SIZE", 1); }
int LocalRank() { return EnvironmentNumber("OMPI_COMM_WORLD_LOCAL_RANK", 0); }
int LocalSize() { return EnvironmentNumber("OMPI_COMM_WORLD_LOCAL_SIZE", 1); }

bool IsTerminal(int fd) {
  if (!IsMpiRank()) return isatty(fd) != 0;
  const char* const terminals = std::getenv(kTerminals);
  return terminals != nullptr && EnvironmentNumber("OMPI_COMM_WORLD_RANK", 0) == 0 &&
         std::string_view(terminals).find(static_cast<char>('0' + fd)) != std::string_view::npos;
}

absl::Status CheckWorldOptions(const WorldOptions& options, bool in_process) {
  const bool one_process = in_process || options.tp * options.pp == 1;
  if (one_process && !(options.hosts.empty() && options.hostfile.empty())) {
    return UsageError(absl::StrCat(
        options.hosts.empty() ? "--hostfile " + options.hostfile : "--host " + options.hosts,
        in_process ? ": --in-process keeps all ranks in this process; leave one of the two away"
                   : ": one rank runs on this host alone; say with --tp or --pp how many ranks to "
                     "start"));
  }
  if (options.net.empty()) return absl::OkStatus();
  SHOAL_ASSIGN_OR_RETURN(const std::vector<NetInterface> interfaces, ListInterfaces());
  return WithExitCode(ChooseInterface(interfaces, options.net).status(), kExitUsage);
}

absl::StatusOr<std::optional<int>> MaybeLaunchRanks(const WorldOptions& options, int argc,
                                                    char** argv) {
  const int ranks = options.tp * options.pp;
  if (IsMpiRank() || ranks == 1) return std::optional<int>();

  MpirunJob job{ranks, options.hostfile, options.hosts, options.net, {}};
  SHOAL_ASSIGN_OR_RETURN(std::string program, ThisProgram());
  job.command.push_back(std::move(program));
  for (int i = 1; i < argc; ++i) job.command.push_back(argv[i]);

  absl::StatusOr<HostPlan> plan = PlanHosts(job);
  if (!plan.ok()) {
    return WithExitCode(plan.status(), absl::IsNotFound(plan.status()) ? kExitNoInput : kExitUsage);
  }
  if (options.ranks_per_host > 0) plan->ranks_per_host = options.ranks_per_host;
  MpirunHost host;
  host.program = MpirunFor(job.command.front());
  host.is_root = geteuid() == 0;
  host.can_read_peers = CanReadPeers();
  if (!plan->hosts.empty()) {
    SHOAL_ASSIGN_OR_RETURN(host.subnet, ChooseSubnet(*plan, job.net));
    if (!host.subnet.empty()) setenv(kNet, host.subnet.c_str(), 1);
  }
  std::string terminals;
  for (int fd = 0; fd <= 2; ++fd) {
    if (isatty(fd) != 0) absl::StrAppend(&terminals, fd);
  }
  setenv(kTerminals, terminals.c_str(), 1);
  setenv(kLaunched, "1", 1);
  host.environment = EnvironmentForRanks();

  absl::StatusOr<int> code = RunMpirun(MpirunArguments(job, host, plan->ranks_per_host));
  if (!code.ok()) return WithExitCode(code.status(), kExitUnavailable);
  return std::optional<int>(*code);
}

absl::StatusOr<std::unique_ptr<Communicator>> OpenWorld(const WorldOptions& options) {
  const int wanted = options.tp * options.pp, started = MpiWorldSize();
  if (wanted != started) {
    return WithExitCode(absl::InvalidArgumentError(absl::StrCat(
                            "mpirun started ", started, started == 1 ? " rank" : " ranks",
                            ", but --tp ", options.tp, " x --pp ", options.pp, " makes ", wanted,
                            ": use mpirun -np ", wanted, ", or flags whose product is ", started,
                            ", or leave mpirun away and let shoal start the ranks")),
                        kExitUsage);
  }
  if (wanted == 1) return MakeSelfCommunicator();
  MpiOptions mpi;
  // The name of a card may be another one on another host; the subnet that was chosen is not.
  const char* const chosen = std::getenv(kLaunched) != nullptr ? std::getenv(kNet) : nullptr;
  mpi.net = chosen != nullptr ? chosen : options.net;
  mpi.on_peer_lost = EndProcessOnPeerLoss;
  SHOAL_ASSIGN_OR_RETURN(std::unique_ptr<Communicator> world, MakeMpiCommunicator(mpi));
  if (world->rank() == 0 && std::getenv(kLaunched) != nullptr) AnnounceStart();
  return world;
}

}  // namespace shoal
