#include "kernels/cpu/topology.h"

#include <hwloc.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstdint>
#include <fstream>
#include <memory>
#include <tuple>

namespace shoal {
namespace {

struct DestroyTopology {
  void operator()(hwloc_topology* t) const { hwloc_topology_destroy(t); }
};
using Topology = std::unique_ptr<hwloc_topology, DestroyTopology>;

Topology LoadTopology() {
  hwloc_topology_t raw = nullptr;
  if (hwloc_topology_init(&raw) != 0) return nullptr;
  Topology topology(raw);
  return hwloc_topology_load(raw) == 0 ? std::move(topology) : nullptr;
}

// A container's CPU quota in whole CPUs, rounded up; INT_MAX without one. cgroup v2 cpu.max is
// "quota period".
int CgroupCpuQuota() {
  std::ifstream file("/sys/fs/cgroup/cpu.max");
  int64_t quota = 0, period = 0;
  if (!(file >> quota >> period) || quota <= 0 || period <= 0) return INT_MAX;  // "max 100000"
  return static_cast<int>(std::min<int64_t>((quota + period - 1) / period, INT_MAX));
}

std::vector<int> AllowedCpus() {
  std::vector<int> cpus;
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(getpid(), sizeof(set), &set) == 0) {
    for (int i = 0; i < CPU_SETSIZE; ++i) {
      if (CPU_ISSET(i, &set)) cpus.push_back(i);
    }
  }
  return cpus;
}

}  // namespace

std::vector<int> CoresInOrder(hwloc_topology* topology, const std::vector<int>& allowed) {
  std::vector<std::tuple<int, int, int>> ranked;  // (-speed class, node, cpu)
  const int cores = hwloc_get_nbobjs_by_type(topology, HWLOC_OBJ_CORE);
  for (int i = 0; i < cores; ++i) {
    const hwloc_obj_t core = hwloc_get_obj_by_type(topology, HWLOC_OBJ_CORE, i);
    const auto cpu = std::find_if(allowed.begin(), allowed.end(),
                                  [&](int c) { return hwloc_bitmap_isset(core->cpuset, c) != 0; });
    if (cpu == allowed.end()) continue;
    // Kinds are ordered from efficient to fast; -1 when the machine has one kind only.
    const int kind = hwloc_cpukinds_get_by_cpuset(topology, core->cpuset, 0);
    ranked.emplace_back(-kind, hwloc_bitmap_first(core->nodeset), *cpu);
  }
  std::sort(ranked.begin(), ranked.end());
  std::vector<int> result;
  for (const auto& [kind, node, cpu] : ranked) result.push_back(cpu);
  return result;
}

std::vector<int> UsableCores() {
  const std::vector<int> allowed = AllowedCpus();
  std::vector<int> cores;
  if (const Topology topology = LoadTopology()) cores = CoresInOrder(topology.get(), allowed);
  if (cores.empty()) cores = allowed;  // no core objects: some containers hide the topology
  if (cores.empty()) cores.push_back(0);
  cores.resize(std::min<size_t>(cores.size(), CgroupCpuQuota()));
  return cores;
}

void PreferMemoryNear(const std::vector<int>& cpus) {
  const Topology topology = LoadTopology();
  if (topology == nullptr || hwloc_get_nbobjs_by_type(topology.get(), HWLOC_OBJ_NUMANODE) < 2) {
    return;
  }
  hwloc_bitmap_t set = hwloc_bitmap_alloc();
  for (const int cpu : cpus) hwloc_bitmap_set(set, cpu);
  hwloc_bitmap_t nodes = hwloc_bitmap_alloc();
  hwloc_cpuset_to_nodeset(topology.get(), set, nodes);
  const auto policy =
      hwloc_bitmap_weight(nodes) > 1 ? HWLOC_MEMBIND_INTERLEAVE : HWLOC_MEMBIND_BIND;
  // Not strict, so Linux takes the nodes as preferred ones.
  hwloc_set_membind(topology.get(), nodes, policy, HWLOC_MEMBIND_THREAD | HWLOC_MEMBIND_BYNODESET);
  hwloc_bitmap_free(nodes);
  hwloc_bitmap_free(set);
}

}  // namespace shoal
