#include "kernels/backend.h"

#include <cstring>
#include <memory>
#include <utility>

#include "kernels/buffer.h"

namespace shoal {

absl::StatusOr<DeviceMemory> AllocateHost(int64_t bytes) {
  absl::StatusOr<Buffer> buffer = Buffer::Allocate(bytes);
  if (!buffer.ok()) return buffer.status();
  auto owner = std::make_shared<Buffer>(*std::move(buffer));
  uint8_t* const data = owner->data();
  return DeviceMemory(data, bytes, [owner](uint8_t*) {});
}

// A device that shares the host's memory: nothing is moved.

absl::StatusOr<DeviceMemory> Backend::Allocate(int64_t bytes) { return AllocateHost(bytes); }

absl::StatusOr<DeviceMemory> Backend::AllocateStaging(int64_t bytes) { return Allocate(bytes); }

void Backend::Copy(void* to, const void* from, int64_t bytes) {
  if (bytes > 0 && to != from) std::memcpy(to, from, bytes);
}

void Backend::Ffn(const LinearInput& input, int cols, RowCount rows, const FfnWeights& ffn,
                  float* gate, float* up, const LinearOutput& out) {
  const int64_t width = ffn.gate->shape.rows;
  Linear(input, cols, rows,
         {{ffn.gate, nullptr, gate, width, false}, {ffn.up, nullptr, up, width, false}});
  Linear(LinearInput::Gated(ffn.activation, gate, up, width), static_cast<int>(width), rows,
         {&out, 1});
}

const void* Backend::OnHost(const void* data, int64_t) { return data; }

const void* Backend::OnDevice(const void* data, int64_t) { return data; }

absl::StatusOr<std::unique_ptr<PeerMailbox>> Backend::MakeMailbox(int64_t) {
  return absl::UnimplementedError("the device has no memory of its own");
}

absl::StatusOr<std::unique_ptr<PeerSums>> Backend::MakePeerSums(PeerMemory, int, int) {
  return absl::UnimplementedError("the device has no kernels that exchange terms");
}

absl::StatusOr<std::unique_ptr<CopyEngine>> Backend::MakeCopies() {
  return absl::UnimplementedError("the device works in host memory: there is nothing to copy");
}

}  // namespace shoal
