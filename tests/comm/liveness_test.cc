// Heartbeats between ranks that are objects of one process: who is told what when one goes.
#include "comm/liveness.h"

#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"

namespace shoal {
namespace {

using ::testing::HasSubstr;

// What one rank was told, and the wait for it.
class Inbox {
 public:
  void Put(const JobFailure& failure) {
    MutexLock lock(&mu_);
    failures_.push_back(failure);
    changed_.SignalAll();
  }
  // Fails the test after a minute.
  JobFailure Wait() {
    MutexLock lock(&mu_);
    const absl::Time deadline = absl::Now() + absl::Minutes(1);
    while (failures_.empty() && absl::Now() < deadline) changed_.WaitWithDeadline(&mu_, deadline);
    if (failures_.empty()) {
      ADD_FAILURE() << "was told nothing";
      return {};
    }
    return failures_.front();
  }
  size_t count() {
    MutexLock lock(&mu_);
    return failures_.size();
  }

 private:
  Mutex mu_;
  CondVar changed_;
  std::vector<JobFailure> failures_ ABSL_GUARDED_BY(mu_);
};

class LivenessTest : public ::testing::Test {
 protected:
  static LivenessOptions Options(int rank, int size) {
    LivenessOptions options;
    options.rank = rank;
    for (int r = 0; r < size; ++r)
      options.hosts.push_back(std::string(1, static_cast<char>('a' + r)));
    options.interval = absl::Milliseconds(50);
    options.silence = absl::Seconds(1);
    options.connect = absl::Seconds(20);
    return options;
  }

  // Rank 0 of a world of `size`; the others are added with Join.
  void Host(int size, absl::Duration connect = absl::Seconds(20),
            absl::Duration interval = absl::Milliseconds(50)) {
    absl::StatusOr<Liveness::Listener> listener = Liveness::Listen("127.0.0.1");
    ASSERT_TRUE(listener.ok()) << listener.status();
    invitation_ = listener->invitation;
    for (int r = 0; r < size; ++r) inboxes_.push_back(std::make_unique<Inbox>());
    ranks_.resize(size);
    LivenessOptions options = Options(0, size);
    options.connect = connect;
    options.interval = interval;
    ranks_[0] = Liveness::Host(options, *listener, Told(0));
  }
  void Join(int rank) {
    auto joined =
        Liveness::Join(Options(rank, static_cast<int>(ranks_.size())), invitation_, Told(rank));
    ASSERT_TRUE(joined.ok()) << joined.status();
    ranks_[rank] = *std::move(joined);
  }
  void HostAndJoinAll(int size) {
    Host(size);
    for (int r = 1; r < size; ++r) Join(r);
  }
  Liveness::OnFailure Told(int rank) {
    return [inbox = inboxes_[rank].get()](const JobFailure& failure) { inbox->Put(failure); };
  }
  Inbox& inbox(int rank) { return *inboxes_[rank]; }

  // A connection to rank 0 that says `bytes` and nothing more.
  int ConnectRaw(const std::string& bytes) {
    const int fd = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(invitation_.port);
    inet_pton(AF_INET, invitation_.address.data(), &address.sin_addr);
    EXPECT_EQ(connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
    EXPECT_EQ(send(fd, bytes.data(), bytes.size(), 0), static_cast<ssize_t>(bytes.size()));
    return fd;
  }
  // The hello frame that liveness.h describes.
  std::string Hello(int rank, const std::array<uint8_t, 16>& token) {
    struct {
      uint32_t magic = 0x564c4853;
      uint16_t kind = 1, code = 0;
      int32_t rank = 0;
      uint32_t text_bytes = 16;
    } header;
    header.rank = rank;
    std::string bytes(reinterpret_cast<const char*>(&header), sizeof header);
    bytes.append(reinterpret_cast<const char*>(token.data()), token.size());
    return bytes;
  }

  Invitation invitation_;
  std::vector<std::unique_ptr<Inbox>> inboxes_;
  std::vector<std::unique_ptr<Liveness>> ranks_;
};

TEST_F(LivenessTest, ADeadWorkerIsNamedToAllAndRankZeroReports) {
  HostAndJoinAll(4);
  ranks_[2].reset();  // closes without saying that it leaves
  for (int r : {0, 1, 3}) {
    const JobFailure failure = inbox(r).Wait();
    EXPECT_EQ(failure.rank, 2);
    EXPECT_TRUE(failure.is_loss);
    EXPECT_EQ(failure.is_reporter, r == 0);
    EXPECT_EQ(failure.status.code(), absl::StatusCode::kUnavailable);
    EXPECT_THAT(std::string(failure.status.message()), HasSubstr("rank 2 on host c was lost"));
  }
}

TEST_F(LivenessTest, DeadRankZeroIsSeenByAllAndTheNextReports) {
  HostAndJoinAll(3);
  ranks_[0].reset();
  for (int r : {1, 2}) {
    const JobFailure failure = inbox(r).Wait();
    EXPECT_EQ(failure.rank, 0);
    EXPECT_EQ(failure.is_reporter, r == 1);
    EXPECT_THAT(std::string(failure.status.message()), HasSubstr("rank 0 on host a was lost"));
  }
}

TEST_F(LivenessTest, AnOpenButSilentConnectionCountsAsLost) {
  Host(3);
  Join(1);
  const int fd = ConnectRaw(Hello(2, invitation_.token));
  const JobFailure failure = inbox(1).Wait();
  EXPECT_EQ(failure.rank, 2);
  EXPECT_THAT(std::string(failure.status.message()), HasSubstr("no sign of life"));
  EXPECT_EQ(inbox(0).Wait().rank, 2);
  close(fd);
}

// As after SIGSTOP and SIGCONT: rank 0 wakes, reads what came in the meantime, and finds the
// connection of those who gave it up closed.
TEST_F(LivenessTest, ARankThatSentNoBeatBlamesNobodyElse) {
  Host(2, absl::Seconds(20), /*interval=*/absl::Hours(1));
  Join(1);
  const JobFailure survivor = inbox(1).Wait();
  EXPECT_EQ(survivor.rank, 0);
  EXPECT_TRUE(survivor.is_reporter);
  ranks_[1].reset();
  const JobFailure own = inbox(0).Wait();
  EXPECT_EQ(own.rank, 0);
  EXPECT_FALSE(own.is_reporter);
  EXPECT_THAT(std::string(own.status.message()), HasSubstr("was stopped for"));
}

TEST_F(LivenessTest, ARankThatNeverJoinsIsNamed) {
  Host(3, absl::Milliseconds(300));
  Join(1);
  const JobFailure failure = inbox(0).Wait();
  EXPECT_EQ(failure.rank, 2);
  EXPECT_THAT(std::string(failure.status.message()), HasSubstr("did not reach rank 0"));
}

TEST_F(LivenessTest, AnAbortCarriesItsReasonToAllAndIsNoLoss) {
  HostAndJoinAll(3);
  ranks_[1]->Abort(absl::DataLossError("shard 1 is corrupt"));
  for (int r : {0, 1, 2}) {
    const JobFailure failure = inbox(r).Wait();
    EXPECT_EQ(failure.status.code(), absl::StatusCode::kDataLoss);
    EXPECT_THAT(std::string(failure.status.message()), HasSubstr("shard 1 is corrupt"));
    EXPECT_FALSE(failure.is_loss);
    EXPECT_EQ(failure.is_local, r == 1);
    EXPECT_EQ(failure.rank, 1);
  }
}

TEST_F(LivenessTest, LeavingIsNoFailureForThoseWhoStay) {
  HostAndJoinAll(3);
  ranks_[2]->Leave();
  while (!ranks_[0]->has_left(2) || !ranks_[1]->has_left(2)) std::this_thread::yield();
  ranks_[2].reset();
  EXPECT_FALSE(ranks_[0]->has_left(1));
  // The connection's end was seen by the time that a later frame of another rank has made its way.
  ranks_[1]->Abort(absl::CancelledError("done"));
  EXPECT_EQ(inbox(0).Wait().status.code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(inbox(2).count(), 0u);
}

TEST_F(LivenessTest, StrangersAreTurnedAwayAndTheJobGoesOn) {
  HostAndJoinAll(2);
  std::array<uint8_t, 16> wrong = invitation_.token;
  wrong[0] ^= 1;
  const std::string strangers[] = {
      "GET / HTTP/1.1\r\nHost: a\r\n\r\n", Hello(1, wrong),
      Hello(1, invitation_.token),  // rank 1 is here already
      Hello(99, invitation_.token),        std::string(5000, '\xff'),
  };
  for (const std::string& bytes : strangers) {
    const int fd = ConnectRaw(bytes);
    char answer;
    EXPECT_LE(recv(fd, &answer, 1, 0), 0);  // closed without an answer
    close(fd);
  }
  EXPECT_EQ(inbox(0).count(), 0u);
  EXPECT_EQ(inbox(1).count(), 0u);
  ranks_[1]->Abort(absl::CancelledError("still connected"));
  EXPECT_THAT(std::string(inbox(0).Wait().status.message()), HasSubstr("still connected"));
}

TEST_F(LivenessTest, JoiningNobodyIsAnErrorThatNamesTheAddress) {
  Invitation nobody{};
  std::strcpy(nobody.address.data(), "127.0.0.1");
  nobody.port = 1;  // reserved: nothing listens there
  auto joined = Liveness::Join(Options(1, 2), nobody, [](const JobFailure&) {});
  EXPECT_EQ(joined.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(joined.status().message()), HasSubstr("127.0.0.1:1"));
}

}  // namespace
}  // namespace shoal
