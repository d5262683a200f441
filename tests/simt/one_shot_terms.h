// What ranks add in the tests of one-shot sums.
#pragma once

#include <cstdint>

namespace shoal {

// Terms whose sum depends on the order in which they are added.
inline float Term(int rank, int round, int64_t i) {
  const int64_t v = (i * 7919 + round * 104729 + rank * 1299709) % 65537;
  return static_cast<float>(v - 32768) * (rank % 2 == 0 ? 1e-3f : 37.0f);
}
inline float SumInOrder(int ranks, int round, int64_t i) {
  float sum = Term(0, round, i);
  for (int r = 1; r < ranks; ++r) sum += Term(r, round, i);
  return sum;
}

}  // namespace shoal
