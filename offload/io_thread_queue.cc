// IoQueue over a few threads with pread and pwrite: where io_uring is not allowed.
#include <errno.h>
#include <unistd.h>

#include <deque>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "kernels/mutex.h"
#include "offload/async_file.h"

namespace shoal {
namespace {

class ThreadQueue final : public IoQueue {
 public:
  explicit ThreadQueue(int threads) {
    for (int i = 0; i < threads; i++) threads_.emplace_back([this] { Run(); });
  }

  ~ThreadQueue() override {
    {
      MutexLock lock(&mu_);
      stop_ = true;
      todo_cv_.SignalAll();
    }
    for (std::thread& t : threads_) t.join();
  }

  void Push(const Op& op) override {
    MutexLock lock(&mu_);
    todo_.push_back(op);
    todo_cv_.Signal();
  }

  void Wait(std::vector<Result>* done) override {
    MutexLock lock(&mu_);
    while (done_.empty()) done_cv_.Wait(&mu_);
    done->insert(done->end(), done_.begin(), done_.end());
    done_.clear();
  }

  bool Register(uint8_t*, int64_t) override { return false; }
  std::string Describe() const override { return absl::StrCat(threads_.size(), " pread threads"); }

 private:
  void Run() {
    MutexLock lock(&mu_);
    while (true) {
      while (!stop_ && todo_.empty()) todo_cv_.Wait(&mu_);
      if (todo_.empty()) return;
      Op op = todo_.front();
      todo_.pop_front();
      mu_.Unlock();
      ssize_t n = op.write ? pwrite(op.fd, op.data, op.bytes, op.offset)
                           : pread(op.fd, op.data, op.bytes, op.offset);
      int64_t result = n < 0 ? -errno : n;
      mu_.Lock();
      done_.push_back({op.id, result});
      done_cv_.Signal();
    }
  }

  Mutex mu_;
  CondVar todo_cv_, done_cv_;
  bool stop_ ABSL_GUARDED_BY(mu_) = false;
  std::deque<Op> todo_ ABSL_GUARDED_BY(mu_);
  std::vector<Result> done_ ABSL_GUARDED_BY(mu_);
  std::vector<std::thread> threads_;
};

}  // namespace

std::unique_ptr<IoQueue> MakeThreadQueue(int threads) {
  return std::make_unique<ThreadQueue>(threads);
}

}  // namespace shoal
