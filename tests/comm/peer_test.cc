// When token-sized sums take the short way, when not, and what a peer's death does to them.
#include "comm/peer.h"

#include <cstring>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/backend.h"

namespace shoal {
namespace {

// A device whose memory is the host's; its mailboxes are pointers.
class PretendedMailbox final : public PeerMailbox {
 public:
  PretendedMailbox(int64_t slot_bytes, bool refuse, bool spoil)
      : slots_(slot_bytes * kSlots), slot_bytes_(slot_bytes), refuse_(refuse), spoil_(spoil) {}
  MailboxAddress address() const override {
    MailboxAddress a;
    const uint8_t* slots = slots_.data();
    std::memcpy(a.bytes, &slots, sizeof slots);
    return a;
  }
  absl::Status Connect(const MailboxAddress& peer) override {
    if (refuse_) return absl::UnavailableError("no way there");
    std::memcpy(&peer_, peer.bytes, sizeof peer_);
    return absl::OkStatus();
  }
  absl::Status Post(int slot, const void* data, int64_t bytes) override {
    ++posts;
    std::memcpy(peer_ + slot * slot_bytes_, data, bytes);
    if (spoil_) peer_[slot * slot_bytes_] ^= 0x40;
    return absl::OkStatus();
  }
  absl::StatusOr<const void*> Read(int slot) override { return slots_.data() + slot * slot_bytes_; }
  int posts = 0;

 private:
  std::vector<uint8_t> slots_;
  const int64_t slot_bytes_;
  const bool refuse_, spoil_;
  uint8_t* peer_ = nullptr;
};

class PretendedDevice final : public CpuBackend {
 public:
  PretendedDevice()
      : CpuBackend(CpuLevel::kScalar, *ThreadPool::Create({.threads = 1, .pin = false})) {}
  bool shares_host_memory() const override { return false; }
  absl::StatusOr<std::unique_ptr<PeerMailbox>> MakeMailbox(int64_t slot_bytes) override {
    if (lacks) return absl::UnimplementedError("no mailboxes here");
    auto made = std::make_unique<PretendedMailbox>(slot_bytes, refuse, spoil);
    box = made.get();
    return made;
  }
  bool lacks = false, refuse = false, spoil = false;
  PretendedMailbox* box = nullptr;
};

// Sums that take the way they had.
class CountingBase final : public Communicator {
 public:
  CountingBase(Communicator& host, int* sums) : host_(host), sums_(sums) {}
  int rank() const override { return host_.rank(); }
  int size() const override { return host_.size(); }
  std::string host(int rank) const override { return host_.host(rank); }
  absl::Status AllReduceSum(float* data, int64_t count, Wire wire) override {
    ++*sums_;
    return host_.AllReduceSum(data, count, wire);
  }
  double all_reduce_seconds() const override { return 0; }
  absl::Status AllGather(const void* data, int64_t bytes, void* out) override {
    return host_.AllGather(data, bytes, out);
  }
  absl::Status Broadcast(void* data, int64_t bytes, int root) override {
    return host_.Broadcast(data, bytes, root);
  }
  absl::Status Send(const void* data, int64_t bytes, int dest, int tag) override {
    return host_.Send(data, bytes, dest, tag);
  }
  absl::Status Recv(void* data, int64_t bytes, int source, int tag) override {
    return host_.Recv(data, bytes, source, tag);
  }
  absl::Status Barrier() override { return host_.Barrier(); }
  absl::StatusOr<std::unique_ptr<Communicator>> Split(int color, int key) override {
    return host_.Split(color, key);
  }
  void Abort(const absl::Status& reason) override { host_.Abort(reason); }

 private:
  Communicator& host_;
  int* const sums_;
};

struct Rank {
  PretendedDevice device;
  int base_sums = 0;
  PeerResult peer;
};

// Both ranks, each on a thread of its own; `body` after both are connected. What a rank has
// outlives both threads, as the driver keeps memory that a living process has mapped.
void WithRanks(const std::function<void(int, PretendedDevice&)>& prepare,
               const std::function<void(int, Rank&, Communicator&)>& body,
               absl::Duration stall = absl::Seconds(60)) {
  auto worlds = MakeInProcessCommunicators(2, stall);
  Rank ranks[2];
  const auto main = [&](int r) {
    Rank& rank = ranks[r];
    prepare(r, rank.device);
    auto peer = MakePeerCommunicator(std::make_unique<CountingBase>(*worlds[r], &rank.base_sums),
                                     *worlds[r], rank.device);
    ASSERT_TRUE(peer.ok()) << peer.status();
    rank.peer = *std::move(peer);
    body(r, rank, *worlds[r]);
  };
  std::thread other(main, 1);
  main(0);
  other.join();
}

void ExpectRightSums(int r, Communicator& c, int64_t count) {
  for (int round = 0; round < 5; ++round) {
    std::vector<float> data(count);
    for (int64_t i = 0; i < count; ++i) data[i] = static_cast<float>(i % 1000 + round + r);
    ASSERT_TRUE(c.AllReduceSum(data.data(), count, Wire::kF32).ok());
    for (int64_t i = 0; i < count; ++i) {
      ASSERT_EQ(data[i], static_cast<float>(2 * (i % 1000 + round) + 1)) << i;
    }
  }
}

TEST(Peer, SmallSumsTakeTheMailboxLargeOnesTheWayTheyHad) {
  WithRanks([](int, PretendedDevice&) {},
            [](int r, Rank& rank, Communicator& host) {
              EXPECT_EQ(rank.peer.why_not, "");
              const int trial = rank.device.box->posts;
              EXPECT_GT(trial, 2);
              ExpectRightSums(r, *rank.peer.communicator, kPeerSumBytes / 4);
              EXPECT_EQ(rank.device.box->posts, trial + 5);
              EXPECT_EQ(rank.base_sums, 0);
              ExpectRightSums(r, *rank.peer.communicator, kPeerSumBytes / 4 + 1);
              EXPECT_EQ(rank.device.box->posts, trial + 5);
              EXPECT_EQ(rank.base_sums, 5);
              ASSERT_TRUE(host.Barrier().ok());  // the peer reads this rank's memory
            });
}

TEST(Peer, WhatOneOfThemLacksNobodyUses) {
  struct Case {
    bool PretendedDevice::*what;
    const char* why;
  };
  for (const Case& c : {Case{&PretendedDevice::lacks, "no mailboxes here"},
                        Case{&PretendedDevice::refuse, "no way there"},
                        Case{&PretendedDevice::spoil, "a trial gave wrong sums"}}) {
    for (const int who : {0, 1}) {
      WithRanks([&](int r, PretendedDevice& d) { d.*c.what = r == who; },
                [&](int r, Rank& rank, Communicator& host) {
                  EXPECT_EQ(rank.peer.why_not, c.why);
                  ExpectRightSums(r, *rank.peer.communicator, 100);
                  EXPECT_EQ(rank.base_sums, 5);
                  ASSERT_TRUE(host.Barrier().ok());
                });
    }
  }
}

TEST(Peer, APeerThatEndsIsAnError) {
  WithRanks([](int, PretendedDevice&) {},
            [](int r, Rank& rank, Communicator& host) {
              host.Barrier().IgnoreError();  // both are connected; the other may have gone by now
              if (r == 1) return host.Abort(absl::UnavailableError("rank 1 was killed"));
              std::vector<float> data(100);
              const absl::Status s =
                  rank.peer.communicator->AllReduceSum(data.data(), 100, Wire::kF32);
              EXPECT_EQ(s.message(), "rank 1 was killed");
            });
}

TEST(Peer, APeerThatDoesNotComeIsAnErrorAfterTheHostsDeadline) {
  WithRanks([](int, PretendedDevice&) {},
            [](int r, Rank& rank, Communicator& host) {
              if (r == 1) {  // computes on and on
                while (host.Barrier().ok()) {
                }
                return;
              }
              std::vector<float> data(100);
              const absl::Status s =
                  rank.peer.communicator->AllReduceSum(data.data(), 100, Wire::kF32);
              EXPECT_FALSE(s.ok());
            },
            absl::Milliseconds(200));
}

TEST(Peer, SumsOfDifferentLengthAreAnError) {
  WithRanks([](int, PretendedDevice&) {},
            [](int r, Rank& rank, Communicator& host) {
              std::vector<float> data(100);
              const absl::Status s =
                  rank.peer.communicator->AllReduceSum(data.data(), 50 + r, Wire::kF32);
              EXPECT_EQ(s.code(), absl::StatusCode::kInternal) << s;
              ASSERT_TRUE(host.Barrier().ok());
            });
}

}  // namespace
}  // namespace shoal
