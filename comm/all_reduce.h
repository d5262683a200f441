// Sum of float arrays over the ranks of a group, with the same bits on every rank.
//
// One-shot: every rank sends its whole encoded array to every other and sums all of them: one
// latency. Two-phase: segment s of the array is rank s's. Every rank sends segment s to rank s,
// which sums it and sends the sum to all: 2 (size-1)/size arrays per rank instead of size-1.
// Segments travel in pieces, so that the encoding and summing of one piece overlaps the sending of
// the next.
//
// Both add in rank order; each rank uses its own array as the others see it, that is encoded and
// decoded, and so is the sum. So an element (in q8 a block of kWireBlock, counted from the array's
// begin) has the same sum whatever stands beside it.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "comm/communicator.h"
#include "comm/transport.h"

namespace shoal {

enum class AllReduceAlgorithm : uint8_t { kAuto, kOneShot, kTwoPhase };

// Bytes for messages, kept between calls. Grows to the largest use.
class Scratch {
 public:
  // Valid until the next call, aligned to 64, not initialized.
  uint8_t* Get(int64_t bytes);

 private:
  struct Free {
    void operator()(uint8_t* p) const;
  };
  std::unique_ptr<uint8_t[], Free> data_;
  int64_t bytes_ = 0;
};

// Some ranks of a transport, and where in its tag space their messages live.
struct Group {
  Transport* transport;
  std::vector<int> members;  // transport ranks, in group order
  int index;                 // this rank's place in members
  int context;
  Scratch scratch;

  int size() const { return static_cast<int>(members.size()); }
};

// Tags of one context: the user's below kUserTags, the collectives' from there on.
inline constexpr int kUserTags = 1 << 15;
enum class Step { kUser = 0, kScatter = kUserTags, kGather, kBroadcast };
inline int TagOf(const Group& group, Step step, int tag = 0) {
  return group.context * kTagsPerContext + static_cast<int>(step) + tag;
}

// What kAuto takes. A function of its arguments alone: every rank must come to the same.
AllReduceAlgorithm ChooseAllReduce(int size, int64_t count, Wire wire);

// In place. `count` and `wire` are the same on every rank.
absl::Status AllReduceSum(Group& group, float* data, int64_t count, Wire wire,
                          AllReduceAlgorithm algorithm);

}  // namespace shoal
