// The ranks of a job as threads of one process: a message is a copy from the sender's buffer to the
// receiver's.
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "comm/communicator.h"
#include "comm/group.h"
#include "comm/host_name.h"
#include "comm/transport.h"
#include "kernels/check.h"
#include "kernels/mutex.h"

namespace shoal {
namespace {

// More than this many copied messages between two ranks make the sender wait.
constexpr size_t kCopiesInFlight = 64;

struct Message {
  enum class State { kQueued, kCopying, kDone };
  const uint8_t* data = nullptr;
  int64_t bytes = 0;
  int tag = 0;
  State state = State::kQueued;
  bool is_copy = false;
  std::vector<uint8_t> copy = {};  // what `data` points to when is_copy
};

struct Receive {
  uint8_t* data;
  int tag;
};

// What the ranks' transports share.
class Hub {
 public:
  Hub(int size, absl::Duration stall)
      : size_(size), stall_(stall), channels_(size * size), left_(size) {
    arrived_.reserve(size);
    for (int r = 0; r < size; ++r) arrived_.push_back(std::make_unique<CondVar>());
  }

  int size() const { return size_; }

  std::shared_ptr<Message> Post(Message message, int from, int to) {
    auto shared = std::make_shared<Message>(std::move(message));
    MutexLock lock(&mu_);
    channel(from, to).push_back(shared);
    arrived_[to]->Signal();
    return shared;
  }

  // A thread does not die alone: who waits for work waits until it comes, or a rank leaves or
  // aborts.
  absl::Status Wait(Pending* pending, int self, Patience patience) ABSL_LOCKS_EXCLUDED(mu_) {
    const absl::Time deadline =
        patience == Patience::kIdle ? absl::InfiniteFuture() : absl::Now() + stall_;
    MutexLock lock(&mu_);
    while (true) {
      absl::Status status = broken_;
      if (status.ok()) status = Progress(pending, self);
      if (status.ok() && pending->ops.empty()) return status;
      if (status.ok()) status = FindLeaver(*pending);
      if (status.ok() && arrived_[self]->WaitWithDeadline(&mu_, deadline) &&
          absl::Now() >= deadline) {
        const int peer = pending->ops.front().peer;
        status = absl::UnavailableError(absl::StrCat("rank ", peer, " on host ", HostName(),
                                                     " did not answer within ",
                                                     absl::FormatDuration(stall_)));
      }
      if (status.ok()) continue;
      BreakLocked(status);
      Withdraw(pending, self);
      return broken_;
    }
  }

  absl::Status WaitForRoom(int self, int to) ABSL_LOCKS_EXCLUDED(mu_) {
    const absl::Time deadline = absl::Now() + stall_;
    MutexLock lock(&mu_);
    while (broken_.ok()) {
      size_t copies = 0;
      for (const auto& message : channel(self, to)) copies += message->is_copy;
      if (copies < kCopiesInFlight) return absl::OkStatus();
      absl::Status status = LeftError(to);
      if (status.ok() && arrived_[self]->WaitWithDeadline(&mu_, deadline) &&
          absl::Now() >= deadline) {
        status = absl::UnavailableError(absl::StrCat("rank ", to, " on host ", HostName(),
                                                     " took no message within ",
                                                     absl::FormatDuration(stall_)));
      }
      if (!status.ok()) BreakLocked(status);
    }
    return broken_;
  }

  void Break(const absl::Status& reason) ABSL_LOCKS_EXCLUDED(mu_) {
    MutexLock lock(&mu_);
    BreakLocked(reason);
  }

  absl::Status broken() ABSL_LOCKS_EXCLUDED(mu_) {
    MutexLock lock(&mu_);
    return broken_;
  }

  void Leave(int rank) ABSL_LOCKS_EXCLUDED(mu_) {
    MutexLock lock(&mu_);
    left_[rank] = true;
    for (auto& cv : arrived_) cv->SignalAll();
  }

 private:
  using Channel = std::deque<std::shared_ptr<Message>>;
  Channel& channel(int from, int to) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return channels_[from * size_ + to];
  }

  // Completes what can be completed, in the order in which it was posted. A copy frees the lock, so
  // it starts over after one.
  absl::Status Progress(Pending* pending, int self) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    for (size_t i = 0; i < pending->ops.size();) {
      const Pending::Op op = pending->ops[i];
      bool done;
      if (op.is_recv) {
        absl::StatusOr<bool> taken = TakeMessage(op, self);
        if (!taken.ok()) return taken.status();
        done = *taken;
      } else {
        done = AsMessage(op)->state == Message::State::kDone;
      }
      if (done) {
        DeleteHandle(op);
        pending->ops.erase(pending->ops.begin() + i);
        if (op.is_recv) i = 0;
      } else {
        ++i;
      }
    }
    return absl::OkStatus();
  }

  // Copies the first queued message that fits the receive. The lock is free during the copy.
  absl::StatusOr<bool> TakeMessage(const Pending::Op& op, int self)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    const Receive& receive = *static_cast<Receive*>(op.handle);
    Channel& queue = channel(op.peer, self);
    for (size_t i = 0; i < queue.size(); ++i) {
      const std::shared_ptr<Message> message = queue[i];
      if (message->tag != receive.tag) continue;
      if (message->bytes != op.bytes) {
        return absl::InternalError(absl::StrCat("rank ", op.peer, " sent ", message->bytes,
                                                " bytes where rank ", self, " expects ", op.bytes));
      }
      queue.erase(queue.begin() + i);
      message->state = Message::State::kCopying;
      mu_.Unlock();
      std::memcpy(receive.data, message->data, op.bytes);
      mu_.Lock();
      message->state = Message::State::kDone;
      arrived_[op.peer]->Signal();
      return true;
    }
    return false;
  }

  absl::Status LeftError(int peer) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (!left_[peer]) return absl::OkStatus();
    return absl::UnavailableError(
        absl::StrCat("rank ", peer, " on host ", HostName(), " left the job"));
  }

  // What is pending with a rank that has left will never complete.
  absl::Status FindLeaver(const Pending& pending) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    for (const Pending::Op& op : pending.ops) {
      absl::Status status = LeftError(op.peer);
      if (!status.ok()) return status;
    }
    return absl::OkStatus();
  }

  void BreakLocked(const absl::Status& reason) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (!broken_.ok()) return;
    broken_ = reason;
    for (auto& cv : arrived_) cv->SignalAll();
  }

  // The caller's buffers are its own again after this.
  void Withdraw(Pending* pending, int self) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    for (const Pending::Op& op : pending->ops) {
      if (!op.is_recv) {
        const std::shared_ptr<Message> message = AsMessage(op);
        while (message->state == Message::State::kCopying) arrived_[self]->Wait(&mu_);
        std::erase(channel(self, op.peer), message);
      }
      DeleteHandle(op);
    }
    pending->ops.clear();
  }

  static std::shared_ptr<Message>& AsMessage(const Pending::Op& op) {
    return *static_cast<std::shared_ptr<Message>*>(op.handle);
  }
  static void DeleteHandle(const Pending::Op& op) {
    if (op.is_recv) {
      delete static_cast<Receive*>(op.handle);
    } else {
      delete static_cast<std::shared_ptr<Message>*>(op.handle);
    }
  }

  const int size_;
  const absl::Duration stall_;
  Mutex mu_;
  std::vector<Channel> channels_ ABSL_GUARDED_BY(mu_);  // [from, to]
  std::vector<bool> left_ ABSL_GUARDED_BY(mu_);
  absl::Status broken_ ABSL_GUARDED_BY(mu_);
  std::vector<std::unique_ptr<CondVar>> arrived_;  // something changed for this rank
};

class InProcessTransport final : public Transport {
 public:
  InProcessTransport(std::shared_ptr<Hub> hub, int rank) : hub_(std::move(hub)), rank_(rank) {}
  ~InProcessTransport() override { hub_->Leave(rank_); }

  int rank() const override { return rank_; }
  int size() const override { return hub_->size(); }
  std::string host(int) const override { return HostName(); }

  void StartSend(const void* data, int64_t bytes, int peer, int tag, Pending* pending) override {
    auto message = hub_->Post({static_cast<const uint8_t*>(data), bytes, tag}, rank_, peer);
    pending->ops.push_back({new std::shared_ptr<Message>(std::move(message)), bytes, peer, false});
  }

  void StartRecv(void* data, int64_t bytes, int peer, int tag, Pending* pending) override {
    pending->ops.push_back({new Receive{static_cast<uint8_t*>(data), tag}, bytes, peer, true});
  }

  absl::Status Wait(Pending* pending, Patience patience) override {
    return hub_->Wait(pending, rank_, patience);
  }

  absl::Status SendCopy(const void* data, int64_t bytes, int peer, int tag) override {
    absl::Status status = hub_->WaitForRoom(rank_, peer);
    if (!status.ok()) return status;
    Message message{nullptr, bytes, tag};
    const uint8_t* const begin = static_cast<const uint8_t*>(data);
    message.copy.assign(begin, begin + bytes);
    message.data = message.copy.data();
    message.is_copy = true;
    hub_->Post(std::move(message), rank_, peer);
    return absl::OkStatus();
  }

  void Break(const absl::Status& reason) override { hub_->Break(reason); }
  absl::Status broken() const override { return hub_->broken(); }

 private:
  const std::shared_ptr<Hub> hub_;
  const int rank_;
};

}  // namespace

std::vector<std::unique_ptr<Communicator>> MakeInProcessCommunicators(int size,
                                                                      absl::Duration stall) {
  SHOAL_CHECK(size >= 1, "a world needs at least one rank");
  auto hub = std::make_shared<Hub>(size, stall);
  std::vector<std::unique_ptr<Communicator>> ranks;
  for (int r = 0; r < size; ++r) {
    ranks.push_back(GroupCommunicator::World(std::make_shared<InProcessTransport>(hub, r)));
  }
  return ranks;
}

}  // namespace shoal
