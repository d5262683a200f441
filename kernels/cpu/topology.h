// Which cores a process may use, in the order in which its ranks take them, and whose memory is
// near.
#pragma once

#include <vector>

struct hwloc_topology;

namespace shoal {

// One entry for each physical core: the first hardware thread of it that the affinity mask allows.
// Fast cores stand before efficient ones, and among those the cores of a NUMA node stand together.
// No more than the cgroup's CPU quota. Never empty.
std::vector<int> UsableCores();

// The same of any topology: of its cores those with a hardware thread among `allowed` (ascending).
std::vector<int> CoresInOrder(hwloc_topology* topology, const std::vector<int>& allowed);

// From now on the memory that the calling thread touches first, and threads that it starts, lies on
// the NUMA nodes of these CPUs, in turn when there are several. A preference: where a node is full
// or the system refuses, memory comes from elsewhere. Nothing happens on a machine of one node.
void PreferMemoryNear(const std::vector<int>& cpus);

}  // namespace shoal
