// shoal doctor: what is wrong with this machine or these hosts, and what to do about it.
//
// Each host is asked by ssh to run this program with --facts and to print what it finds; then, when
// all answered alike, one rank on each measures the network between them.
#include <arpa/inet.h>
#include <netdb.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "comm/link_bench.h"
#include "comm/net_interface.h"
#include "kernels/status_macros.h"
#include "launcher/captured_run.h"
#include "launcher/commands.h"
#include "launcher/doctor.h"
#include "launcher/exit_code.h"
#include "launcher/machine_facts.h"
#include "launcher/mpirun.h"
#include "launcher/world.h"
#include "nlohmann/json.hpp"

namespace shoal {
namespace {

using Json = nlohmann::json;

constexpr absl::Duration kHostTimeout = absl::Minutes(2);
constexpr absl::Duration kLinksTimeout = absl::Minutes(3);

struct DoctorFlags {
  FactsRequest facts;
  std::string hostfile, hosts, net;
  std::string output = "text";
  bool facts_only = false;  // what a host is asked for by ssh
  int links = 0;            // ranks of the job that measures the network
};

// A word of the command line of the shell on another host.
std::string Quoted(const std::string& word) {
  return absl::StrCat("'", absl::StrReplaceAll(word, {{"'", "'\\''"}}), "'");
}

bool IsThisMachine(const std::string& name) {
  char own[256] = "";
  gethostname(own, sizeof own - 1);
  if (name == own || name == "localhost" || name.rfind("127.", 0) == 0) return true;
  addrinfo hints{};
  hints.ai_family = AF_INET;
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (getaddrinfo(name.c_str(), nullptr, &hints, &found) != 0) return false;
  char text[INET_ADDRSTRLEN] = "";
  inet_ntop(AF_INET, &reinterpret_cast<sockaddr_in*>(found->ai_addr)->sin_addr, text, sizeof text);
  freeaddrinfo(found);
  const absl::StatusOr<std::vector<NetInterface>> mine = ListInterfaces();
  return mine.ok() && std::any_of(mine->begin(), mine->end(),
                                  [&](const NetInterface& i) { return i.address == text; });
}

std::string LastLine(const std::string& text) {
  const size_t end = text.find_last_not_of(" \r\n");
  if (end == std::string::npos) return "it said nothing";
  const size_t begin = text.find_last_of('\n', end);
  return text.substr(begin == std::string::npos ? 0 : begin + 1,
                     end - (begin == std::string::npos ? 0 : begin + 1) + 1);
}

void AskOverSsh(const DoctorFlags& flags, const std::string& program, HostReport& host) {
  std::string command = absl::StrCat(Quoted(program), " doctor --facts");
  if (!flags.facts.dir.empty()) absl::StrAppend(&command, " --dir ", Quoted(flags.facts.dir));
  if (!flags.facts.model.empty()) absl::StrAppend(&command, " -m ", Quoted(flags.facts.model));
  const absl::StatusOr<CapturedRun> run = RunCaptured(
      {"ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=8", host.name, command}, kHostTimeout);
  if (!run.ok()) {
    host.unreachable = absl::StrCat("it could not be asked: ", run.status().message());
    host.advice = "apt-get install openssh-client on this machine, and openssh-server on that one";
    return;
  }
  const std::string same_path = absl::StrCat("copy this build to ", program, " on it");
  if (run->exit_code == 255) {
    host.unreachable = absl::StrCat("ssh does not reach it: ", LastLine(run->err));
    host.advice = absl::StrCat("make 'ssh ", host.name,
                               " true' work without a password: ssh-copy-id ", host.name);
  } else if (run->exit_code == 126 || run->exit_code == 127) {
    host.unreachable = absl::StrCat("shoal does not start there: ", LastLine(run->err));
    host.advice = same_path;
  } else if (run->exit_code != kExitOk) {
    host.unreachable = absl::StrCat("its shoal is another one (exit code ", run->exit_code,
                                    "): ", LastLine(run->err));
    host.advice = same_path;
  } else if (absl::StatusOr<MachineFacts> facts = FactsFromJson(run->out); facts.ok()) {
    host.facts = *std::move(facts);
  } else {
    host.unreachable = "its answer is not one of shoal doctor: " + LastLine(run->out);
    host.advice = absl::StrCat("its login scripts must print nothing; else ", same_path);
  }
}

std::vector<HostReport> AskAll(const DoctorFlags& flags, const std::string& program,
                               const std::vector<std::string>& names) {
  std::vector<HostReport> hosts(names.size());
  std::vector<std::thread> threads;
  for (size_t i = 0; i < names.size(); ++i) {
    hosts[i].name = names[i];
    threads.emplace_back([&flags, &program, &host = hosts[i]] {
      if (IsThisMachine(host.name)) {
        host.facts = GatherFacts(flags.facts);
      } else {
        AskOverSsh(flags, program, host);
      }
    });
  }
  for (std::thread& t : threads) t.join();
  return hosts;
}

// What a rank of the measuring job does.
absl::Status MeasureLinks(const DoctorFlags& flags, CommandLine& line) {
  WorldOptions options;
  options.tp = flags.links;
  options.hostfile = flags.hostfile;
  options.hosts = flags.hosts;
  options.net = flags.net;
  options.ranks_per_host = 1;
  SHOAL_ASSIGN_OR_RETURN(const std::optional<int> launched,
                         MaybeLaunchRanks(options, line.argc, line.argv));
  if (launched.has_value()) {
    line.exit_code = *launched;
    return absl::OkStatus();
  }
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<Communicator> world, OpenWorld(options));
  SHOAL_ASSIGN_OR_RETURN(const std::vector<LinkSpeed> links, RunLinkBench(*world));
  if (world->rank() != 0) return absl::OkStatus();
  Json json = Json::array();
  for (const LinkSpeed& l : links) json.push_back({l.from, l.to, l.latency_us, l.bandwidth_gbps});
  std::puts(json.dump().c_str());
  return absl::OkStatus();
}

// Runs that job and reads what it prints. Hosts are named as the user named them.
absl::StatusOr<std::vector<LinkSpeed>> LinksOf(const DoctorFlags& flags, const std::string& program,
                                               const std::vector<HostReport>& hosts) {
  std::vector<std::string> command = {program, "doctor", "--links", absl::StrCat(hosts.size())};
  const auto add = [&command](const char* flag, const std::string& value) {
    if (!value.empty()) command.insert(command.end(), {flag, value});
  };
  add("--hostfile", flags.hostfile);
  add("--host", flags.hosts);
  add("--net", flags.net);
  SHOAL_ASSIGN_OR_RETURN(const CapturedRun run, RunCaptured(command, kLinksTimeout));
  const Json json = Json::parse(run.out, nullptr, /*allow_exceptions=*/false);
  if (run.exit_code != kExitOk || !json.is_array()) {
    return absl::UnavailableError(run.err.empty() ? run.out : run.err);
  }
  std::vector<LinkSpeed> links;
  for (const Json& l : json) {
    LinkSpeed speed;
    speed.from = l.at(0).get<int>();
    speed.to = l.at(1).get<int>();
    speed.from_host = hosts.at(speed.from).name;
    speed.to_host = hosts.at(speed.to).name;
    speed.latency_us = l.at(2).get<double>();
    speed.bandwidth_gbps = l.at(3).get<double>();
    links.push_back(std::move(speed));
  }
  return links;
}

void Append(std::vector<Finding>& to, std::vector<Finding> from, const std::string& host) {
  for (Finding& f : from) {
    if (!host.empty()) f.what = absl::StrCat(host, ": ", f.what);
    to.push_back(std::move(f));
  }
}

absl::StatusOr<DoctorReport> Examine(const DoctorFlags& flags) {
  DoctorReport report;
  MpirunJob job;
  job.hostfile = flags.hostfile;
  job.hosts = flags.hosts;
  const absl::StatusOr<HostPlan> plan = PlanHosts(job);
  if (!plan.ok()) {
    return WithExitCode(plan.status(), absl::IsNotFound(plan.status()) ? kExitNoInput : kExitUsage);
  }
  if (plan->hosts.empty()) {
    report.hosts.push_back({"", GatherFacts(flags.facts), "", ""});
    report.findings = DiagnoseMachine(report.hosts[0].facts, /*ranks_elsewhere=*/false);
    return report;
  }
  SHOAL_ASSIGN_OR_RETURN(const std::string program, ThisProgram());
  report.hosts = AskAll(flags, program, plan->hosts);
  for (const HostReport& h : report.hosts) {
    if (h.unreachable.empty()) {
      Append(report.findings, DiagnoseMachine(h.facts, plan->hosts.size() > 1), h.name);
    }
  }
  const std::vector<Finding> together = DiagnoseCluster(report.hosts);
  Append(report.findings, together, "");
  const bool mpi = std::all_of(report.hosts.begin(), report.hosts.end(), [](const HostReport& h) {
    return !h.facts.mpi.mpirun_version.empty();
  });
  if (report.hosts.size() < 2 || !together.empty() || !mpi) return report;
  absl::StatusOr<std::vector<LinkSpeed>> links = LinksOf(flags, program, report.hosts);
  if (links.ok()) {
    report.links = *std::move(links);
    Append(report.findings, DiagnoseLinks(report.links), "");
  } else {
    report.findings.push_back(
        {true, absl::StrCat("the hosts do not find each other: ", links.status().message()),
         "check that their firewalls let them talk, or choose another network with --net"});
  }
  return report;
}

void Run(const DoctorFlags& flags, CommandLine& line) {
  if (flags.facts_only) {
    std::puts(FactsToJson(GatherFacts(flags.facts)).c_str());
    return;
  }
  if (flags.links > 0) {
    if (const absl::Status s = MeasureLinks(flags, line); !s.ok()) line.exit_code = ReportError(s);
    return;
  }
  const absl::StatusOr<DoctorReport> report = Examine(flags);
  if (!report.ok()) {
    line.exit_code = ReportError(report.status());
    return;
  }
  std::fputs((flags.output == "json" ? DoctorJson(*report) : DoctorText(*report)).c_str(), stdout);
  line.exit_code = report->healthy() ? kExitOk : kExitConfig;
}

}  // namespace

void AddDoctorCommand(CLI::App& app, CommandLine& line) {
  auto flags = std::make_shared<DoctorFlags>();
  CLI::App* doctor = app.add_subcommand(
      "doctor", "what is wrong with this machine, or with several, and what to do about it");
  doctor->add_option("--dir", flags->facts.dir, "measure the disk under this folder");
  doctor->add_option("-m,--model", flags->facts.model,
                     "model file: is it there, and the same on every host?");
  doctor->add_option("--hostfile", flags->hostfile, "hosts to examine, as mpirun reads it");
  doctor->add_option("--host", flags->hosts, "hosts to examine, such as pc1,pc2");
  doctor->add_option("--net", flags->net, "network interface or subnet that the ranks talk over");
  doctor->add_option("-o,--output", flags->output, "text or json")
      ->check(CLI::IsMember({"text", "json"}));
  // For its own use on the other hosts: no group, so that the help does not show them.
  doctor->add_flag("--facts", flags->facts_only)->group("");
  doctor->add_option("--links", flags->links)->group("")->check(CLI::Range(2, 1024));
  doctor->callback([flags, &line] { Run(*flags, line); });
}

}  // namespace shoal
