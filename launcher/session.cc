#include "launcher/session.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <optional>
#include <thread>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "comm/net_interface.h"
#include "comm/wire.h"
#include "comm/wire_choice.h"
#include "fmt/format.h"
#include "kernels/cpu/topology.h"
#include "kernels/status_macros.h"
#include "launcher/demo_model.h"
#include "launcher/device.h"
#include "launcher/exit_code.h"
#include "launcher/fewer_hosts.h"
#include "launcher/mpirun.h"
#include "launcher/progress_bar.h"
#include "launcher/world.h"
#include "shard/shard_file.h"
#include "shard/shard_manifest.h"

namespace shoal {
namespace {

using Clock = std::chrono::steady_clock;

constexpr absl::Duration kHostsAnswer = absl::Seconds(10);

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// The highest resident size of this process so far.
int64_t PeakBytes() {
  std::ifstream status("/proc/self/status");
  std::string line;
  while (std::getline(status, line)) {
    if (line.rfind("VmHWM:", 0) == 0) return std::strtoll(line.c_str() + 6, nullptr, 10) * 1024;
  }
  return 0;
}

RankReport MakeReport(const Rank& rank, const Communicator& world) {
  RankReport r;
  std::snprintf(r.host, sizeof r.host, "%s", world.host(world.rank()).c_str());
  std::snprintf(r.backend, sizeof r.backend, "%s", rank.DescribeBackend().c_str());
  std::snprintf(r.transport, sizeof r.transport, "%s", rank.mesh().transport().c_str());
  r.peak_bytes = PeakBytes();
  r.memory = rank.memory();
  r.layer_begin = static_cast<int>(rank.mesh().plan().layers.begin);
  r.layer_end = static_cast<int>(rank.mesh().plan().layers.end);
  if (const WeightStreamer* streamer = rank.weights().streamer) {
    const StreamStats s = streamer->stats();
    r.read_bytes = s.bytes_read;
    r.read_seconds = s.busy_s;
    r.wait_seconds = s.wait_s;
    r.read_cpu_seconds = s.io_cpu_s;
    r.read_depth = s.depth;
    std::snprintf(r.reader, sizeof r.reader, "%s", s.engine.c_str());
  }
  if (rank.pager() != nullptr) {
    const KvPagerStats s = rank.pager()->stats();
    r.pages_out = s.pages_out;
    r.pages_in = s.pages_in;
    r.pages_failed = s.failed;
    r.page_bytes_in = s.bytes_in;
    r.page_read_seconds = s.read_s;
  }
  return r;
}

absl::StatusOr<std::vector<RankReport>> GatherReports(const Rank& rank, Communicator& world) {
  const RankReport mine = MakeReport(rank, world);
  std::vector<RankReport> all(world.size());
  SHOAL_RETURN_IF_ERROR(world.AllGather(&mine, sizeof mine, all.data()));
  return all;
}

// Set-up fails on one rank and not on another (a file that only one host has): all learn of it, and
// rank 0 has the message. Collective.
absl::Status AgreeOn(const absl::Status& mine, Communicator& world) {
  struct Outcome {
    int32_t code = 0;
    char text[1020] = {};
  };
  Outcome outcome;
  outcome.code = ExitCodeOf(mine);
  std::snprintf(outcome.text, sizeof outcome.text, "%s", std::string(mine.message()).c_str());
  std::vector<Outcome> all(world.size());
  SHOAL_RETURN_IF_ERROR(world.AllGather(&outcome, sizeof outcome, all.data()));
  for (int r = 0; r < world.size(); ++r) {
    if (all[r].code == 0) continue;
    const std::string where =
        world.size() > 1 ? absl::StrCat("rank ", r, " on ", world.host(r), ": ") : "";
    return WithExitCode(absl::InternalError(absl::StrCat(where, all[r].text)), all[r].code);
  }
  return absl::OkStatus();
}

// Each host reads a file of its own: another model, or another quantization of the same one, would
// go unnoticed and answer nonsense. Collective.
absl::Status AgreeOnModel(const Checkpoint& checkpoint, Communicator& world) {
  std::string tensors;
  for (const TensorInfo& t : checkpoint.tensors()) {
    absl::StrAppend(&tensors, t.name, " ", Info(t.type).name, " ", absl::StrJoin(t.dims, "x"),
                    "\n");
  }
  const uint64_t mine = Checksum(tensors.data(), static_cast<int64_t>(tensors.size()));
  std::vector<uint64_t> all(world.size());
  SHOAL_RETURN_IF_ERROR(world.AllGather(&mine, sizeof mine, all.data()));
  for (int r = 1; r < world.size(); ++r) {
    if (all[r] == all[0]) continue;
    return WithExitCode(
        absl::FailedPreconditionError(absl::StrCat(
            "rank ", r, " on ", world.host(r), " has another model than rank 0 on ", world.host(0),
            ": its tensors differ in name, type or shape. Give every host the same file")),
        kExitConfig);
  }
  return absl::OkStatus();
}

// What all ranks of this process share.
struct Loaded {
  std::unique_ptr<Checkpoint> checkpoint;
  ModelConfig config;
  EngineOptions options;
  std::unique_ptr<Tokenizer> tokenizer;
  std::string ram;
  std::string device;
  bool split_auto = false;
  bool wire_auto = false;
  bool sharded = false;  // the model is a folder that `shoal shard` wrote
};

absl::StatusOr<Loaded> LoadMetadata(const ModelFlags& flags, const SessionOptions& session) {
  Loaded l;
  l.ram = flags.ram;
  l.split_auto = flags.split == "auto";
  l.wire_auto = flags.wire == "auto";
  l.sharded = IsDirectory(flags.model);
  l.device = flags.device;
  SHOAL_RETURN_IF_ERROR(CheckDeviceFlag(flags.device));
  SHOAL_ASSIGN_OR_RETURN(l.options, ToEngineOptions(flags));
  std::string path = flags.model;
  if (path.empty()) {
    SHOAL_ASSIGN_OR_RETURN(path, DemoModelPath());
  }
  SHOAL_ASSIGN_OR_RETURN(l.checkpoint, OpenCheckpoint(path));
  SHOAL_ASSIGN_OR_RETURN(l.config, ReadModelConfig(*l.checkpoint));
  if (session.needs_tokenizer) {
    absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer = Tokenizer::FromCheckpoint(*l.checkpoint);
    if (!tokenizer.ok()) return WithExitCode(tokenizer.status(), kExitMalformed);
    l.tokenizer = *std::move(tokenizer);
  }
  if (flags.gpu_layers >= 0) {
    l.device = KeepOnGpu(flags.gpu_layers, l.config.layers, l.options.shard);
  }
  l.options.sequences = session.sequences;
  l.options.prefix_cache = session.prefix_cache;
  if (session.adjust) SHOAL_RETURN_IF_ERROR(session.adjust(*l.checkpoint, l.config, l.options));
  absl::StatusOr<EngineOptions> resolved = ResolveOptions(l.config, l.options);
  if (!resolved.ok()) return WithExitCode(resolved.status(), kExitUsage);
  l.options = *std::move(resolved);
  absl::StatusOr<ShardPlan> plan = MakeShardPlan(l.config, *l.checkpoint, l.options.shard);
  if (!plan.ok()) return WithExitCode(plan.status(), kExitUsage);
  return l;
}

absl::Status Prepare(const Loaded& l, const SessionOptions& session) {
  return session.prepare ? session.prepare(l.config, l.options, l.tokenizer.get())
                         : absl::OkStatus();
}

// One rank from start to end. `body` runs on rank 0 only.
absl::Status RunRank(const Loaded& loaded, const EngineOptions& options,
                     const SessionOptions& session, Communicator& world,
                     const std::function<absl::Status(Session&)>& body,
                     const std::function<void(const std::vector<RankReport>&)>& report) {
  const Clock::time_point start = Clock::now();
  std::unique_ptr<Rank> rank;
  {
    ProgressBar bar("loading", world.rank() == 0 && !session.quiet);
    absl::StatusOr<std::unique_ptr<Rank>> created =
        Rank::Create(world, *loaded.checkpoint, loaded.config, options,
                     [&bar](int64_t done, int64_t total) { bar.Show(done, total); });
    SHOAL_RETURN_IF_ERROR(AgreeOn(created.status(), world));
    rank = *std::move(created);
  }
  if (world.rank() != 0) {
    SHOAL_RETURN_IF_ERROR(rank->RunWorker());
    return GatherReports(*rank, world).status();
  }
  absl::Status status;
  std::vector<RankReport> reports;
  {
    Engine engine(std::move(rank), options);
    Session s{*loaded.checkpoint,     loaded.config, options,
              loaded.tokenizer.get(), engine,        SecondsSince(start)};
    status = body(s);
    if (!status.ok() && engine.broken()) return status;
    engine.Stop();
    SHOAL_ASSIGN_OR_RETURN(reports, GatherReports(engine.rank(), world));
  }
  if (report) report(reports);
  return status;
}

// How many cores each rank of a host gets when the user did not say: those that compute on the CPU
// share them; a rank with a GPU packs weights on its share of all, which it leaves afterwards.
void ShareCores(const std::string& device, int local_rank, int local_size, CpuOptions& cpu) {
  int on_cpu = 0, before = 0;
  bool mine = false;
  for (int r = 0; r < local_size; ++r) {
    const absl::StatusOr<DeviceChoice> choice = ChooseDevice(device, r);
    if (choice.ok() && choice->gpu >= 0) continue;
    ++on_cpu;
    before += r < local_rank ? 1 : 0;
    mine |= r == local_rank;
  }
  const int cores = static_cast<int>(UsableCores().size());
  const int share = std::max(1, cores / std::max(1, mine ? on_cpu : local_size));
  if (cpu.threads == 0) cpu.threads = share;
  cpu.first_core = (mine ? before : local_rank) * cpu.threads;
}

// Every rank of this process or host has the device that it is to have.
absl::Status CheckDevices(const std::string& device, int local_size) {
  for (int r = 0; r < local_size; ++r) {
    SHOAL_RETURN_IF_ERROR(ChooseDevice(device, r).status());
  }
  return absl::OkStatus();
}

// What a rank may take of its GPU; 0 on the CPU.
absl::StatusOr<int64_t> GpuBytes(const Loaded& l, int local_rank, int local_size) {
  SHOAL_ASSIGN_OR_RETURN(const int64_t free, FreeGpuShare(l.device, local_rank, local_size));
  const int64_t given = l.options.device_memory;
  return given > 0 ? std::min(given, free) : free;
}

// Gives each rank a part that suits its GPU; `bytes` as GpuBytes says, of each rank. A folder of
// shards is cut already.
absl::Status FitToGpus(const Loaded& l, const std::vector<int64_t>& bytes, EngineOptions& options) {
  const bool all = std::all_of(bytes.begin(), bytes.end(), [](int64_t b) { return b > 0; });
  if (l.split_auto && !all) {
    return UsageError(
        "--split auto goes by the memory of GPUs, and not every rank has one: give "
        "numbers, such as --split 3,1");
  }
  if (all && !l.sharded) BalanceByMemory(bytes, l.split_auto, options.shard);
  const absl::Status fits = MakeShardPlan(l.config, *l.checkpoint, options.shard).status();
  return WithExitCode(fits, kExitUsage);
}

// Puts a rank's device into its options; rank 0 says why it is not what one might expect.
absl::Status TakeDevice(const std::string& device, int local_rank, bool quiet,
                        EngineOptions& options) {
  SHOAL_ASSIGN_OR_RETURN(DeviceChoice choice, ChooseDevice(device, local_rank));
  if (!choice.note.empty() && !quiet) fmt::print(stderr, "shoal: {}\n", choice.note);
  options.make_backend = std::move(choice.make);
  return absl::OkStatus();
}

absl::Status RunInProcess(const Loaded& loaded, const SessionOptions& session,
                          const std::function<absl::Status(Session&)>& body,
                          const std::function<void(const std::vector<RankReport>&)>& report) {
  const int ranks = loaded.options.shard.tp * loaded.options.shard.pp;
  std::vector<std::unique_ptr<Communicator>> worlds;
  if (ranks == 1) {
    worlds.push_back(MakeSelfCommunicator());
  } else {
    worlds = MakeInProcessCommunicators(ranks);
  }
  SHOAL_ASSIGN_OR_RETURN(const int64_t memory, RankMemoryLimit(loaded.ram, ranks, 1));
  std::vector<int64_t> gpu_bytes(ranks);
  for (int r = 0; r < ranks; ++r) {
    SHOAL_ASSIGN_OR_RETURN(gpu_bytes[r], GpuBytes(loaded, r, ranks));
  }
  EngineOptions fitted = loaded.options;
  SHOAL_RETURN_IF_ERROR(FitToGpus(loaded, gpu_bytes, fitted));
  std::vector<absl::Status> statuses(ranks);
  const auto run = [&](int r) {
    EngineOptions options = fitted;
    ShareCores(loaded.device, r, ranks, options.cpu);
    options.memory = memory;
    // Unequal stages of one process have unequal parts of its memory.
    const std::vector<int>& layers = fitted.shard.stage_layers;
    if (!layers.empty() && memory > 0) {
      options.memory =
          memory * fitted.shard.pp / loaded.config.layers * layers[r / fitted.shard.tp];
    }
    statuses[r] = TakeDevice(loaded.device, r, session.quiet || r > 0, options);
    if (statuses[r].ok()) statuses[r] = RunRank(loaded, options, session, *worlds[r], body, report);
    if (!statuses[r].ok()) worlds[r]->Abort(statuses[r]);
  };
  std::vector<std::thread> threads;
  for (int r = 1; r < ranks; ++r) threads.emplace_back(run, r);
  run(0);
  for (std::thread& t : threads) t.join();
  return statuses[0];
}

// FitToGpus over the ranks of a job. Collective.
absl::Status FitRanks(const Loaded& l, EngineOptions& options, Communicator& world) {
  const absl::StatusOr<int64_t> mine = GpuBytes(l, LocalRank(), LocalSize());
  SHOAL_RETURN_IF_ERROR(AgreeOn(mine.status(), world));
  std::vector<int64_t> bytes(world.size());
  SHOAL_RETURN_IF_ERROR(world.AllGather(&*mine, sizeof *mine, bytes.data()));
  return FitToGpus(l, bytes, options);  // the same on every rank
}

// Sums between hosts travel as the link between them needs. Collective.
absl::Status FitWire(bool quiet, EngineOptions& options, Communicator& world) {
  SHOAL_ASSIGN_OR_RETURN(const WireChoice choice, ChooseWire(world, options.shard.tp));
  options.wire = choice.wire;
  if (choice.link_gbps > 0 && world.rank() == 0 && !quiet) {
    fmt::print(stderr,
               "shoal: sums travel as {} (--wire): the slowest link carries {:.3g} Gbit/s\n",
               WireName(choice.wire), choice.link_gbps * 8);
  }
  return absl::OkStatus();
}

// Leaves out hosts that do not answer; `arguments`, which start the ranks, say so too.
absl::Status LeaveOutLostHosts(ModelFlags& flags, std::vector<std::string>& arguments) {
  const MpirunJob mpirun{flags.tp * flags.pp, flags.hostfile, flags.hosts, flags.net, {}};
  absl::StatusOr<HostPlan> plan = PlanHosts(mpirun);
  if (!plan.ok()) {
    return WithExitCode(plan.status(), absl::IsNotFound(plan.status()) ? kExitNoInput : kExitUsage);
  }
  JobPlacement job{flags.tp, flags.pp, {}};
  for (size_t i = 0; i < plan->hosts.size(); ++i) {
    job.hosts.push_back({plan->hosts[i], plan->slots[i]});
  }
  const std::vector<bool> answers = AskHosts(job.hosts, kHostsAnswer);
  if (std::find(answers.begin(), answers.end(), false) == answers.end()) return absl::OkStatus();
  absl::StatusOr<JobPlacement> fewer = PlaceOnFewer(job, answers);
  if (!fewer.ok()) return WithExitCode(fewer.status(), kExitUnavailable);
  std::string hosts;
  for (const JobHost& h : fewer->hosts) {
    absl::StrAppend(&hosts, hosts.empty() ? "" : ",", h.name, ":", h.ranks);
  }
  for (size_t i = 0; i < answers.size(); ++i) {
    if (!answers[i]) fmt::print(stderr, "shoal: host {} does not answer\n", job.hosts[i].name);
  }
  fmt::print(stderr, "shoal: going on with --tp {} --pp {} on {}\n", fewer->tp, fewer->pp, hosts);
  if (fewer->tp * fewer->pp == 1) {
    SHOAL_ASSIGN_OR_RETURN(const std::vector<NetInterface> interfaces, ListInterfaces());
    if (!IsThisMachine(interfaces, fewer->hosts[0].name)) {
      return WithExitCode(
          absl::UnavailableError("one rank is left, and its host is another one: start it there"),
          kExitUnavailable);
    }
    hosts.clear();  // this process
  }
  const auto say = [&arguments](const char* flag, std::string value) {
    arguments.insert(arguments.end(), {flag, std::move(value)});
  };
  flags.tp = fewer->tp;
  flags.pp = fewer->pp;
  flags.hosts = hosts;
  flags.hostfile.clear();
  flags.split.clear();  // shares and stages of the whole job
  flags.stage_layers.clear();
  say("--tp", absl::StrCat(flags.tp));
  say("--pp", absl::StrCat(flags.pp));
  say("--host", hosts);
  say("--hostfile", "");
  say("--split", "");
  say("--pp-layers", "");
  return absl::OkStatus();
}

int RunOnHosts(const ModelFlags& flags, const SessionOptions& session,
               const std::function<absl::Status(Session&)>& body,
               const std::function<void(const std::vector<RankReport>&)>& report) {
  if (flags.in_process && MpiWorldSize() > 1) {
    return ReportError(
        UsageError("--in-process keeps all ranks in one process: leave it or mpirun away"));
  }
  // Checked before any rank is started, so that a wrong flag is said once and at once.
  const WorldOptions world_options = ToWorldOptions(flags);
  absl::StatusOr<Loaded> loaded = LoadMetadata(flags, session);
  const bool alone = flags.in_process || (flags.tp == 1 && flags.pp == 1 && !IsMpiRank());
  if (alone || !IsMpiRank()) {
    if (!loaded.ok()) return ReportError(loaded.status());
    const absl::Status fits = CheckWorldOptions(world_options, flags.in_process);
    if (!fits.ok()) return ReportError(fits);
    // What other hosts have they say themselves.
    if (flags.hosts.empty() && flags.hostfile.empty()) {
      const EngineOptions& o = loaded->options;
      const absl::Status there = CheckDevices(loaded->device, o.shard.tp * o.shard.pp);
      if (!there.ok()) return ReportError(there);
    }
  }
  if (alone) {
    if (absl::Status s = Prepare(*loaded, session); !s.ok()) return ReportError(s);
    return ReportError(RunInProcess(*loaded, session, body, report));
  }
  if (!IsMpiRank()) {
    absl::StatusOr<std::optional<int>> launched =
        MaybeLaunchRanks(world_options, session.argc, session.argv);
    if (!launched.ok()) return ReportError(launched.status());
    if (launched->has_value()) return **launched;
  }
  absl::StatusOr<std::unique_ptr<Communicator>> world = OpenWorld(world_options);
  if (!world.ok()) return ReportError(world.status());
  absl::Status status = loaded.status();
  if (status.ok() && (*world)->rank() == 0) status = Prepare(*loaded, session);
  // Rank 0 may have waited for a pipe to end: a broadcast is waited for as long as that takes.
  uint8_t ready = 1;
  absl::Status met = (*world)->Broadcast(&ready, sizeof ready, 0);
  status = AgreeOn(met.ok() ? status : met, **world);
  if (status.ok()) status = AgreeOnModel(*loaded->checkpoint, **world);
  absl::StatusOr<int64_t> memory = RankMemoryLimit(flags.ram, LocalSize(), LocalSize());
  if (status.ok()) status = AgreeOn(memory.status(), **world);
  if (status.ok()) {
    EngineOptions options = loaded->options;
    ShareCores(loaded->device, LocalRank(), LocalSize(), options.cpu);
    options.memory = *memory;
    status = AgreeOn(
        TakeDevice(loaded->device, LocalRank(), session.quiet || (*world)->rank() > 0, options),
        **world);
    if (status.ok()) status = FitRanks(*loaded, options, **world);
    if (status.ok() && loaded->wire_auto) status = FitWire(session.quiet, options, **world);
    if (status.ok()) status = RunRank(*loaded, options, session, **world, body, report);
  }
  // Every rank knows the outcome; one of them says it.
  if ((*world)->rank() == 0) return ReportError(status);
  return ExitCodeOf(status);
}

}  // namespace

int RunSession(const ModelFlags& flags, const SessionOptions& session,
               const std::function<absl::Status(Session&)>& body,
               const std::function<void(const std::vector<RankReport>&)>& report) {
  const bool several_hosts = !(flags.hosts.empty() && flags.hostfile.empty());
  if (IsMpiRank() || !several_hosts || !flags.allow_fewer_hosts) {
    return RunOnHosts(flags, session, body, report);
  }
  ModelFlags fewer = flags;
  std::vector<std::string> arguments(session.argv, session.argv + session.argc);
  const absl::Status asked = LeaveOutLostHosts(fewer, arguments);
  if (!asked.ok()) return ReportError(asked);
  std::vector<char*> argv;
  for (std::string& a : arguments) argv.push_back(a.data());
  SessionOptions options = session;
  options.argc = static_cast<int>(argv.size());
  options.argv = argv.data();
  return RunOnHosts(fewer, options, body, report);
}

std::string FormatReports(const std::vector<RankReport>& reports) {
  std::string out;
  bool repacks = false;
  for (size_t r = 0; r < reports.size(); ++r) {
    const RankReport& x = reports[r];
    const auto mb = [](int64_t bytes) { return static_cast<double>(bytes) / 1e6; };
    out += fmt::format(
        "rank {} on {} ({}): layers {}-{}, weights {:.1f} MB, KV {:.1f} MB, workspace {:.1f} MB, "
        "peak {:.1f} MB\n",
        r, x.host, x.backend, x.layer_begin, x.layer_end - 1, mb(x.memory.weights), mb(x.memory.kv),
        mb(x.memory.workspace), mb(x.peak_bytes));
    if (reports.size() > 1 && absl::StartsWith(x.backend, "cuda")) {
      out += fmt::format("rank {} exchanges by {}\n", r, x.transport);
    }
    if (x.pages_out + x.pages_in + x.pages_failed > 0) {
      out += fmt::format("rank {} KV pages on disk: {} written, {} read back, {} lost", r,
                         x.pages_out, x.pages_in, x.pages_failed);
      if (x.page_bytes_in > 0) {
        out +=
            fmt::format("; read {:.1f} MB in {:.3f} s", mb(x.page_bytes_in), x.page_read_seconds);
      }
      out += "\n";
    }
    if (x.read_bytes == 0) continue;
    if (x.memory.allowed > 0) {
      out += fmt::format(
          "rank {} may take {:.1f} MB: {:.1f} MB of weights stay, {:.1f} MB are for streaming, "
          "{:.1f} MB are left\n",
          r, mb(x.memory.allowed), mb(x.memory.resident), mb(x.memory.weights - x.memory.resident),
          mb(x.memory.allowed - x.memory.total()));
    }
    out += fmt::format(
        "rank {} reads {:.1f} MB for each token: {:.2f} GB in {:.2f} s ({:.2f} GB/s; {}, depth "
        "{}), waited "
        "{:.2f} s, {:.2f} s of CPU\n",
        r, mb(x.memory.streamed), static_cast<double>(x.read_bytes) / 1e9, x.read_seconds,
        static_cast<double>(x.read_bytes) / 1e9 / std::max(1e-9, x.read_seconds), x.reader,
        x.read_depth, x.wait_seconds, x.read_cpu_seconds);
    repacks |= std::string_view(x.reader).substr(0, 8) == "repacked";
  }
  if (repacks) {
    out +=
        "hint: streamed from a GGUF every part is packed anew for each token; faster: --disk-cache "
        "DIR, or shoal shard -m MODEL -o DIR, then -m DIR\n";
  }
  return out;
}

}  // namespace shoal
