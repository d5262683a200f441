// Stands in for tests/simt/include/simt/runner.h where the tests of the kernels run on a GPU: the
// chip has schedules of its own.
#pragma once

#include <cstdint>

namespace simt {
inline void SetSeed(uint64_t) {}
}  // namespace simt
