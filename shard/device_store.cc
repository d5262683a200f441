#include "shard/device_store.h"

#include <algorithm>
#include <utility>

#include "kernels/status_macros.h"
#include "offload/device_weights.h"

namespace shoal {
namespace {

constexpr int64_t kPage = 4096;
// Host memory through which resident units pass while they load: bounds it for models whose parts
// are small, and never less than one part.
constexpr int64_t kLoadRing = int64_t{256} << 20;

int64_t PageUp(int64_t n) { return (n + kPage - 1) / kPage * kPage; }

int64_t EmbeddingBytes(const WeightLayout& layout) {
  for (const WeightUnit& u : layout.units) {
    if (u.kind == WeightUnit::Kind::kEmbedding) return PageUp(u.bytes);
  }
  return 0;
}

// The layout with nothing in the units that are not wanted.
WeightLayout Without(const WeightLayout& layout, const std::vector<bool>& unwanted) {
  WeightLayout rest = layout;
  for (size_t i = 0; i < rest.units.size(); ++i) {
    if (unwanted[i]) rest.units[i].bytes = 0;
  }
  return rest;
}

// All units pass through a ring once, in order.
Placement LoadOnce(const WeightLayout& layout, const std::vector<bool>& wanted) {
  Placement p;
  p.tiers.assign(layout.units.size(), Tier::kResident);
  int64_t largest = 0, total = 0;
  for (size_t i = 0; i < layout.units.size(); ++i) {
    if (!wanted[i] || layout.units[i].bytes == 0) continue;
    p.tiers[i] = Tier::kStreamed;
    p.cycle.push_back(static_cast<int>(i));
    largest = std::max(largest, PageUp(layout.units[i].bytes));
    total += PageUp(layout.units[i].bytes);
  }
  p.ring_bytes = std::min(total, std::max(3 * largest, kLoadRing));
  return p;
}

DeviceUnit::Place PlaceOf(Tier tier) {
  switch (tier) {
    case Tier::kStreamed:
      return DeviceUnit::Place::kStreamed;
    case Tier::kOnDemand:
      return DeviceUnit::Place::kOnDemand;
    case Tier::kResident:
    case Tier::kRows:
      break;
  }
  return DeviceUnit::Place::kResident;
}

// A wrapper that lets a store be read once and closed.
absl::StatusOr<WeightStore> OpenPart(const Checkpoint& checkpoint, const WeightLayout& layout,
                                     const Placement& placement, std::vector<bool> skip,
                                     WeightStoreOptions options) {
  options.skip = std::move(skip);
  options.progress = nullptr;
  return OpenWeights(checkpoint, layout, placement, options);
}

}  // namespace

int64_t LeastDeviceBytes(const WeightLayout& layout, const ModelConfig& config, int rows) {
  int64_t total = 0;
  for (const WeightUnit& u : layout.units) total += PageUp(u.bytes);
  return std::min(total, LeastWeightBytes(layout, config, rows) + EmbeddingBytes(layout));
}

absl::StatusOr<DevicePlacement> PlaceOnDevice(const WeightLayout& layout, const ModelConfig& config,
                                              int64_t device_bytes, int64_t host_bytes, int rows) {
  DevicePlacement p;
  int64_t total = 0;
  for (const WeightUnit& u : layout.units) total += PageUp(u.bytes);
  // Rows of an embedding are looked up on the device, so it stays there when others do not.
  const int64_t embedding = total <= device_bytes ? 0 : EmbeddingBytes(layout);
  SHOAL_ASSIGN_OR_RETURN(p.device, PlaceWeights(layout, config, device_bytes - embedding, rows));
  for (size_t i = 0; i < layout.units.size(); ++i) {
    if (layout.units[i].kind != WeightUnit::Kind::kEmbedding) continue;
    p.device.tiers[i] = Tier::kResident;
    std::erase(p.device.cycle, static_cast<int>(i));
  }
  p.on_device.assign(layout.units.size(), false);
  int64_t slot = 0;
  for (size_t i = 0; i < layout.units.size(); ++i) {
    const int64_t bytes = PageUp(layout.units[i].bytes);
    p.on_device[i] = p.device.tiers[i] == Tier::kResident;
    p.streams |= !p.on_device[i];
    if (p.on_device[i]) p.device_bytes += bytes;
    if (p.device.tiers[i] == Tier::kStreamed) slot = std::max(slot, bytes);
  }
  if (slot > 0) {
    p.ring_slots = static_cast<int>(std::clamp<int64_t>(p.device.ring_bytes / slot, 1, 3));
  }
  p.ring_slot_bytes = slot;
  p.device_bytes += slot * p.ring_slots + p.device.slot_bytes * p.device.expert_slots;
  if (p.streams) {
    SHOAL_ASSIGN_OR_RETURN(p.host,
                           PlaceWeights(Without(layout, p.on_device), config, host_bytes, rows));
  }
  return p;
}

absl::StatusOr<WeightStore> OpenDeviceWeights(const Checkpoint& checkpoint,
                                              const WeightLayout& layout,
                                              const DevicePlacement& placement, Backend& backend,
                                              const WeightStoreOptions& options) {
  std::vector<bool> streamed = placement.on_device;
  streamed.flip();
  DeviceWeightsOptions device;
  for (size_t i = 0; i < layout.units.size(); ++i) {
    device.units.push_back({PlaceOf(placement.device.tiers[i]), layout.units[i].bytes});
  }
  device.cycle = placement.device.cycle;
  device.ring_slots = placement.ring_slots;
  device.expert_slots = placement.device.expert_slots;
  device.progress = options.progress;

  WeightStore store;
  if (placement.streams) {
    SHOAL_ASSIGN_OR_RETURN(
        store, OpenPart(checkpoint, layout, placement.host, placement.on_device, options));
    device.host_is_constant = !placement.host.streams();
  }
  SHOAL_ASSIGN_OR_RETURN(
      const WeightStore loader,
      OpenPart(checkpoint, layout, LoadOnce(layout, placement.on_device), streamed, options));
  if (store.origin.empty()) store.origin = loader.origin;
  SHOAL_ASSIGN_OR_RETURN(store.source, DeviceWeights::Create(backend, *loader.source,
                                                             std::move(store.source), device));
  return store;
}

}  // namespace shoal
