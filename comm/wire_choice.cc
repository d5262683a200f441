#include "comm/wire_choice.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <vector>

#include "kernels/status_macros.h"

namespace shoal {
namespace {

constexpr int kTag = 12;
constexpr int64_t kWarmUpBytes = 1 << 20;  // until TCP knows how much the link takes
constexpr int64_t kBytes = 4 << 20;

using Clock = std::chrono::steady_clock;

// Sent is not arrived: the answer says that the last byte is there.
absl::StatusOr<double> SendAndWait(Communicator& world, std::vector<uint8_t>& data, int64_t bytes,
                                   int to) {
  const Clock::time_point start = Clock::now();
  SHOAL_RETURN_IF_ERROR(world.Send(data.data(), bytes, to, kTag));
  uint8_t there = 0;
  SHOAL_RETURN_IF_ERROR(world.Recv(&there, sizeof there, to, kTag));
  return static_cast<double>(bytes) / 1e9 /
         std::chrono::duration<double>(Clock::now() - start).count();
}

absl::Status Answer(Communicator& world, std::vector<uint8_t>& data, int64_t bytes, int from) {
  SHOAL_RETURN_IF_ERROR(world.Recv(data.data(), bytes, from, kTag));
  const uint8_t there = 1;
  return world.Send(&there, sizeof there, from, kTag);
}

}  // namespace

Wire WireForLink(double gbps) {
  return gbps >= 25. / 8 ? Wire::kF32 : gbps >= 5. / 8 ? Wire::kF16 : Wire::kQ8;
}

absl::StatusOr<WireChoice> ChooseWire(Communicator& world, int tp) {
  const int rank = world.rank(), first = rank / tp * tp;
  std::vector<uint8_t> data;
  double slowest = 0;  // that this rank sent over
  for (int i = 0; i < tp && tp > 1; ++i) {
    const int from = first + i, to = first + (i + 1) % tp;
    if (world.host(from) != world.host(to)) {
      data.resize(kBytes);
      if (rank == from) {
        SHOAL_RETURN_IF_ERROR(SendAndWait(world, data, kWarmUpBytes, to).status());
        SHOAL_ASSIGN_OR_RETURN(slowest, SendAndWait(world, data, kBytes, to));
      } else if (rank == to) {
        SHOAL_RETURN_IF_ERROR(Answer(world, data, kWarmUpBytes, from));
        SHOAL_RETURN_IF_ERROR(Answer(world, data, kBytes, from));
      }
    }
    SHOAL_RETURN_IF_ERROR(world.Barrier());  // links do not disturb each other
  }
  std::vector<double> all(world.size());
  SHOAL_RETURN_IF_ERROR(world.AllGather(&slowest, sizeof slowest, all.data()));
  WireChoice choice;
  for (const double gbps : all) {
    if (gbps > 0) choice.link_gbps = choice.link_gbps > 0 ? std::min(choice.link_gbps, gbps) : gbps;
  }
  if (choice.link_gbps > 0) choice.wire = WireForLink(choice.link_gbps);
  return choice;
}

}  // namespace shoal
