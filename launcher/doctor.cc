#include "launcher/doctor.h"

#include <algorithm>
#include <functional>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "fmt/format.h"
#include "launcher/machine_facts_json.h"
#include "offload/memory_budget.h"

namespace shoal {
namespace {

constexpr int64_t kGiB = int64_t{1} << 30;
constexpr int64_t kLockedBytes = int64_t{64} << 20;  // what a stream registers, roughly
constexpr double kSlowLink = 5;       // GB/s between host and GPU: less than eight lanes of PCIe 3
constexpr double kSlowDisk = 0.5;     // GB/s
constexpr double kSlowNetwork = 0.1;  // GB/s: below gigabit Ethernet
constexpr double kLongLatency = 500;  // us

using Findings = std::vector<Finding>;

void Wrong(Findings& f, std::string what, std::string advice) {
  f.push_back({true, std::move(what), std::move(advice)});
}
void Remark(Findings& f, std::string what, std::string advice) {
  f.push_back({false, std::move(what), std::move(advice)});
}

void DiagnoseCpuAndMemory(const MachineFacts& m, Findings& f) {
  if (!absl::StrContains(m.cpu.levels, "avx2")) {
    Wrong(
        f, "the CPU has no AVX2: it computes many times slower",
        "use a CPU from 2013 (Intel) or 2015 (AMD) on; in a virtual machine let the guest see the "
        "host's CPU");
  }
  const bool limited = !m.memory.bound.empty() && m.memory.bound != "MemAvailable";
  if (limited && m.memory.free_bytes < m.memory.total_bytes / 2) {
    Remark(
        f,
        absl::StrCat("the control group ", m.memory.bound, " leaves ",
                     FormatBytes(m.memory.free_bytes), " of this machine's ",
                     FormatBytes(m.memory.total_bytes)),
        "raise its memory limit (docker run --memory, systemd MemoryMax=) if the model is larger");
  } else if (m.memory.free_bytes < kGiB) {
    Wrong(f, absl::StrCat("only ", FormatBytes(m.memory.free_bytes), " of memory are free"),
          "end other programs, or keep to models that are smaller than that");
  }
  if (!m.why_no_io_uring.empty()) {
    Remark(f, absl::StrCat("io_uring cannot be used: ", m.why_no_io_uring),
           "streaming from disk uses threads instead and costs more CPU time; a container needs a "
           "seccomp profile that allows io_uring, a host sysctl kernel.io_uring_disabled=0");
  } else if (m.memory.memlock_bytes >= 0 && m.memory.memlock_bytes < kLockedBytes) {
    Remark(f,
           absl::StrCat("a process may lock ", FormatBytes(m.memory.memlock_bytes),
                        " of memory only, so streaming cannot register its buffers"),
           "ulimit -l unlimited, or memlock in /etc/security/limits.conf; docker run --ulimit "
           "memlock=-1");
  }
  if (m.memory.transparent_huge_pages == "never") {
    Remark(f, "transparent huge pages are off: large weights cost more time in address translation",
           "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled");
  }
}

void DiagnoseGpus(const MachineFacts& m, bool ranks_elsewhere, Findings& f) {
  const CudaFacts& c = m.cuda;
  if (c.gpus_on_bus > 0 && !c.built) {
    Wrong(f,
          absl::StrCat("this machine has ", c.gpus_on_bus,
                       " NVIDIA GPU(s), but this shoal was built without CUDA"),
          "cmake --preset cuda && cmake --build --preset cuda, or deploy/bundle --cuda");
  } else if (c.gpus_on_bus > 0 && c.gpus.empty()) {
    Wrong(f, absl::StrCat("no GPU can be used: ", c.why_none),
          "check that nvidia-smi lists it; in a container start it with --gpus all");
  } else if (c.built && c.gpus.empty()) {
    Remark(f, absl::StrCat("no GPU: ", c.why_none), "shoal computes on the CPU");
  }
  const bool wants_nccl = c.gpus.size() > 1 || (!c.gpus.empty() && ranks_elsewhere);
  if (wants_nccl && c.nccl.empty()) {
    Wrong(f, absl::StrCat("NCCL cannot be used: ", c.why_no_nccl),
          "apt-get install libnccl2 (NVIDIA's repository) or pip install nvidia-nccl-cu12 and set "
          "SHOAL_NCCL to its libnccl.so.2; without it sums travel through the host's memory");
  }
  for (const GpuFacts& g : c.gpus) {
    const double slowest = std::min(g.from_host_gbps, g.to_host_gbps);
    if (slowest > 0 && slowest < kSlowLink) {
      Remark(f, fmt::format("GPU {} moves only {:.1f} GB/s to and from memory", g.index, slowest),
             "put it into a slot with 16 lanes; streaming weights to it is slow");
    }
    if (g.free_bytes < g.total_bytes / 2) {
      Remark(f,
             absl::StrCat("GPU ", g.index, " has ", FormatBytes(g.free_bytes), " free of ",
                          FormatBytes(g.total_bytes)),
             "nvidia-smi shows which programs hold the rest");
    }
    if (c.gpus.size() > 1 && g.peers.size() + 1 < c.gpus.size()) {
      Remark(f, absl::StrCat("GPU ", g.index, " cannot reach the memory of all other GPUs"),
             "sums between them go through the host's memory; usual for consumer cards");
    }
  }
}

void DiagnoseMpi(const MachineFacts& m, Findings& f) {
  if (m.mpi.mpirun_version.empty()) {
    Wrong(f, absl::StrCat(m.mpi.mpirun, " does not run, so only one process can compute"),
          "apt-get install openmpi-bin, or use the archive of deploy/bundle, which has it inside; "
          "--in-process does without");
  } else if (m.mpi.mpirun_version != m.mpi.library_version) {
    Wrong(f,
          absl::StrCat(m.mpi.mpirun, " is of Open MPI ", m.mpi.mpirun_version,
                       ", but shoal runs with the library of ", m.mpi.library_version),
          "put the mpirun of that library first on PATH");
  }
}

// Names every host whose value differs from the first one's.
void Compare(const std::vector<const HostReport*>& hosts,
             const std::function<std::string(const MachineFacts&)>& value, const std::string& what,
             const std::string& advice, Findings& f) {
  if (hosts.empty()) return;
  const std::string first = value(hosts[0]->facts);
  for (const HostReport* h : hosts) {
    const std::string other = value(h->facts);
    if (other == first) continue;
    Wrong(f, absl::StrCat(h->name, " has ", what, " ", other, ", ", hosts[0]->name, " has ", first),
          advice);
  }
}

std::string Describe(const MachineFacts& m, const std::string& name) {
  std::string out = fmt::format("{}: shoal {} ({})\n", name.empty() ? m.host : name, m.version,
                                m.cuda.built ? "with CUDA" : "for CPUs");
  out += fmt::format("  CPU       {}: {} {}, {} NUMA {}; has {}; takes {}\n", m.cpu.name,
                     m.cpu.cores, m.cpu.cores == 1 ? "core" : "cores", m.cpu.numa_nodes,
                     m.cpu.numa_nodes == 1 ? "node" : "nodes", m.cpu.levels, m.cpu.level);
  out += fmt::format("  memory    {}, {} free by {}\n", FormatBytes(m.memory.total_bytes),
                     FormatBytes(m.memory.free_bytes), m.memory.bound);
  out += fmt::format(
      "            huge pages {} of {}, transparent: {}; may lock {}\n", m.memory.huge_pages,
      FormatBytes(m.memory.huge_page_bytes),
      m.memory.transparent_huge_pages.empty() ? "unknown" : m.memory.transparent_huge_pages,
      m.memory.memlock_bytes < 0 ? "all" : FormatBytes(m.memory.memlock_bytes));
  for (const GpuFacts& g : m.cuda.gpus) {
    out += fmt::format("  GPU {}     {}, compute capability {}, {}: {} free of {}\n", g.index,
                       g.name, g.compute_capability, g.pci, FormatBytes(g.free_bytes),
                       FormatBytes(g.total_bytes));
    out += fmt::format("            from memory {:.1f} GB/s, to memory {:.1f} GB/s; reaches {}\n",
                       g.from_host_gbps, g.to_host_gbps,
                       g.peers.empty() ? "no other GPU" : "GPU " + absl::StrJoin(g.peers, ", "));
  }
  if (m.cuda.gpus.empty()) {
    out += fmt::format("  GPU       none: {}\n", m.cuda.why_none);
  } else {
    out += fmt::format("  CUDA      driver for {}, runtime {}\n", m.cuda.driver, m.cuda.runtime);
  }
  out += m.cuda.nccl.empty() ? fmt::format("  NCCL      {}\n", m.cuda.why_no_nccl)
                             : fmt::format("  NCCL      {} ({})\n", m.cuda.nccl, m.cuda.nccl_path);
  out += fmt::format("  Open MPI  {}{}, library {}\n", m.mpi.mpirun,
                     m.mpi.mpirun_version.empty() ? " does not run" : " " + m.mpi.mpirun_version,
                     m.mpi.library_version);
  out += fmt::format("  io_uring  {}\n", m.why_no_io_uring.empty() ? "allowed" : m.why_no_io_uring);
  if (!m.disk.dir.empty() && m.disk.error.empty()) {
    out += fmt::format("  disk      {}: write {:.2f} GB/s, read {:.2f} GB/s ({}), {} free\n",
                       m.disk.dir, m.disk.write_gbps, m.disk.read_gbps, m.disk.how,
                       FormatBytes(m.disk.free_bytes));
  }
  if (!m.model.fingerprint.empty()) {
    out += fmt::format("  model     {}: {}\n", m.model.path, m.model.fingerprint);
  }
  return out;
}

}  // namespace

bool DoctorReport::healthy() const {
  return std::none_of(findings.begin(), findings.end(), [](const Finding& f) { return f.wrong; });
}

std::vector<Finding> DiagnoseMachine(const MachineFacts& m, bool ranks_elsewhere) {
  Findings f;
  DiagnoseCpuAndMemory(m, f);
  DiagnoseGpus(m, ranks_elsewhere, f);
  DiagnoseMpi(m, f);
  if (!m.disk.error.empty()) {
    Wrong(f, absl::StrCat("the disk under ", m.disk.dir, " could not be measured: ", m.disk.error),
          "give --dir a folder that can be written and has half a GiB free");
  } else if (m.disk.read_gbps > 0 && m.disk.read_gbps < kSlowDisk) {
    Remark(f, fmt::format("the disk under {} reads {:.2f} GB/s only", m.disk.dir, m.disk.read_gbps),
           "keep models that are larger than memory on an NVMe drive");
  }
  if (!m.model.error.empty()) {
    Wrong(f, absl::StrCat("the model cannot be read: ", m.model.error),
          "copy the file to the same path on every host");
  }
  return f;
}

std::vector<Finding> DiagnoseCluster(const std::vector<HostReport>& hosts) {
  Findings f;
  std::vector<const HostReport*> known;
  for (const HostReport& h : hosts) {
    if (h.unreachable.empty()) {
      known.push_back(&h);
    } else {
      Wrong(f, absl::StrCat(h.name, ": ", h.unreachable), h.advice);
    }
  }
  const std::string same_build = "copy the same archive or build to the same path on every host";
  const size_t before = f.size();
  Compare(
      known, [](const MachineFacts& m) { return m.version; }, "shoal", same_build, f);
  if (f.size() == before) {
    Compare(
        known, [](const MachineFacts& m) { return m.build; }, "another build of shoal:", same_build,
        f);
  }
  Compare(
      known, [](const MachineFacts& m) { return m.mpi.library_version; }, "Open MPI",
      "install the same version of Open MPI on every host, or use the archive of deploy/bundle", f);
  std::vector<const HostReport*> with_model;
  for (const HostReport* h : known) {
    if (!h->facts.model.fingerprint.empty()) with_model.push_back(h);
  }
  Compare(
      with_model, [](const MachineFacts& m) { return m.model.fingerprint; },
      "another model:", "copy the same model file to every host", f);
  return f;
}

std::vector<Finding> DiagnoseLinks(const std::vector<LinkSpeed>& links) {
  Findings f;
  for (const LinkSpeed& l : links) {
    if (l.bandwidth_gbps >= kSlowNetwork && l.latency_us <= kLongLatency) continue;
    Remark(f,
           fmt::format("{} and {} are far apart: {:.0f} us, {:.3f} GB/s", l.from_host, l.to_host,
                       l.latency_us, l.bandwidth_gbps),
           "connect them by wire (gigabit or better), or split the model with --pp, which sends "
           "least");
  }
  return f;
}

std::string DoctorText(const DoctorReport& report) {
  std::string out;
  for (const HostReport& h : report.hosts) {
    out += h.unreachable.empty() ? Describe(h.facts, h.name)
                                 : fmt::format("{}: nothing known\n", h.name);
  }
  for (const LinkSpeed& l : report.links) {
    out += fmt::format("{} - {}: latency {:.1f} us, bandwidth {:.3f} GB/s\n", l.from_host,
                       l.to_host, l.latency_us, l.bandwidth_gbps);
  }
  for (const Finding& f : report.findings) {
    out += fmt::format("\n{}: {}\n  {}\n", f.wrong ? "WRONG" : "remark", f.what, f.advice);
  }
  const auto wrong = std::count_if(report.findings.begin(), report.findings.end(),
                                   [](const Finding& f) { return f.wrong; });
  out += wrong == 0
             ? "\nNothing is wrong.\n"
             : fmt::format("\n{} {} wrong.\n", wrong, wrong == 1 ? "thing is" : "things are");
  return out;
}

std::string DoctorJson(const DoctorReport& report) {
  using Json = nlohmann::json;
  Json hosts = Json::array(), links = Json::array(), findings = Json::array();
  for (const HostReport& h : report.hosts) {
    Json host = {{"name", h.name}};
    if (h.unreachable.empty()) {
      host["facts"] = h.facts;
    } else {
      host["unreachable"] = h.unreachable;
    }
    hosts.push_back(std::move(host));
  }
  for (const LinkSpeed& l : report.links) {
    links.push_back({{"from", l.from_host},
                     {"to", l.to_host},
                     {"latency_us", l.latency_us},
                     {"bandwidth_gbps", l.bandwidth_gbps}});
  }
  for (const Finding& f : report.findings) {
    findings.push_back({{"wrong", f.wrong}, {"what", f.what}, {"advice", f.advice}});
  }
  const Json json = {{"healthy", report.healthy()},
                     {"hosts", std::move(hosts)},
                     {"links", std::move(links)},
                     {"findings", std::move(findings)}};
  return json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

}  // namespace shoal
