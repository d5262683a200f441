#include "comm/link_bench.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <utility>

#include "kernels/status_macros.h"

namespace shoal {
namespace {

constexpr int kAllPairsMax = 8;
constexpr int kPings = 200;
constexpr int64_t kLargeBytes = 4 << 20;
constexpr int kLargeRepeats = 16;
constexpr int kTag = 11;
using Clock = std::chrono::steady_clock;

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// The side that measures.
absl::Status Ping(Communicator& comm, int peer, std::vector<uint8_t>& buffer, double out[2]) {
  std::vector<double> trips;
  uint32_t word = 0;
  for (int i = 0; i < kPings; ++i) {
    const Clock::time_point start = Clock::now();
    SHOAL_RETURN_IF_ERROR(comm.Send(&word, sizeof word, peer, kTag));
    SHOAL_RETURN_IF_ERROR(comm.Recv(&word, sizeof word, peer, kTag));
    trips.push_back(SecondsSince(start));
  }
  std::nth_element(trips.begin(), trips.begin() + kPings / 2, trips.end());
  out[0] = trips[kPings / 2] / 2 * 1e6;
  const Clock::time_point start = Clock::now();
  for (int i = 0; i < kLargeRepeats; ++i) {
    SHOAL_RETURN_IF_ERROR(comm.Send(buffer.data(), kLargeBytes, peer, kTag));
  }
  // Sent is not arrived: the answer says that the last byte is there.
  SHOAL_RETURN_IF_ERROR(comm.Recv(&word, sizeof word, peer, kTag));
  out[1] = static_cast<double>(kLargeBytes) * kLargeRepeats / SecondsSince(start) / 1e9;
  return absl::OkStatus();
}

absl::Status Pong(Communicator& comm, int peer, std::vector<uint8_t>& buffer) {
  uint32_t word = 0;
  for (int i = 0; i < kPings; ++i) {
    SHOAL_RETURN_IF_ERROR(comm.Recv(&word, sizeof word, peer, kTag));
    SHOAL_RETURN_IF_ERROR(comm.Send(&word, sizeof word, peer, kTag));
  }
  for (int i = 0; i < kLargeRepeats; ++i) {
    SHOAL_RETURN_IF_ERROR(comm.Recv(buffer.data(), kLargeBytes, peer, kTag));
  }
  return comm.Send(&word, sizeof word, peer, kTag);
}

}  // namespace

absl::StatusOr<std::vector<LinkSpeed>> RunLinkBench(Communicator& comm) {
  std::vector<uint8_t> buffer(kLargeBytes);
  std::vector<LinkSpeed> links;
  const int measuring = comm.size() <= kAllPairsMax ? comm.size() : 1;
  for (int a = 0; a < measuring; ++a) {
    for (int b = a + 1; b < comm.size(); ++b) {
      double result[2] = {};
      if (comm.rank() == a) SHOAL_RETURN_IF_ERROR(Ping(comm, b, buffer, result));
      if (comm.rank() == b) SHOAL_RETURN_IF_ERROR(Pong(comm, a, buffer));
      // The other ranks wait here, so that pairs do not disturb each other.
      SHOAL_RETURN_IF_ERROR(comm.Broadcast(result, sizeof result, a));
      if (comm.rank() == 0) {
        links.push_back({a, b, comm.host(a), comm.host(b), result[0], result[1]});
      }
    }
  }
  return links;
}

}  // namespace shoal
