// Weights in a device's own memory: resident units are copied once, the others come from host
// memory through a ring of slots, in execution order, while the device computes.
//
// Nothing here waits for the device: ops wait for the copy of their unit, copies wait for the ops
// that last read their slot, and the engine thread runs ahead of both. Units of a pass are copied
// as soon as a slot is free, and the prefetch wraps into the next pass.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/backend.h"
#include "offload/weight_source.h"

namespace shoal {

struct DeviceUnit {
  enum class Place : uint8_t {
    kResident,  // on the device
    kStreamed,  // through the ring, once in each pass
    kOnDemand,  // an expert: copied when it is asked for, kept while its slot is not needed
  };
  Place place = Place::kResident;
  int64_t bytes = 0;
};

struct DeviceWeightsOptions {
  std::vector<DeviceUnit> units;
  std::vector<int> cycle;  // the streamed units, in the order of one pass, each once
  int ring_slots = 0;      // of the largest streamed unit's size; two or more overlap
  int expert_slots = 0;    // of the largest on-demand unit's size
  // Units whose bytes stay where they are in host memory: they are pinned and copied from there.
  bool host_is_constant = false;
  std::function<void(int64_t done, int64_t total)> progress;  // while the resident units load
};

// The rank's engine thread. Pointers are device memory.
class DeviceWeights final : public WeightSource {
 public:
  // `loader` has the resident units and is read once. `host` has the others; null if there are
  // none. The backend, which must have copies(), lives longer.
  static absl::StatusOr<std::unique_ptr<DeviceWeights>> Create(Backend& backend,
                                                               WeightSource& loader,
                                                               std::unique_ptr<WeightSource> host,
                                                               DeviceWeightsOptions options);
  ~DeviceWeights() override;

  absl::StatusOr<const uint8_t*> Acquire(int unit) override;
  void Release(int unit) override;
  void Prefetch(absl::Span<const int> units) override;
  bool fixed(int unit) const override { return offset_[unit] >= 0; }

  int64_t bytes_streamed() const { return bytes_streamed_; }
  int64_t bytes_held() const { return resident_.size() + ring_.size() + experts_.size(); }

 private:
  struct Slot {
    uint8_t* data = nullptr;
    int unit = -1;     // whose bytes it has or will have
    int held = 0;      // Acquires without their Release
    int copied = 0;    // fence: the bytes are there
    int released = 0;  // fence: nobody reads them any more
    uint64_t used_at = 0;
  };
  // Pinned memory on the way: host memory that is not pinned passes through two of these in turn.
  struct Stage {
    DeviceMemory memory;
    int read = 0;  // fence: the copy out of it is done
  };

  DeviceWeights(Backend& backend, std::unique_ptr<WeightSource> host, DeviceWeightsOptions options);
  absl::Status Init(WeightSource& loader);
  absl::Status MakeSlots(DeviceUnit::Place place, int count, DeviceMemory& memory,
                         std::vector<Slot>& slots);
  absl::Status LoadResident(WeightSource& loader);
  absl::Status SendStaged(uint8_t* to, const uint8_t* from, int64_t bytes);
  std::vector<Slot>& SlotsOf(int unit);
  Slot* Find(int unit);
  // The slot that was used longest ago among those that nobody holds and no unit of `keep` is in.
  Slot* Free(std::vector<Slot>& slots, absl::Span<const int> keep);
  absl::Status Fill(Slot& slot, int unit);
  absl::Status FillAhead(int unit);

  Backend& backend_;
  CopyEngine& copies_;
  const std::unique_ptr<WeightSource> host_;
  const DeviceWeightsOptions options_;
  std::vector<int64_t> offset_;  // resident units: place in resident_
  std::vector<int> cycle_index_;
  enum class Pinned : uint8_t { kUnknown, kYes, kNo };
  std::vector<Pinned> pinned_;
  DeviceMemory resident_, ring_, experts_;
  std::vector<Slot> ring_slots_, expert_slots_;
  Stage stages_[2];
  int stage_ = 0;
  uint64_t clock_ = 0;
  int64_t bytes_streamed_ = 0;
};

}  // namespace shoal
