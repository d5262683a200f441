#include "comm/group.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"

namespace shoal {
namespace {

constexpr int64_t kBroadcastPiece =
    256 * 1024;  // a longer broadcast travels down a chain in pieces

}  // namespace

GroupCommunicator::GroupCommunicator(std::shared_ptr<Transport> transport, std::vector<int> members,
                                     int index, int context)
    : transport_(std::move(transport)),
      group_{transport_.get(), std::move(members), index, context, {}} {}

std::unique_ptr<GroupCommunicator> GroupCommunicator::World(std::shared_ptr<Transport> transport) {
  std::vector<int> members(transport->size());
  std::iota(members.begin(), members.end(), 0);
  const int rank = transport->rank();
  return std::unique_ptr<GroupCommunicator>(
      new GroupCommunicator(std::move(transport), std::move(members), rank, 0));
}

std::string GroupCommunicator::host(int rank) const {
  SHOAL_CHECK(rank >= 0 && rank < size(), "no such rank");
  return transport_->host(group_.members[rank]);
}

absl::Status GroupCommunicator::AllReduceSum(float* data, int64_t count, Wire wire) {
  const auto start = std::chrono::steady_clock::now();
  absl::Status status = shoal::AllReduceSum(group_, data, count, wire, algorithm_);
  all_reduce_time_ += absl::FromChrono(std::chrono::steady_clock::now() - start);
  return status;
}

absl::Status GroupCommunicator::AllGather(const void* data, int64_t bytes, void* out) {
  SHOAL_CHECK(bytes >= 0, "an all-gather's length is negative");
  absl::Status status = transport_->broken();
  if (!status.ok() || bytes == 0) return status;
  uint8_t* const parts = static_cast<uint8_t*>(out);
  uint8_t* const own = parts + group_.index * bytes;
  if (own != data) std::memcpy(own, data, bytes);
  Pending pending;
  for (int i = 1; i < size(); ++i) {
    const int r = (group_.index + i) % size();
    transport_->StartRecv(parts + r * bytes, bytes, group_.members[r], TagOf(group_, Step::kGather),
                          &pending);
  }
  for (int i = 1; i < size(); ++i) {
    const int r = (group_.index + i) % size();
    transport_->StartSend(own, bytes, group_.members[r], TagOf(group_, Step::kGather), &pending);
  }
  return transport_->Wait(&pending, Patience::kWork);
}

absl::Status GroupCommunicator::Broadcast(void* data, int64_t bytes, int root) {
  SHOAL_CHECK(bytes >= 0, "a broadcast's length is negative");
  SHOAL_CHECK(root >= 0 && root < size(), "no such root");
  absl::Status status = transport_->broken();
  if (!status.ok() || bytes == 0 || size() == 1) return status;
  const int tag = TagOf(group_, Step::kBroadcast);
  if (bytes <= kBroadcastPiece) {
    Pending pending;
    if (rank() != root) {
      transport_->StartRecv(data, bytes, group_.members[root], tag, &pending);
      return transport_->Wait(&pending, Patience::kIdle);
    }
    for (int r = 0; r < size(); ++r) {
      if (r != root) transport_->StartSend(data, bytes, group_.members[r], tag, &pending);
    }
    return transport_->Wait(&pending, Patience::kWork);
  }
  // root -> root+1 -> ...: each rank passes a piece on while it receives the next.
  const int place = (rank() - root + size()) % size();
  uint8_t* const begin = static_cast<uint8_t*>(data);
  Pending sends;
  for (int64_t offset = 0; offset < bytes; offset += kBroadcastPiece) {
    const int64_t n = std::min(kBroadcastPiece, bytes - offset);
    if (place > 0) {
      Pending recv;
      transport_->StartRecv(begin + offset, n, group_.members[(rank() + size() - 1) % size()], tag,
                            &recv);
      status = transport_->Wait(&recv, offset == 0 ? Patience::kIdle : Patience::kWork);
      if (!status.ok()) break;
    }
    if (place < size() - 1) {
      transport_->StartSend(begin + offset, n, group_.members[(rank() + 1) % size()], tag, &sends);
    }
  }
  status.Update(transport_->Wait(&sends, Patience::kWork));
  return status;
}

absl::Status GroupCommunicator::CheckPeer(int peer, int tag) const {
  SHOAL_CHECK(peer >= 0 && peer < size() && peer != rank(), "no such peer");
  SHOAL_CHECK(tag >= 0 && tag < kUserTags, "message tags are 0 to 32767");
  return transport_->broken();
}

absl::Status GroupCommunicator::Send(const void* data, int64_t bytes, int dest, int tag) {
  absl::Status status = CheckPeer(dest, tag);
  if (!status.ok() || bytes == 0) return status;
  return transport_->SendCopy(data, bytes, group_.members[dest], TagOf(group_, Step::kUser, tag));
}

absl::Status GroupCommunicator::Recv(void* data, int64_t bytes, int source, int tag) {
  absl::Status status = CheckPeer(source, tag);
  if (!status.ok() || bytes == 0) return status;
  Pending pending;
  transport_->StartRecv(data, bytes, group_.members[source], TagOf(group_, Step::kUser, tag),
                        &pending);
  return transport_->Wait(&pending, Patience::kIdle);
}

absl::Status GroupCommunicator::Barrier() {
  std::vector<uint8_t> all(size());
  const uint8_t here = 1;
  return AllGather(&here, 1, all.data());
}

absl::StatusOr<std::unique_ptr<Communicator>> GroupCommunicator::Split(int color, int key) {
  struct Wish {
    int32_t color, key, rank, next_context;
  };
  static_assert(sizeof(Wish) == 16);
  const Wish own{color, key, group_.index, transport_->next_context};
  std::vector<Wish> wishes(size());
  absl::Status status = AllGather(&own, sizeof own, wishes.data());
  if (!status.ok()) return status;

  // A number that none of these ranks has used yet. Groups of different colors share no rank, so
  // they may share it.
  int context = 0;
  for (const Wish& wish : wishes) context = std::max(context, wish.next_context);
  if (context >= kContexts) {
    return absl::ResourceExhaustedError(
        absl::StrCat("more than ", kContexts - 1, " communicators were split off in this job"));
  }
  transport_->next_context = context + 1;

  std::erase_if(wishes, [color](const Wish& wish) { return wish.color != color; });
  std::sort(wishes.begin(), wishes.end(), [](const Wish& a, const Wish& b) {
    return std::pair(a.key, a.rank) < std::pair(b.key, b.rank);
  });
  std::vector<int> members;
  int index = 0;
  for (const Wish& wish : wishes) {
    if (wish.rank == group_.index) index = static_cast<int>(members.size());
    members.push_back(group_.members[wish.rank]);
  }
  return std::unique_ptr<Communicator>(
      new GroupCommunicator(transport_, std::move(members), index, context));
}

void GroupCommunicator::Abort(const absl::Status& reason) { transport_->Break(reason); }

}  // namespace shoal
