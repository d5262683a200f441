// Norms of the hidden state, and of q and k.
#pragma once

#include <cstdint>

namespace shoal {

enum class NormKind : uint8_t {
  kRms,    // x / rms(x) * weight, arXiv:1910.07467
  kLayer,  // as kRms, of x less its mean, arXiv:1607.06450; no bias
};

// What is done to q and k beside their rotation, where the model has it.
enum class QkNorm : uint8_t {
  kHeadRms,        // of each head, weights [head_dim] for all of them, before the rotation
  kHeadLayer,      // of each head, weights [heads, head_dim], before the rotation
  kRowRms,         // of all heads of a row together, weights [heads, head_dim], before the rotation
  kHeadRmsBehind,  // as kHeadRms, behind the rotation
  kPlain,          // as kHeadRmsBehind, without weights
};
// Whether all heads share their weights.
inline bool NormsHeadsAlike(QkNorm norm) {
  return norm == QkNorm::kHeadRms || norm == QkNorm::kHeadRmsBehind;
}

// Columns [begin, end) of each row.
struct ColumnRun {
  int begin = 0, end = 0;
};

}  // namespace shoal
