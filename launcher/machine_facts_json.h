// How the facts are written as JSON. For the files that need nlohmann's conversions.
#pragma once

#include "launcher/machine_facts.h"
#include "nlohmann/json.hpp"

namespace shoal {

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(CpuFacts, name, cores, numa_nodes, levels, level)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(MemoryFacts, total_bytes, free_bytes, bound,
                                                memlock_bytes, huge_pages, huge_page_bytes,
                                                transparent_huge_pages)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(GpuFacts, index, name, compute_capability, pci,
                                                total_bytes, free_bytes, from_host_gbps,
                                                to_host_gbps, peers)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(CudaFacts, built, gpus_on_bus, why_none, driver,
                                                runtime, gpus, nccl, nccl_path, why_no_nccl)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(MpiFacts, mpirun, mpirun_version, library_version)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(DiskFacts, dir, write_gbps, read_gbps, free_bytes,
                                                how, error)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(ModelFacts, path, fingerprint, error)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(MachineFacts, host, version, build, cpu, memory,
                                                cuda, mpi, why_no_io_uring, disk, model)

}  // namespace shoal
