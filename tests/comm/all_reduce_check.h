// A serial reference for AllReduceSum and how far from it a rank may be: shared by the tests of
// every transport.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "comm/communicator.h"
#include "comm/wire.h"

namespace shoal {

// Element i of what rank r contributes: magnitudes over nine binades, changing within a block.
inline float ContributionAt(int rank, int64_t i) {
  uint32_t state = 0x9e3779b9u * (static_cast<uint32_t>(rank) + 1) + static_cast<uint32_t>(i);
  state = (state ^ (state >> 16)) * 0x7feb352du;
  state = (state ^ (state >> 15)) * 0x846ca68bu;
  const float unit = static_cast<float>(static_cast<int32_t>(state ^ (state >> 16))) * 0x1p-31f;
  return unit * static_cast<float>(1 << (i % 9));
}

inline std::vector<float> Contribution(int rank, int64_t count) {
  std::vector<float> values(count);
  for (int64_t i = 0; i < count; ++i) values[i] = ContributionAt(rank, i);
  return values;
}

// Adds to error[i] what encoding x[0, n) once may change; x and error are one wire block, or its
// start.
inline void AddEncodingError(Wire wire, const double* x, int n, double* error) {
  double largest = 0;
  for (int i = 0; i < n; ++i) largest = std::max(largest, std::abs(x[i]));
  for (int i = 0; i < n; ++i) {
    if (wire == Wire::kF16) error[i] += std::abs(x[i]) * 0x1p-11 + 0x1p-25;
    if (wire == Wire::kQ8) {
      // The quantizing product rounds twice on its way to a whole number: the last factor.
      error[i] += (largest / 127 * (1 + 0x1p-10) + 0x1p-24) / 2 * (1 + 0x1p-14);
    }
  }
}

// Empty when every element of `actual` is as near to the serial sum in double as the wire and the
// additions allow:
//  - every contribution is encoded once: the wire's own bound;
//  - size-1 float additions each round a partial sum, which is at most the sum of (decoded)
//  magnitudes;
//  - the two-phase form encodes the sum once more (always counted: the bound holds for one-shot
//  too).
inline std::string CompareToSerial(int size, Wire wire, const std::vector<float>& actual) {
  if (size == 1) wire = Wire::kF32;  // nothing travels
  const int64_t count = static_cast<int64_t>(actual.size());
  for (int64_t begin = 0; begin < count; begin += kWireBlock) {
    const int n = static_cast<int>(std::min(kWireBlock, count - begin));
    double sum[kWireBlock] = {}, magnitude[kWireBlock] = {}, error[kWireBlock] = {};
    for (int r = 0; r < size; ++r) {
      double term[kWireBlock];
      for (int i = 0; i < n; ++i) {
        term[i] = ContributionAt(r, begin + i);
        sum[i] += term[i];
        magnitude[i] += std::abs(term[i]);
      }
      AddEncodingError(wire, term, n, error);
    }
    double largest_sum[kWireBlock];
    for (int i = 0; i < n; ++i) {
      error[i] += size * 0x1p-24 * (magnitude[i] + error[i]);
      largest_sum[i] = std::abs(sum[i]) + error[i];
    }
    AddEncodingError(wire, largest_sum, n, error);
    for (int i = 0; i < n; ++i) {
      if (std::abs(actual[begin + i] - sum[i]) <= error[i]) continue;
      return absl::StrCat("element ", begin + i, " of ", count, " is ", actual[begin + i],
                          ", expected ", sum[i], " within ", error[i]);
    }
  }
  return "";
}

}  // namespace shoal
