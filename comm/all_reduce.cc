#include "comm/all_reduce.h"

#include <algorithm>
#include <cstdlib>
#include <new>

#include "comm/wire.h"
#include "kernels/check.h"

namespace shoal {
namespace {

constexpr int64_t kSumChunk = 512;  // floats: a chunk of the sum stays in the first-level cache

// Elements of one piece of a two-phase segment. 64 Ki floats: long enough to hide a message's
// latency on a 10 Gbit/s link, short enough that three slots of a few peers stay in the
// second-level cache's reach.
constexpr int64_t kPiece = 64 * 1024;

int64_t RoundUp(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// data = the sum of the ranks' arrays, added in rank order. contributions[r] is rank r's encoded
// array.
void SumInto(Wire wire, const std::vector<const uint8_t*>& contributions, int64_t count,
             float* data) {
  alignas(64) float sum[kSumChunk];
  for (int64_t begin = 0; begin < count; begin += kSumChunk) {
    const int64_t n = std::min(kSumChunk, count - begin);
    const int64_t offset = EncodedBytes(wire, begin);
    Decode(wire, contributions[0] + offset, n, sum);
    for (size_t r = 1; r < contributions.size(); ++r) {
      DecodeAdd(wire, contributions[r] + offset, n, sum);
    }
    std::copy_n(sum, n, data + begin);
  }
}

absl::Status OneShot(Group& group, float* data, int64_t count, Wire wire) {
  const int size = group.size();
  const int64_t bytes = EncodedBytes(wire, count);
  const int64_t stride = RoundUp(bytes, 64);
  uint8_t* const scratch = group.scratch.Get(size * stride);
  std::vector<const uint8_t*> contributions(size);
  Pending pending;
  for (int r = 0; r < size; ++r) {
    contributions[r] = scratch + r * stride;
    if (r == group.index) continue;
    group.transport->StartRecv(scratch + r * stride, bytes, group.members[r],
                               TagOf(group, Step::kScatter), &pending);
  }
  if (wire == Wire::kF32) {
    contributions[group.index] = reinterpret_cast<const uint8_t*>(data);
  } else {
    Encode(wire, data, count, scratch + group.index * stride);
  }
  for (int i = 1; i < size; ++i) {  // each rank begins with another peer
    const int r = (group.index + i) % size;
    group.transport->StartSend(contributions[group.index], bytes, group.members[r],
                               TagOf(group, Step::kScatter), &pending);
  }
  absl::Status status = group.transport->Wait(&pending, Patience::kWork);
  if (!status.ok()) return status;
  SumInto(wire, contributions, count, data);
  if (wire != Wire::kF32) {  // as a sum that travels, see TwoPhase
    Encode(wire, data, count, scratch);
    Decode(wire, scratch, count, data);
  }
  return absl::OkStatus();
}

// Pieces in flight, each with its own slot of buffers: one is scattered, one is summed, one is
// gathered.
constexpr int kSlots = 3;

// One two-phase all-reduce.
class TwoPhase {
 public:
  TwoPhase(Group& group, float* data, int64_t count, Wire wire)
      : group_(group), data_(data), wire_(wire), size_(group.size()) {
    const int64_t blocks = (count + kWireBlock - 1) / kWireBlock;
    begins_.resize(size_ + 1);
    int64_t longest = 0;
    for (int s = 0; s <= size_; ++s) {
      begins_[s] = std::min(count, blocks * s / size_ * kWireBlock);
      if (s > 0) longest = std::max(longest, begins_[s] - begins_[s - 1]);
    }
    pieces_ = (longest + kPiece - 1) / kPiece;
    stride_ = RoundUp(EncodedBytes(wire, std::min(kPiece, longest)), 64);
    scratch_ = group.scratch.Get(kSlots * 2 * size_ * stride_);
  }

  absl::Status Run() {
    absl::Status status;
    for (int64_t k = 0; status.ok() && k < pieces_ + 2; ++k) {
      if (k < pieces_) StartScatter(k);
      if (k >= 1 && k - 1 < pieces_) status = FinishScatter(k - 1);
      if (k >= 2 && status.ok()) status = FinishGather(k - 2);
    }
    if (!status.ok()) {  // withdraw what is still in flight
      for (int slot = 0; slot < kSlots; ++slot) {
        status.Update(group_.transport->Wait(&scatter_[slot], Patience::kWork));
        status.Update(group_.transport->Wait(&gather_[slot], Patience::kWork));
      }
    }
    return status;
  }

 private:
  struct Extent {
    int64_t begin;
    int64_t count;
  };

  Extent Piece(int segment, int64_t k) const {
    const int64_t begin = std::min(begins_[segment] + k * kPiece, begins_[segment + 1]);
    return {begin, std::min(kPiece, begins_[segment + 1] - begin)};
  }

  // What goes to (or is kept for) rank r, and what comes from it. In FinishScatter the first
  // becomes free, and the gather uses the buffers once more.
  uint8_t* Outgoing(int64_t k, int r) {
    return scratch_ + ((k % kSlots) * 2 * size_ + r) * stride_;
  }
  uint8_t* Incoming(int64_t k, int r) {
    return scratch_ + ((k % kSlots) * 2 * size_ + size_ + r) * stride_;
  }

  void StartScatter(int64_t k) {
    const Extent own = Piece(group_.index, k);
    if (own.count > 0) {
      for (int r = 0; r < size_; ++r) {
        if (r == group_.index) continue;
        group_.transport->StartRecv(Incoming(k, r), EncodedBytes(wire_, own.count),
                                    group_.members[r], TagOf(group_, Step::kScatter),
                                    &scatter_[k % kSlots]);
      }
    }
    for (int i = 1; i <= size_; ++i) {  // the own segment comes last
      const int r = (group_.index + i) % size_;
      const Extent piece = Piece(r, k);
      if (piece.count == 0) continue;
      const uint8_t* message = reinterpret_cast<const uint8_t*>(data_ + piece.begin);
      if (wire_ != Wire::kF32) {
        Encode(wire_, data_ + piece.begin, piece.count, Outgoing(k, r));
        message = Outgoing(k, r);
      }
      if (r == group_.index) continue;
      group_.transport->StartSend(message, EncodedBytes(wire_, piece.count), group_.members[r],
                                  TagOf(group_, Step::kScatter), &scatter_[k % kSlots]);
    }
  }

  absl::Status FinishScatter(int64_t k) {
    absl::Status status = group_.transport->Wait(&scatter_[k % kSlots], Patience::kWork);
    if (!status.ok()) return status;
    const Extent own = Piece(group_.index, k);
    float* const sum = data_ + own.begin;
    const uint8_t* message = reinterpret_cast<const uint8_t*>(sum);
    if (own.count > 0) {
      std::vector<const uint8_t*> contributions(size_);
      for (int r = 0; r < size_; ++r) contributions[r] = Incoming(k, r);
      contributions[group_.index] = wire_ == Wire::kF32 ? message : Outgoing(k, group_.index);
      SumInto(wire_, contributions, own.count, sum);
      if (wire_ != Wire::kF32) {
        Encode(wire_, sum, own.count, Outgoing(k, group_.index));
        Decode(wire_, Outgoing(k, group_.index), own.count, sum);
        message = Outgoing(k, group_.index);
      }
    }
    for (int i = 1; i < size_; ++i) {
      const int r = (group_.index + i) % size_;
      const Extent theirs = Piece(r, k);
      if (theirs.count > 0) {
        uint8_t* const in =
            wire_ == Wire::kF32 ? reinterpret_cast<uint8_t*>(data_ + theirs.begin) : Incoming(k, r);
        group_.transport->StartRecv(in, EncodedBytes(wire_, theirs.count), group_.members[r],
                                    TagOf(group_, Step::kGather), &gather_[k % kSlots]);
      }
      if (own.count > 0) {
        group_.transport->StartSend(message, EncodedBytes(wire_, own.count), group_.members[r],
                                    TagOf(group_, Step::kGather), &gather_[k % kSlots]);
      }
    }
    return absl::OkStatus();
  }

  absl::Status FinishGather(int64_t k) {
    absl::Status status = group_.transport->Wait(&gather_[k % kSlots], Patience::kWork);
    if (!status.ok() || wire_ == Wire::kF32) return status;
    for (int r = 0; r < size_; ++r) {
      if (r == group_.index) continue;
      const Extent theirs = Piece(r, k);
      Decode(wire_, Incoming(k, r), theirs.count, data_ + theirs.begin);
    }
    return absl::OkStatus();
  }

  Group& group_;
  float* const data_;
  const Wire wire_;
  const int size_;
  std::vector<int64_t> begins_;  // [size + 1] first element of each rank's segment, and the end
  int64_t pieces_;               // of the longest segment
  int64_t stride_;               // bytes between buffers
  uint8_t* scratch_;             // [kSlots, outgoing and incoming, size, stride]
  Pending scatter_[kSlots];
  Pending gather_[kSlots];
};

}  // namespace

uint8_t* Scratch::Get(int64_t bytes) {
  if (bytes > bytes_) {
    data_.reset();
    data_.reset(new (std::align_val_t(64)) uint8_t[bytes]);
    bytes_ = bytes;
  }
  return data_.get();
}

void Scratch::Free::operator()(uint8_t* p) const { ::operator delete[](p, std::align_val_t(64)); }

AllReduceAlgorithm ChooseAllReduce(int size, int64_t count, Wire wire) {
  // Two ranks send the same bytes either way, so one-shot wins until the double summing costs more
  // than the second latency; more ranks leave it earlier.
  const int64_t limit = size <= 2 ? 256 * 1024 : 64 * 1024 / (size - 1);
  return EncodedBytes(wire, count) <= limit ? AllReduceAlgorithm::kOneShot
                                            : AllReduceAlgorithm::kTwoPhase;
}

absl::Status AllReduceSum(Group& group, float* data, int64_t count, Wire wire,
                          AllReduceAlgorithm algorithm) {
  SHOAL_CHECK(count >= 0, "an all-reduce's count is negative");
  absl::Status status = group.transport->broken();
  if (!status.ok() || count == 0 || group.size() == 1) return status;
  if (algorithm == AllReduceAlgorithm::kAuto) {
    algorithm = ChooseAllReduce(group.size(), count, wire);
  }
  if (algorithm == AllReduceAlgorithm::kOneShot) return OneShot(group, data, count, wire);
  return TwoPhase(group, data, count, wire).Run();
}

}  // namespace shoal
