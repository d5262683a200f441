#include "shard/forecast.h"

#include <algorithm>
#include <deque>
#include <utility>
#include <vector>

#include "offload/byte_ring.h"

namespace shoal {
namespace {

// What a pass asks for in turn.
struct Part {
  int64_t ring_bytes = 0;   // comes through the ring
  double demand_bytes = 0;  // is read while the pass waits (experts: the router has just chosen)
  double compute_s = 0;
};

// Passes that follow each other: a reader that fills the ring as far as it has room, and a pass
// that takes its parts from there.
class Simulation {
 public:
  Simulation(std::vector<Part> parts, int64_t ring_bytes, double read_rate, double read_slowdown,
             double compute_slowdown)
      : parts_(std::move(parts)),
        ring_(ring_bytes),
        read_rate_(read_rate),
        read_slowdown_(read_slowdown),
        compute_slowdown_(compute_slowdown) {
    for (const Part& p : parts_) {
      if (p.ring_bytes > 0) cycle_.push_back(p.ring_bytes);
    }
  }

  double SecondsOfPass(double idle_s) {
    constexpr int kPasses = 4;  // the first one finds an empty ring and does not count
    double start = 0;
    for (int pass = 0; pass < kPasses; ++pass) {
      if (pass == 1) start = now_;
      Elapse(idle_s, 1, 1);
      for (const Part& p : parts_) {
        if (p.ring_bytes > 0) WaitForFront();
        if (p.demand_bytes > 0) now_ += p.demand_bytes / read_rate_;
        Elapse(p.compute_s, read_slowdown_, compute_slowdown_);
        if (p.ring_bytes > 0) {
          ring_.Pop();
          left_.pop_front();
        }
      }
    }
    return (now_ - start) / (kPasses - 1) - idle_s;
  }

 private:
  void Place() {
    while (!cycle_.empty() && ring_.Push(cycle_[next_]).has_value()) {
      left_.push_back(static_cast<double>(cycle_[next_]) / read_rate_);
      next_ = (next_ + 1) % cycle_.size();
    }
  }
  // The part that is being read, or null: the ring is full.
  double* Reading() {
    Place();
    for (double& left : left_) {
      if (left > 0) return &left;
    }
    return nullptr;
  }
  void WaitForFront() {
    Place();
    while (left_.front() > 0) now_ += std::exchange(*Reading(), 0);
  }
  // `seconds` of work, longer while the reader is at work too.
  void Elapse(double seconds, double read_slowdown, double work_slowdown) {
    while (seconds > 0) {
      double* const left = Reading();
      if (left == nullptr) {
        now_ += seconds;
        return;
      }
      const double read_s = *left * read_slowdown, work_s = seconds * work_slowdown;
      const double both = std::min(read_s, work_s);
      now_ += both;
      *left = read_s <= work_s ? 0 : *left - both / read_slowdown;
      seconds = work_s <= read_s ? 0 : seconds - both / work_slowdown;
    }
  }

  const std::vector<Part> parts_;
  std::vector<int64_t> cycle_;
  size_t next_ = 0;          // of the cycle, to be placed
  ByteRing ring_;            // the parts in left_
  std::deque<double> left_;  // seconds of reading that each placed part still needs
  const double read_rate_, read_slowdown_, compute_slowdown_;
  double now_ = 0;
};

double Seconds(double bytes, double rate) { return rate > 0 ? bytes / rate : 0; }

// `rows` 0: a token of decode.
std::vector<Part> PartsOfPass(const WeightLayout& layout, const ModelConfig& config,
                              const Placement& placement, const MachineSpeed& speed,
                              const Workload& work, int rows) {
  const double used =
      config.experts > 0 ? static_cast<double>(config.experts_used) / config.experts : 0;
  const auto multiply = [&](double bytes) {
    return rows > 0 ? Seconds(bytes * rows, speed.prefill_bytes_per_s)
                    : Seconds(bytes, speed.decode_bytes_per_s);
  };
  double on_demand = 0, layers = 0;
  for (size_t i = 0; i < layout.units.size(); ++i) {
    const auto bytes = static_cast<double>(layout.units[i].bytes);
    if (placement.tiers[i] == Tier::kOnDemand) on_demand += bytes;
    layers += layout.units[i].kind == WeightUnit::Kind::kAttention ? 1 : 0;
  }
  std::vector<Part> parts;
  const WeightUnit* embedding = nullptr;
  Tier embedding_tier = Tier::kResident;
  int expert_layer = -1;
  for (size_t i = 0; i < layout.units.size(); ++i) {
    const WeightUnit& u = layout.units[i];
    const auto bytes = static_cast<double>(u.bytes);
    Part part;
    if (placement.tiers[i] == Tier::kStreamed) part.ring_bytes = u.bytes;
    switch (u.kind) {
      case WeightUnit::Kind::kEmbedding:
        embedding = &u;
        embedding_tier = placement.tiers[i];
        continue;
      case WeightUnit::Kind::kExpert: {
        if (u.layer != expert_layer) parts.push_back({});
        expert_layer = u.layer;
        Part& all = parts.back();
        all.compute_s += multiply(bytes * used);
        // A chunk of a prompt soon chooses every expert.
        if (placement.tiers[i] == Tier::kOnDemand) {
          all.demand_bytes +=
              rows > 0 ? bytes : bytes / on_demand * static_cast<double>(placement.demand_bytes);
        }
        continue;
      }
      case WeightUnit::Kind::kHead: {
        double head = bytes;
        if (u.Find(Role::kHead) == nullptr && embedding != nullptr) {  // tied
          head = static_cast<double>(embedding->bytes);
          part.ring_bytes = embedding_tier == Tier::kStreamed ? embedding->bytes : 0;
        }
        // Of a prompt only the last row has logits.
        part.compute_s = Seconds(head, speed.decode_bytes_per_s);
        break;
      }
      case WeightUnit::Kind::kAttention:
        part.compute_s = multiply(bytes) + speed.layer_s +
                         (rows > 0 ? Seconds(work.prefill_kv_bytes, speed.prefill_kv_bytes_per_s)
                                   : Seconds(work.kv_bytes, speed.kv_bytes_per_s)) /
                             std::max(1.0, layers);
        break;
      case WeightUnit::Kind::kFfn:
      case WeightUnit::Kind::kRouter:
        part.compute_s = multiply(bytes);
        break;
    }
    parts.push_back(part);
  }
  return parts;
}

}  // namespace

Forecast Predict(const WeightLayout& layout, const ModelConfig& config, const Placement& placement,
                 const MachineSpeed& speed, const Workload& work) {
  Forecast f;
  const auto pass = [&](int rows, double slowdown, double* compute_s) {
    std::vector<Part> parts = PartsOfPass(layout, config, placement, speed, work, rows);
    for (const Part& p : parts) *compute_s += p.compute_s;
    // A disk that was not measured is not waited for.
    if (speed.read_bytes_per_s <= 0 || !placement.streams()) return *compute_s;
    return Simulation(std::move(parts), placement.ring_bytes, speed.read_bytes_per_s,
                      speed.read_slowdown, slowdown)
        .SecondsOfPass(work.idle_s_before);
  };
  f.decode_s = pass(0, speed.decode_slowdown, &f.compute_s);
  f.stream_s = Seconds(static_cast<double>(placement.bytes_per_token()), speed.read_bytes_per_s);
  f.bound = f.stream_s > f.compute_s ? "reading weights" : "computing";
  double prefill_compute_s = 0;
  f.prefill_s = pass(work.rows, speed.prefill_slowdown, &prefill_compute_s);
  return f;
}

}  // namespace shoal
