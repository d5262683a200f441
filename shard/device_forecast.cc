#include "shard/device_forecast.h"

#include <algorithm>

namespace shoal {
namespace {

// What the kernels reach, from the one chip that they ran on (kernels/cuda/README.md): whole models
// of 8B in Q4_0 and Q8_0 on an H200 follow from these within 10 %.
constexpr double kDecodeShare = 0.8;      // of the memory, by large products of one row
constexpr double kLayerSeconds = 33e-6;   // besides: starts of kernels, ends of grids
constexpr double kPrefillShare = 0.47;    // of the products
constexpr double kKvShare = 0.3;          // of the memory, by attention of one row
constexpr double kAttentionShare = 0.12;  // of the products, by attention of a prompt

}  // namespace

MachineSpeed SpeedOnDevice(const DeviceSpeed& device, const DeviceWork& work) {
  MachineSpeed s;
  s.read_bytes_per_s = device.link_bytes_per_s;
  s.decode_bytes_per_s = kDecodeShare * device.read_bytes_per_s;
  s.kv_bytes_per_s = kKvShare * device.read_bytes_per_s;
  s.layer_s = kLayerSeconds;
  s.prefill_bytes_per_s =
      kPrefillShare * device.operations_per_s / 2 * std::max(0.0, work.bytes_per_weight);
  if (work.attention_operations > 0) {
    s.prefill_kv_bytes_per_s = kAttentionShare * device.operations_per_s * work.kv_bytes_per_token /
                               work.attention_operations;
  }
  return s;
}

Forecast PredictOnDevice(const WeightLayout& layout, const ModelConfig& config,
                         const DevicePlacement& placement, const DeviceSpeed& device,
                         const DeviceWork& device_work, double disk_bytes_per_s,
                         const Workload& work) {
  MachineSpeed speed = SpeedOnDevice(device, device_work);
  Placement streamed = placement.device;
  streamed.ring_bytes = placement.ring_slots * placement.ring_slot_bytes;
  const auto sent = static_cast<double>(streamed.bytes_per_token());
  const auto read = static_cast<double>(placement.host.bytes_per_token());
  const bool by_disk =
      read > 0 && disk_bytes_per_s > 0 &&
      (device.link_bytes_per_s <= 0 || read / disk_bytes_per_s > sent / device.link_bytes_per_s);
  // The disk is read while the link sends: the slower of the two sets the pace of all that is sent.
  if (by_disk) speed.read_bytes_per_s = sent * disk_bytes_per_s / read;
  Forecast f = Predict(layout, config, streamed, speed, work);
  if (f.stream_s > f.compute_s) {
    f.bound = by_disk ? "reading weights" : "the link to the GPU";
  } else {
    f.bound = "the GPU's memory";
  }
  return f;
}

}  // namespace shoal
