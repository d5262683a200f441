// Where the forward pass gets its weights: unit by unit, in execution order.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace shoal {

// One rank's weights. Called by the rank's engine thread only.
class WeightSource {
 public:
  virtual ~WeightSource() = default;
  // The bytes of a unit (shard/weight_layout.h numbers them), readable until Release(unit). Blocks
  // until they are in memory. Units are asked for in execution order, again and again (experts:
  // only those in use).
  virtual absl::StatusOr<const uint8_t*> Acquire(int unit) = 0;
  virtual void Release(int unit) = 0;
  // As Acquire, but only these rows of the unit's first extent need be readable (its base is
  // returned all the same): an embedding of gigabytes is not moved for one token. Rows < 0 belong
  // to other ranks.
  virtual absl::StatusOr<const uint8_t*> AcquireRows(int unit, absl::Span<const int32_t> rows) {
    return Acquire(unit);
  }
  // Whether the unit is in memory and stays where its first Acquire found it, held or not.
  virtual bool fixed(int unit) const { return false; }
  // These units (a layer's chosen experts) are acquired next: read them side by side instead of one
  // by one.
  virtual void Prefetch(absl::Span<const int> units) {}
};

// Everything lies in memory: unit u starts at base + offsets[u].
class ResidentWeights final : public WeightSource {
 public:
  ResidentWeights(const uint8_t* base, std::vector<int64_t> offsets)
      : base_(base), offsets_(std::move(offsets)) {}
  absl::StatusOr<const uint8_t*> Acquire(int unit) override { return base_ + offsets_[unit]; }
  void Release(int) override {}
  bool fixed(int) const override { return true; }

 private:
  const uint8_t* base_;
  std::vector<int64_t> offsets_;
};

}  // namespace shoal
