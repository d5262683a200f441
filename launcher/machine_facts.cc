#include "launcher/machine_facts.h"

#include <dirent.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <memory>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "comm/mpi_version.h"
#include "comm/nccl_api.h"
#include "kernels/cpu/features.h"
#include "kernels/cpu/topology.h"
#include "kernels/status_macros.h"
#include "launcher/captured_run.h"
#include "launcher/machine_facts_json.h"
#include "launcher/world.h"
#include "offload/async_file.h"
#include "offload/memory_budget.h"
#include "shard/checkpoint.h"
#include "shard/shard_manifest.h"
#include "shard/source_fingerprint.h"
#ifdef SHOAL_CUDA
#include "kernels/cuda/probe.h"
#endif

namespace shoal {
namespace {

constexpr int64_t kDiskBytes = int64_t{256} << 20;
constexpr int64_t kDiskBufferBytes = int64_t{64} << 20;
constexpr int kDiskDepth = 16;

// The value behind "name" at the start of a line of a file such as /proc/meminfo.
std::string Line(const char* path, const std::string& name) {
  std::ifstream file(path);
  std::string line;
  while (std::getline(file, line)) {
    if (line.rfind(name, 0) != 0) continue;
    const size_t value = line.find_first_not_of(" \t:", name.size());
    return value == std::string::npos ? "" : line.substr(value);
  }
  return "";
}

int64_t Number(const std::string& text) { return std::strtoll(text.c_str(), nullptr, 10); }

std::vector<std::string> Entries(const char* folder) {
  std::vector<std::string> names;
  DIR* const directory = opendir(folder);
  if (directory == nullptr) return names;
  while (const dirent* entry = readdir(directory)) names.emplace_back(entry->d_name);
  closedir(directory);
  return names;
}

std::string FirstWord(const std::string& path) {
  std::ifstream file(path);
  std::string word;
  file >> word;
  return word;
}

CpuFacts GatherCpu() {
  CpuFacts f;
  f.name = Line("/proc/cpuinfo", "model name");
  f.cores = static_cast<int>(UsableCores().size());
  const std::vector<std::string> nodes = Entries("/sys/devices/system/node");
  f.numa_nodes = static_cast<int>(std::count_if(
      nodes.begin(), nodes.end(), [](const std::string& n) { return n.rfind("node", 0) == 0; }));
  f.numa_nodes = std::max(1, f.numa_nodes);
  f.levels = CpuLevelNames(DetectCpuFeatures());
  const absl::StatusOr<CpuLevel> level = ChooseCpuLevel("");
  f.level = level.ok() ? CpuLevelName(*level) : std::string(level.status().message());
  return f;
}

MemoryFacts GatherMemory() {
  MemoryFacts f;
  f.total_bytes = Number(Line("/proc/meminfo", "MemTotal")) * 1024;
  if (const absl::StatusOr<FreeMemory> free = ReadFreeMemory(); free.ok()) {
    f.free_bytes = free->available;
    f.bound = free->bound;
  }
  f.huge_pages = Number(Line("/proc/meminfo", "HugePages_Total"));
  f.huge_page_bytes = Number(Line("/proc/meminfo", "Hugepagesize")) * 1024;
  rlimit limit{};
  getrlimit(RLIMIT_MEMLOCK, &limit);
  f.memlock_bytes = limit.rlim_cur == RLIM_INFINITY ? -1 : static_cast<int64_t>(limit.rlim_cur);
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
  std::string word;
  while (file >> word) {
    if (word.front() == '[') f.transparent_huge_pages = word.substr(1, word.size() - 2);
  }
  return f;
}

int NvidiaGpusOnBus() {
  int count = 0;
  for (const std::string& device : Entries("/sys/bus/pci/devices")) {
    const std::string folder = absl::StrCat("/sys/bus/pci/devices/", device);
    const bool display = FirstWord(folder + "/class").rfind("0x03", 0) == 0;
    if (display && FirstWord(folder + "/vendor") == "0x10de") ++count;
  }
  return count;
}

CudaFacts GatherCuda() {
  CudaFacts f;
  f.gpus_on_bus = NvidiaGpusOnBus();
  const absl::StatusOr<std::shared_ptr<const nccl::Api>> library = nccl::Load();
  if (library.ok()) {
    f.nccl = nccl::VersionText((*library)->version);
    f.nccl_path = (*library)->path;
  } else {
    f.why_no_nccl = std::string(library.status().message());
  }
#ifdef SHOAL_CUDA
  f.built = true;
  const absl::StatusOr<cuda::GpuProbes> probes = cuda::ProbeGpus();
  if (!probes.ok()) {
    f.why_none = std::string(probes.status().message());
    return f;
  }
  f.driver = probes->driver;
  f.runtime = probes->runtime;
  for (const cuda::GpuProbe& p : probes->gpus) {
    f.gpus.push_back({p.info.index, p.info.name, absl::StrCat(p.info.major, ".", p.info.minor),
                      p.info.pci, p.info.total_bytes, p.free_bytes, p.from_host_bytes_per_s / 1e9,
                      p.to_host_bytes_per_s / 1e9, p.peers});
  }
#else
  f.why_none = "this shoal was built without CUDA";
#endif
  return f;
}

MpiFacts GatherMpi() {
  MpiFacts f;
  f.library_version = MpiLibraryVersion();
  const absl::StatusOr<std::string> program = ThisProgram();
  f.mpirun = program.ok() ? MpirunFor(*program) : "mpirun";
  const absl::StatusOr<CapturedRun> run = RunCaptured({f.mpirun, "--version"}, absl::Seconds(20));
  if (!run.ok() || run->exit_code != 0) return f;
  // "mpirun (Open MPI) 4.1.4"
  const std::string line = run->out.substr(0, run->out.find('\n'));
  f.mpirun_version = line.substr(line.rfind(' ') + 1);
  return f;
}

std::string WhyNoUring() {
  const absl::StatusOr<std::unique_ptr<IoQueue>> queue = MakeUringQueue(8);
  return queue.ok() ? "" : std::string(queue.status().message());
}

// GB/s of writing or reading the whole file.
absl::StatusOr<double> MoveFile(AsyncFile& file, bool write, uint8_t* buffer) {
  const auto start = std::chrono::steady_clock::now();
  for (int64_t at = 0; at < kDiskBytes; at += kDiskBufferBytes) {
    SHOAL_RETURN_IF_ERROR(file.Transfer(write, at, buffer, kDiskBufferBytes, kDiskDepth));
  }
  if (write) SHOAL_RETURN_IF_ERROR(file.Sync());
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  return static_cast<double>(kDiskBytes) / elapsed.count() / 1e9;
}

absl::Status MeasureDisk(DiskFacts& f) {
  struct statvfs space {};
  if (statvfs(f.dir.c_str(), &space) != 0) return absl::ErrnoToStatus(errno, f.dir);
  f.free_bytes = static_cast<int64_t>(space.f_bavail) * static_cast<int64_t>(space.f_frsize);
  if (f.free_bytes < 2 * kDiskBytes) {
    return absl::ResourceExhaustedError(absl::StrCat(f.dir, " has ", FormatBytes(f.free_bytes),
                                                     " free, the measurement wants ",
                                                     FormatBytes(2 * kDiskBytes)));
  }
  const std::unique_ptr<void, decltype(&std::free)> memory(
      std::aligned_alloc(kIoAlignment, kDiskBufferBytes), &std::free);
  if (memory == nullptr) return absl::ResourceExhaustedError("no memory for a buffer");
  uint8_t* const buffer = static_cast<uint8_t*>(memory.get());
  uint32_t state = 1;  // noise, as a disk that compresses must not shine
  for (int64_t i = 0; i < kDiskBufferBytes; ++i) {
    state = state * 1664525 + 1013904223;
    buffer[i] = static_cast<uint8_t>(state >> 24);
  }
  const std::string path = absl::StrCat(f.dir, "/.shoal-doctor-", getpid());
  const auto remove = absl::MakeCleanup([&path] { unlink(path.c_str()); });
  AsyncFile::Options writing;
  writing.write = writing.create = true;
  SHOAL_ASSIGN_OR_RETURN(std::unique_ptr<AsyncFile> file, AsyncFile::Open(path, writing));
  SHOAL_ASSIGN_OR_RETURN(f.write_gbps, MoveFile(*file, true, buffer));
  SHOAL_ASSIGN_OR_RETURN(file, AsyncFile::Open(path, AsyncFile::Options{}));
  SHOAL_ASSIGN_OR_RETURN(f.read_gbps, MoveFile(*file, false, buffer));
  f.how = file->Describe();
  return absl::OkStatus();
}

absl::StatusOr<std::string> Fingerprint(const std::string& path) {
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<Checkpoint> checkpoint, OpenCheckpoint(path));
  SHOAL_ASSIGN_OR_RETURN(const uint64_t fingerprint, SourceFingerprint(*checkpoint));
  return absl::StrFormat("%016x", fingerprint);
}

std::string BuildChecksum() {
  std::ifstream file("/proc/self/exe", std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(file)), {});
  return absl::StrFormat("%016x", Checksum(bytes.data(), static_cast<int64_t>(bytes.size())));
}

}  // namespace

MachineFacts GatherFacts(const FactsRequest& request) {
  MachineFacts f;
  char host[256] = "";
  gethostname(host, sizeof host - 1);
  f.host = host;
  f.version = SHOAL_VERSION;
  f.build = BuildChecksum();
  f.cpu = GatherCpu();
  f.memory = GatherMemory();
  f.cuda = GatherCuda();
  f.mpi = GatherMpi();
  f.why_no_io_uring = WhyNoUring();
  f.disk.dir = request.dir;
  if (!request.dir.empty()) f.disk.error = std::string(MeasureDisk(f.disk).message());
  f.model.path = request.model;
  if (!request.model.empty()) {
    const absl::StatusOr<std::string> fingerprint = Fingerprint(request.model);
    if (fingerprint.ok()) f.model.fingerprint = *fingerprint;
    f.model.error = std::string(fingerprint.status().message());
  }
  return f;
}

std::string FactsToJson(const MachineFacts& facts) {
  return nlohmann::json(facts).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

absl::StatusOr<MachineFacts> FactsFromJson(const std::string& json) {
  try {
    return nlohmann::json::parse(json).get<MachineFacts>();
  } catch (const nlohmann::json::exception& e) {
    return absl::InvalidArgumentError(e.what());
  }
}

}  // namespace shoal
