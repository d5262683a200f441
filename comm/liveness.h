// Who of a job's ranks is alive: a star of TCP connections around rank 0, apart from the ranks'
// messages.
//
// A rank may compute for minutes between messages, so silence there means nothing. Here a thread of
// each rank sends a beat every half second; a stopped, hung-up or dead process sends none. Rank 0
// hears of it by the closed connection or by silence, and tells the others. Rank 0's own end is
// seen by each of them.
//
// Frames, little endian, both ways:
//   u32 magic 'SHLV' | u16 kind | u16 code | i32 rank | u32 text bytes (at most 1024) | text
//   hello  rank = sender, text = the job's 16-byte token; the first frame of a connection. A
//   stranger's connection
//          is closed without an answer.
//   beat   nothing
//   lost   rank = who was lost, text = why
//   abort  rank = who aborts, code = absl::StatusCode, text = the reason
//   left   rank = who left on purpose; its connection may close from now on
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "kernels/mutex.h"

namespace shoal {

struct LivenessOptions {
  int rank = 0;
  std::vector<std::string> hosts;  // by rank; its length is the world's size
  absl::Duration interval = absl::Milliseconds(500);
  absl::Duration silence = absl::Seconds(4);   // without a beat: lost
  absl::Duration connect = absl::Seconds(10);  // for all ranks to join
};

// What a rank needs to join; rank 0 makes it and hands it to the others by other means.
struct Invitation {
  std::array<char, 64> address;  // IPv4, in text, zero terminated
  uint16_t port;
  std::array<uint8_t, 16> token;
};

// The end of the job as one rank sees it.
struct JobFailure {
  absl::Status status;   // names the rank and its host
  int rank = -1;         // who is lost, or who aborted
  bool is_loss = false;  // died or hung, as opposed to aborted with a reason of its own
  bool is_local = false;
  bool is_reporter = false;  // this rank is the one that tells the user (the lowest survivor)
};

class Liveness {
 public:
  // Called once, from the liveness thread; must not destroy the Liveness.
  using OnFailure = std::function<void(const JobFailure&)>;

  // A listening socket and the invitation to it.
  struct Listener {
    int fd;
    Invitation invitation;
  };
  static absl::StatusOr<Listener> Listen(const std::string& address);

  // Rank 0: owns the listener; returns at once, ranks may join until the connect deadline.
  static std::unique_ptr<Liveness> Host(LivenessOptions options, const Listener& listener,
                                        OnFailure on_failure);
  // Other ranks: connects and says hello.
  static absl::StatusOr<std::unique_ptr<Liveness>> Join(LivenessOptions options,
                                                        const Invitation& invitation,
                                                        OnFailure on_failure);
  ~Liveness();  // stops the thread and closes; without Leave() the others count this rank as lost

  // Tells all ranks why the job ends. Only the first failure counts.
  void Abort(const absl::Status& reason);
  // Tells all ranks that this one goes on purpose. The thread goes on until destruction.
  void Leave();
  bool has_left(int rank) const { return left_[rank].load(std::memory_order_acquire); }

 private:
  struct Connection {
    int fd = -1;
    int peer = -1;  // -1: not introduced yet
    absl::Time heard;
    std::string received;
  };
  struct Frame;

  Liveness(LivenessOptions options, OnFailure on_failure);
  void Run();
  void Listen(absl::Duration patience);
  void Accept();
  void Read(Connection& connection);
  bool Introduce(Connection& connection, const Frame& frame);
  void HandleFrame(Connection& connection, const Frame& frame);
  void Close(Connection& connection, std::string_view why);
  void CheckSilence(absl::Time now);
  bool WasGivenUp();
  void Lose(int rank, std::string_view why);
  void Fail(const JobFailure& failure);
  void Send(const Frame& frame, int except = -1);
  void Wake();
  std::string Name(int rank) const;

  const LivenessOptions options_;
  const OnFailure on_failure_;
  std::array<uint8_t, 16> token_{};
  int listener_ = -1;
  const int wake_fd_;
  const absl::Time join_deadline_;
  std::vector<std::atomic<bool>> left_;

  // The thread's alone, once it runs.
  std::vector<Connection> connections_;
  std::string news_;  // rank 0: all that was sent to everyone, for ranks that join later
  std::vector<bool> joined_;
  absl::Time last_beat_;  // that a peer may have heard
  bool failed_ = false;

  Mutex mu_;
  bool stop_ ABSL_GUARDED_BY(mu_) = false;
  absl::Status abort_ ABSL_GUARDED_BY(mu_);
  std::thread thread_;
};

}  // namespace shoal
