#include "shard/placement.h"

#include <algorithm>
#include <optional>

#include "absl/strings/str_cat.h"

namespace shoal {
namespace {

constexpr int64_t kPage = 4096;
// Units below this stay: a request of its own would take longer than what it reads.
constexpr int64_t kSmallUnit = 1 << 20;
// Of the ring, in largest parts.
constexpr int kRingParts = 2;

int64_t PageUp(int64_t n) { return (n + kPage - 1) / kPage * kPage; }

// What is known of a layout before a budget is.
struct Parts {
  int64_t total = 0;           // all units
  int64_t small = 0;           // units that always stay
  int64_t rows = 0;            // staging of embedding rows when the embedding does not stay
  int64_t streamable = 0;      // bytes of all streamable units
  std::vector<int64_t> sizes;  // of the streamable units, smallest first
  int64_t experts = 0;         // bytes of all experts
  int64_t expert = 0;          // the largest one
  int expert_units = 0;
  int embedding = -1;
  bool tied = false;  // the head is the embedding unit
};

bool IsExpert(const WeightUnit& u) { return u.kind == WeightUnit::Kind::kExpert; }
bool IsEmbedding(const WeightUnit& u) { return u.kind == WeightUnit::Kind::kEmbedding; }
bool IsSmall(const WeightUnit& u) {
  return u.bytes < kSmallUnit || u.kind == WeightUnit::Kind::kRouter;
}

Parts Measure(const WeightLayout& layout, int rows) {
  Parts p;
  for (size_t i = 0; i < layout.units.size(); ++i) {
    const WeightUnit& u = layout.units[i];
    const int64_t bytes = PageUp(u.bytes);
    p.total += bytes;
    if (u.kind == WeightUnit::Kind::kHead) p.tied = u.Find(Role::kHead) == nullptr;
    if (IsExpert(u)) {
      p.experts += bytes;
      p.expert = std::max(p.expert, bytes);
      ++p.expert_units;
    } else if (IsEmbedding(u) && !IsSmall(u)) {
      p.embedding = static_cast<int>(i);
      const PackedShape& shape = u.extents[0].shape;
      p.rows = std::min<int64_t>(rows, shape.panels()) * (shape.panel_bytes() + 2 * kPage);
    } else if (IsSmall(u)) {
      p.small += bytes;
    }
  }
  for (size_t i = 0; i < layout.units.size(); ++i) {
    const WeightUnit& u = layout.units[i];
    const bool head = static_cast<int>(i) == p.embedding && p.tied;
    if (IsExpert(u) || IsSmall(u) || (IsEmbedding(u) && !head)) continue;
    p.streamable += PageUp(u.bytes);
    p.sizes.push_back(PageUp(u.bytes));
  }
  std::sort(p.sizes.begin(), p.sizes.end());
  return p;
}

// Marks about `share` of the bytes of some units as staying, so that those which do not are spread
// evenly.
class Spreader {
 public:
  explicit Spreader(double share) : share_(share) {}
  bool Stays(int64_t bytes) {
    seen_ += bytes;
    const bool stays = kept_ + bytes <= share_ * seen_;
    if (stays) kept_ += bytes;
    return stays;
  }

 private:
  const double share_;
  double seen_ = 0, kept_ = 0;
};

class Placer {
 public:
  Placer(const WeightLayout& layout, const ModelConfig& config, int64_t budget, int rows)
      : layout_(layout), config_(config), budget_(budget), parts_(Measure(layout, rows)) {
    p_.tiers.assign(layout.units.size(), Tier::kResident);
    p_.total_bytes = parts_.total;
  }

  int64_t Least() const {
    if (parts_.streamable + parts_.experts == 0) return parts_.total;
    return std::min(parts_.total,
                    parts_.small + parts_.rows + LeastCycleBytes() + LeastSlots() * parts_.expert);
  }

  absl::StatusOr<Placement> Place() {
    if (parts_.total > budget_) {
      if (budget_ < Least()) {
        return absl::ResourceExhaustedError(
            absl::StrCat("the weights have ", parts_.total, " bytes and ", budget_,
                         " are left for them; streaming them needs at least ", Least()));
      }
      Stream();
    }
    Sum();
    return std::move(p_);
  }

 private:
  // A prompt's chunk may choose every expert of a layer at once.
  int64_t LeastSlots() const { return std::min(parts_.expert_units, config_.experts); }

  bool Streamable(size_t i) const {
    const WeightUnit& u = layout_.units[i];
    if (IsExpert(u) || IsSmall(u)) return false;
    return !IsEmbedding(u) || parts_.tied;
  }

  void Stream() {
    int64_t left = budget_ - parts_.small - parts_.rows - LeastSlots() * parts_.expert;
    if (parts_.embedding >= 0) p_.tiers[parts_.embedding] = Tier::kRows;
    // What every token uses stays first; experts are chosen anew each time.
    if (parts_.streamable <= left) {
      left -= parts_.streamable;
      if (parts_.tied && parts_.embedding >= 0) p_.tiers[parts_.embedding] = Tier::kResident;
    } else {
      left = StreamCycle(left);
    }
    if (parts_.experts > 0) PlaceExperts(left);
  }

  struct Cycle {
    int64_t largest = 0;  // streamed part: larger ones stay
    int64_t above = 0;    // bytes of those larger ones
    int64_t ring = 0;
  };
  // With `parts` of the largest streamed part as the ring, or nothing when that is more than
  // `left`. The ring is memory that keeps no weights, so the few parts above the usual size (the
  // head) had better stay than make the ring large for all.
  std::optional<Cycle> FindCycle(int64_t left, int parts) const {
    Cycle c;
    for (const int64_t bytes : parts_.sizes) c.above += bytes;
    for (size_t i = 0; i < parts_.sizes.size(); ++i) {
      c.above -= parts_.sizes[i];
      c.largest = parts_.sizes[i];
      if (i + 1 < parts_.sizes.size() && parts_.sizes[i + 1] == c.largest) continue;
      c.ring = std::min(parts * c.largest, parts_.streamable - c.above);
      if (c.above + c.ring <= left) return c;
    }
    return std::nullopt;
  }
  int64_t LeastCycleBytes() const {
    int64_t least = parts_.streamable, above = parts_.streamable;
    for (const int64_t bytes : parts_.sizes) {
      above -= bytes;
      least = std::min(least, above + bytes);
    }
    return least;
  }

  // Returns what is left of the bytes.
  int64_t StreamCycle(int64_t left) {
    // One part is multiplied while the next is read; a ring of less than two overlaps less.
    Cycle c;
    if (const auto whole = FindCycle(left, kRingParts)) {
      c = *whole;
    } else if (const auto least = FindCycle(left, 1)) {
      c = *least;
      c.ring = std::min({kRingParts * c.largest, left - c.above, parts_.streamable - c.above});
    }
    p_.ring_bytes = c.ring;
    left -= c.above + c.ring;
    const double share =
        static_cast<double>(left) / static_cast<double>(parts_.streamable - c.above);
    // Each kind by itself, so that small and large units are spread alike.
    Spreader attention(share), other(share);
    std::vector<int> streamed;
    for (size_t i = 0; i < layout_.units.size(); ++i) {
      if (!Streamable(i)) continue;
      const WeightUnit& u = layout_.units[i];
      p_.tiers[i] = Tier::kResident;
      if (PageUp(u.bytes) > c.largest) continue;
      Spreader& spreader = u.kind == WeightUnit::Kind::kAttention ? attention : other;
      if (spreader.Stays(PageUp(u.bytes))) {
        left -= PageUp(u.bytes);
      } else {
        streamed.push_back(static_cast<int>(i));
      }
    }
    // What rounding left over: whatever still fits, from all over the model (bit-reversed order).
    const int n = static_cast<int>(streamed.size());
    int bits = 0;
    while ((1 << bits) < n) ++bits;
    for (int k = 0; k < 1 << bits; ++k) {
      int at = 0;
      for (int b = 0; b < bits; ++b) at |= ((k >> b) & 1) << (bits - 1 - b);
      if (at >= n || PageUp(layout_.units[streamed[at]].bytes) > left) continue;
      left -= PageUp(layout_.units[streamed[at]].bytes);
      p_.tiers[streamed[at]] = Tier::kResident;
      streamed[at] = -1;
    }
    int embedding = -1;
    for (const int i : streamed) {
      if (i < 0) continue;
      p_.tiers[i] = Tier::kStreamed;
      // A tied embedding is multiplied last.
      if (i == parts_.embedding) {
        embedding = i;
      } else {
        p_.cycle.push_back(i);
      }
    }
    if (embedding >= 0) p_.cycle.push_back(embedding);
    return left;
  }

  void PlaceExperts(int64_t left) {
    p_.slot_bytes = parts_.expert;
    p_.expert_slots = static_cast<int>(LeastSlots());
    const int64_t cycle =
        int64_t{config_.experts_used} * parts_.expert_units / std::max(1, config_.experts);
    const int64_t more =
        std::min<int64_t>(left / parts_.expert, parts_.expert_units - p_.expert_slots);
    for (size_t i = 0; i < layout_.units.size(); ++i) {
      if (IsExpert(layout_.units[i])) p_.tiers[i] = Tier::kOnDemand;
    }
    if (more >= 2 * cycle) {
      // Enough to keep what recent tokens chose, which the next ones tend to choose again.
      p_.expert_slots += static_cast<int>(more);
      return;
    }
    // A cache below one token's cycle would be overwritten before it is asked again: fixed ones do
    // hit.
    Spreader spreader(static_cast<double>(more) / parts_.expert_units);
    for (size_t i = 0; i < layout_.units.size(); ++i) {
      if (IsExpert(layout_.units[i]) && spreader.Stays(1)) p_.tiers[i] = Tier::kResident;
    }
  }

  void Sum() {
    int64_t resident_experts = 0;
    for (size_t i = 0; i < layout_.units.size(); ++i) {
      const WeightUnit& u = layout_.units[i];
      const int64_t bytes = PageUp(u.bytes);
      if (p_.tiers[i] == Tier::kResident) p_.resident_bytes += bytes;
      if (p_.tiers[i] == Tier::kStreamed) p_.streamed_bytes += bytes;
      if (IsExpert(u) && p_.tiers[i] == Tier::kResident) ++resident_experts;
    }
    p_.held_bytes = p_.resident_bytes + p_.ring_bytes + p_.expert_slots * p_.slot_bytes;
    if (parts_.embedding >= 0 && p_.tiers[parts_.embedding] != Tier::kResident)
      p_.held_bytes += parts_.rows;
    if (parts_.expert_units == 0) return;
    const double used = static_cast<double>(config_.experts_used) / config_.experts;
    const int64_t on_demand = parts_.expert_units - resident_experts;
    if (on_demand == 0) return;
    // Slots hold what earlier tokens chose, but only when they outlast one token.
    const double in_slots = p_.expert_slots > config_.experts
                                ? std::min(1.0, static_cast<double>(p_.expert_slots) / on_demand)
                                : 0;
    p_.demand_bytes =
        static_cast<int64_t>(used * (1 - in_slots) * static_cast<double>(parts_.experts) *
                             static_cast<double>(on_demand) / parts_.expert_units);
  }

  const WeightLayout& layout_;
  const ModelConfig& config_;
  const int64_t budget_;
  const Parts parts_;
  Placement p_;
};

}  // namespace

absl::StatusOr<Placement> PlaceWeights(const WeightLayout& layout, const ModelConfig& config,
                                       int64_t budget, int rows) {
  return Placer(layout, config, budget, rows).Place();
}

int64_t LeastWeightBytes(const WeightLayout& layout, const ModelConfig& config, int rows) {
  return Placer(layout, config, 0, rows).Least();
}

}  // namespace shoal
