// Reads and writes of large aligned pieces of one file, many in flight: io_uring where the system
// allows it, else a few threads with pread / pwrite.
//
// The file is opened with O_DIRECT, so that streaming a model does not push everything else out of
// the page cache (and is not charged for it by the cgroup); a file system without O_DIRECT is read
// through the page cache, and what was read is dropped from it again.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace shoal {

inline constexpr int64_t kIoAlignment = 4096;      // of offsets, sizes and addresses
inline constexpr int64_t kIoPieceBytes = 1 << 20;  // what streams are cut into
inline constexpr int kIoDepthMax = 64;

enum class IoEngine : uint8_t { kAuto, kUring, kThreads };

// One read or write. All three numbers are multiples of kIoAlignment.
struct IoPiece {
  bool write = false;
  int64_t offset = 0;
  uint8_t* data = nullptr;  // valid until the piece is reported done
  int64_t bytes = 0;
  uint64_t tag = 0;
};

struct IoDone {
  uint64_t tag = 0;
  int64_t bytes = 0;
  absl::Status status;
};

// What carries pieces out. A transfer may be short; AsyncFile asks again for the rest.
class IoQueue {
 public:
  struct Op {
    bool write = false;
    int fd = -1;
    int64_t offset = 0;
    uint8_t* data = nullptr;
    int64_t bytes = 0;
    uint64_t id = 0;
  };
  struct Result {
    uint64_t id = 0;
    int64_t result = 0;  // bytes moved, or -errno
  };
  virtual ~IoQueue() = default;
  virtual void Push(const Op& op) = 0;
  // Blocks until at least one operation is done. REQUIRES: one is in flight.
  virtual void Wait(std::vector<Result>* done) = 0;
  // Pins memory so that the kernel need not look its pages up for each piece. False when refused:
  // all works as before.
  virtual bool Register(uint8_t* data, int64_t bytes) = 0;
  virtual std::string Describe() const = 0;
};
// kUnavailable with the reason where io_uring is not there or not allowed (old kernel, seccomp,
// containers).
absl::StatusOr<std::unique_ptr<IoQueue>> MakeUringQueue(int depth);
std::unique_ptr<IoQueue> MakeThreadQueue(int threads);

// Owned and called by one thread at a time.
class AsyncFile {
 public:
  struct Options {
    bool write = false;   // else read only
    bool create = false;  // with write: make the file, or empty it
    IoEngine engine = IoEngine::kAuto;
    // Tests: a non-zero errno fails the piece instead of doing it.
    std::function<int(const IoPiece&)> fault;
  };
  // kNotFound, kPermissionDenied, kUnavailable (engine asked for by name and refused), kInternal.
  static absl::StatusOr<std::unique_ptr<AsyncFile>> Open(const std::string& path,
                                                         const Options& options);
  ~AsyncFile();  // waits for what is in flight
  AsyncFile(const AsyncFile&) = delete;
  AsyncFile& operator=(const AsyncFile&) = delete;

  // REQUIRES: in_flight() < kIoDepthMax.
  void Submit(const IoPiece& piece);
  // Blocks until at least one piece is done and appends all that are. REQUIRES: in_flight() > 0.
  void Wait(std::vector<IoDone>* done);
  int in_flight() const { return in_flight_; }

  // Reads or writes a whole range, `depth` pieces at a time, and waits. REQUIRES: nothing in
  // flight.
  absl::Status Transfer(bool write, int64_t offset, uint8_t* data, int64_t bytes, int depth = 8);
  absl::Status Sync();
  // Sets the space of a part of a file that is being written aside. kResourceExhausted when the
  // disk has less.
  absl::Status Reserve(int64_t offset, int64_t bytes);
  bool Register(uint8_t* data, int64_t bytes) { return queue_->Register(data, bytes); }

  int64_t size() const { return size_; }  // when it was opened
  const std::string& path() const { return path_; }
  std::string Describe() const;  // "io_uring, direct"

 private:
  struct Slot {
    IoPiece piece;
    int64_t moved = 0;
    int retries = 0;
    int fault = 0;
    bool used = false;
  };
  AsyncFile() = default;
  void Push(int slot);
  bool Finish(int slot, int64_t result, IoDone* done);  // false: pushed again for the rest

  std::string path_;
  int fd_ = -1;
  bool direct_ = false;
  int64_t size_ = 0;
  int in_flight_ = 0;
  std::vector<Slot> slots_;
  std::vector<int> faulted_;
  std::vector<IoQueue::Result> results_;
  std::function<int(const IoPiece&)> fault_;
  std::string engine_note_;
  std::unique_ptr<IoQueue> queue_;
};

// Finds how many pieces in flight read fastest, while the stream runs.
class DepthTuner {
 public:
  int depth() const { return depth_; }
  bool done() const { return done_; }
  // Report every completion; `saturated` is false when there was less to do than depth() pieces,
  // which starts the measurement again. now_s is any monotonic clock.
  void OnBytes(int64_t bytes, bool saturated, double now_s);

 private:
  static constexpr int kCandidates[] = {4, 8, 2, 16, 32};
  static constexpr int kRounds = 2;
  static constexpr int64_t kWindowBytes = 48 << 20;
  int depth_ = kCandidates[0];
  int step_ = 0;
  bool done_ = false;
  int64_t bytes_ = -1;  // of this window; -1: not started
  double start_s_ = 0;
  double best_rate_[std::size(kCandidates)] = {};
};

}  // namespace shoal
