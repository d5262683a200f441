// What `shoal doctor` finds out about a machine: plain data that travels as JSON.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace shoal {

struct CpuFacts {
  std::string name;
  int cores = 0;  // physical ones that this process may use
  int numa_nodes = 1;
  std::string levels;  // "scalar, avx2": what the kernels can use
  std::string level;   // and will
};

struct MemoryFacts {
  int64_t total_bytes = 0;
  int64_t free_bytes = 0;
  std::string bound;          // "MemAvailable", or the cgroup whose limit comes first
  int64_t memlock_bytes = 0;  // that a process may lock; -1: any
  int64_t huge_pages = 0, huge_page_bytes = 0;
  std::string transparent_huge_pages;  // "always", "madvise", "never"
};

struct GpuFacts {
  int index = 0;
  std::string name, compute_capability, pci;
  int64_t total_bytes = 0, free_bytes = 0;
  double from_host_gbps = 0, to_host_gbps = 0;  // GB/s, 0: not measured
  std::vector<int> peers;                       // GPUs that it can reach directly
};

struct CudaFacts {
  bool built = false;           // this shoal has the CUDA backend
  int gpus_on_bus = 0;          // NVIDIA's display devices, whether a driver knows them or not
  std::string why_none;         // no GPU can be used: the reason
  std::string driver, runtime;  // CUDA versions
  std::vector<GpuFacts> gpus;
  std::string nccl, nccl_path, why_no_nccl;
};

struct MpiFacts {
  std::string mpirun;          // its path or name
  std::string mpirun_version;  // empty: it does not run
  std::string library_version;
};

struct DiskFacts {
  std::string dir;                       // empty: not asked for
  double write_gbps = 0, read_gbps = 0;  // GB/s, past the page cache
  int64_t free_bytes = 0;
  std::string how;    // "io_uring, direct"
  std::string error;  // why it could not be measured
};

struct ModelFacts {
  std::string path;  // empty: not asked for
  std::string fingerprint, error;
};

struct MachineFacts {
  std::string host;     // as it calls itself
  std::string version;  // of this shoal
  std::string build;    // a checksum of its binary
  CpuFacts cpu;
  MemoryFacts memory;
  CudaFacts cuda;
  MpiFacts mpi;
  std::string why_no_io_uring;  // empty: it is allowed
  DiskFacts disk;
  ModelFacts model;
};

struct FactsRequest {
  std::string dir;    // measure the disk under this folder
  std::string model;  // name the model of this path
};

// A second or so; the disk takes longer. What cannot be found out is said in its field.
MachineFacts GatherFacts(const FactsRequest& request);

std::string FactsToJson(const MachineFacts& facts);
absl::StatusOr<MachineFacts> FactsFromJson(const std::string& json);

}  // namespace shoal
