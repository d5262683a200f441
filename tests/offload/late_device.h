// A device whose orders, ops and copies, advance in any way that the fences allow.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "kernels/cpu/backend.h"

namespace shoal {

// Queues that run when somebody waits for them, or by chance. Fences are versions of a number, as
// CUDA's events are: a wait is for the latest mark before it.
class LateDevice final : public CopyEngine {
 public:
  explicit LateDevice(int seed) : LateDevice(std::make_shared<Orders>(seed)) {}
  // Another order of copies of the same device.
  LateDevice Another() const { return LateDevice(orders_); }

  absl::StatusOr<int> NewFence() override {
    marked_->push_back(0);
    passed_->push_back(0);
    return static_cast<int>(marked_->size()) - 1;
  }
  absl::Status Copy(uint8_t* to, const uint8_t* from, int64_t bytes) override {
    orders_->Enqueue(*copies_, [=] { std::memcpy(to, from, bytes); });
    return absl::OkStatus();
  }
  absl::Status CopyBack(uint8_t* to, const uint8_t* from, int64_t bytes) override {
    return Copy(to, from, bytes);
  }
  bool Pin(const uint8_t*, int64_t) override {
    ++pins;
    return may_pin;
  }
  absl::Status MarkCopies(int fence) override { return Mark(*copies_, fence); }
  absl::Status MarkOps(int fence) override { return Mark(orders_->ops, fence); }
  absl::Status OpsWaitFor(int fence) override { return Wait(orders_->ops, *copies_, fence); }
  absl::Status CopiesWaitFor(int fence) override { return Wait(*copies_, orders_->ops, fence); }
  absl::Status Await(int fence) override {
    Reach(*passed_, *copies_, fence, (*marked_)[fence]);
    return absl::OkStatus();
  }
  absl::Status EnterThread() override { return absl::OkStatus(); }

  void Op(std::function<void()> f) { orders_->Enqueue(orders_->ops, std::move(f)); }
  void Finish() {
    while (!orders_->ops.empty()) RunOne(orders_->ops);
    for (const auto& queue : orders_->copies) {
      while (!queue->empty()) RunOne(*queue);
    }
  }

  bool may_pin = true;
  int pins = 0;

 private:
  using Queue = std::deque<std::function<void()>>;
  using Versions = std::vector<int>;

  struct Orders {
    explicit Orders(int seed) : random(seed) {}
    void Enqueue(Queue& queue, std::function<void()> f) {
      queue.push_back(std::move(f));
      while (random() % 4 == 0) {
        const size_t any = random() % (copies.size() + 1);
        RunOne(any == 0 ? ops : *copies[any - 1]);
      }
    }
    std::mt19937 random;
    Queue ops;
    std::vector<std::shared_ptr<Queue>> copies;
  };

  explicit LateDevice(std::shared_ptr<Orders> orders) : orders_(std::move(orders)) {
    orders_->copies.push_back(copies_);
  }

  absl::Status Mark(Queue& queue, int fence) {
    const int version = ++(*marked_)[fence];
    orders_->Enqueue(queue, [passed = passed_, fence, version] { (*passed)[fence] = version; });
    return absl::OkStatus();
  }
  // The orders outlive what is in them; a queue may be waited for by another engine's.
  absl::Status Wait(Queue& queue, Queue& other, int fence) {
    const int version = (*marked_)[fence];
    orders_->Enqueue(queue, [passed = passed_, &other, fence, version] {
      Reach(*passed, other, fence, version);
    });
    return absl::OkStatus();
  }
  static void Reach(const Versions& passed, Queue& queue, int fence, int version) {
    while (passed[fence] < version) {
      ASSERT_FALSE(queue.empty()) << "a fence that nobody will pass";
      RunOne(queue);
    }
  }
  static void RunOne(Queue& queue) {
    if (queue.empty()) return;
    const std::function<void()> f = std::move(queue.front());
    queue.pop_front();
    f();
  }

  std::shared_ptr<Orders> orders_;
  std::shared_ptr<Queue> copies_ = std::make_shared<Queue>();
  std::shared_ptr<Versions> marked_ = std::make_shared<Versions>();
  std::shared_ptr<Versions> passed_ = std::make_shared<Versions>();
};

// The CPU's memory with a copy engine beside it.
class LateBackend final : public CpuBackend {
 public:
  explicit LateBackend(LateDevice& device)
      : CpuBackend(CpuLevel::kScalar, *ThreadPool::Create({.threads = 1, .pin = false})),
        device_(device) {}
  bool shares_host_memory() const override { return false; }
  CopyEngine* copies() override { return &device_; }
  absl::StatusOr<std::unique_ptr<CopyEngine>> MakeCopies() override {
    return std::make_unique<LateDevice>(device_.Another());
  }

 private:
  LateDevice& device_;
};

}  // namespace shoal
