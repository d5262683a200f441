// IoQueue over io_uring.
#include <errno.h>
#include <liburing.h>
#include <string.h>
#include <sys/uio.h>

#include <algorithm>
#include <mutex>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "offload/async_file.h"

namespace shoal {
namespace {

// The kernel takes at most 1 GiB in one registered buffer.
constexpr int64_t kRegisteredMax = 1 << 30;

// Held while rings are made and taken down. liburing maps their memory by plain system calls, which
// the thread sanitizer does not see: without an order that it knows of, a ring at the address of
// another thread's closed one looks like a race with it.
std::mutex ring_maps;

class UringQueue final : public IoQueue {
 public:
  ~UringQueue() override {
    if (!open_) return;
    std::lock_guard lock(ring_maps);
    io_uring_queue_exit(&ring_);
  }

  absl::Status Init(int depth) {
    std::lock_guard lock(ring_maps);
    int error = -io_uring_queue_init(depth, &ring_, 0);
    open_ = error == 0;
    if (!open_) return absl::UnavailableError(absl::StrCat("io_uring refused: ", strerror(error)));
    return absl::OkStatus();
  }

  void Push(const Op& op) override {
    io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
    SHOAL_CHECK(sqe != nullptr, "io_uring submission queue is full");
    int index = RegisteredIndex(op.data, op.bytes);
    unsigned n = static_cast<unsigned>(op.bytes);
    if (op.write && index >= 0) {
      io_uring_prep_write_fixed(sqe, op.fd, op.data, n, op.offset, index);
    } else if (op.write) {
      io_uring_prep_write(sqe, op.fd, op.data, n, op.offset);
    } else if (index >= 0) {
      io_uring_prep_read_fixed(sqe, op.fd, op.data, n, op.offset, index);
    } else {
      io_uring_prep_read(sqe, op.fd, op.data, n, op.offset);
    }
    io_uring_sqe_set_data64(sqe, op.id);
    // At once: a piece that waits for its batch leaves the disk idle.
    io_uring_submit(&ring_);
  }

  void Wait(std::vector<Result>* done) override {
    io_uring_cqe* cqe = nullptr;
    int error;
    do {
      error = io_uring_submit_and_wait(&ring_, 1);
    } while (error == -EINTR || error == -EAGAIN || error == -EBUSY);
    SHOAL_CHECK(error >= 0, "io_uring_enter failed");
    while (io_uring_peek_cqe(&ring_, &cqe) == 0) {
      done->push_back({io_uring_cqe_get_data64(cqe), cqe->res});
      io_uring_cqe_seen(&ring_, cqe);
    }
  }

  bool Register(uint8_t* data, int64_t bytes) override {
    if (!registered_.empty()) return false;
    std::vector<iovec> parts;
    for (int64_t at = 0; at < bytes; at += kRegisteredMax) {
      parts.push_back({data + at, static_cast<size_t>(std::min(kRegisteredMax, bytes - at))});
    }
    if (io_uring_register_buffers(&ring_, parts.data(), parts.size()) != 0) return false;
    registered_ = std::move(parts);
    return true;
  }

  std::string Describe() const override {
    return registered_.empty() ? "io_uring" : "io_uring with registered buffers";
  }

 private:
  int RegisteredIndex(const uint8_t* data, int64_t bytes) const {
    for (size_t i = 0; i < registered_.size(); i++) {
      const uint8_t* base = static_cast<const uint8_t*>(registered_[i].iov_base);
      if (data >= base && data + bytes <= base + registered_[i].iov_len) {
        return static_cast<int>(i);
      }
    }
    return -1;
  }

  io_uring ring_ = {};
  bool open_ = false;
  std::vector<iovec> registered_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<IoQueue>> MakeUringQueue(int depth) {
  auto queue = std::make_unique<UringQueue>();
  if (absl::Status s = queue->Init(depth); !s.ok()) return s;
  return std::unique_ptr<IoQueue>(std::move(queue));
}

}  // namespace shoal
