#include "offload/device_weights.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "kernels/status_macros.h"

namespace shoal {
namespace {

constexpr int64_t kAlign = 4096;
// Long enough for a copy's start to cost nothing, short enough for the first piece to leave soon.
constexpr int64_t kStageBytes = 8 << 20;

int64_t RoundUp(int64_t n) { return (n + kAlign - 1) / kAlign * kAlign; }

}  // namespace

DeviceWeights::DeviceWeights(Backend& backend, std::unique_ptr<WeightSource> host,
                             DeviceWeightsOptions options)
    : backend_(backend),
      copies_(*backend.copies()),
      host_(std::move(host)),
      options_(std::move(options)) {}

DeviceWeights::~DeviceWeights() {
  // Copies in flight read memory that goes away now.
  for (const Slot& s : ring_slots_) copies_.Await(s.copied).IgnoreError();
  for (const Slot& s : expert_slots_) copies_.Await(s.copied).IgnoreError();
}

absl::StatusOr<std::unique_ptr<DeviceWeights>> DeviceWeights::Create(
    Backend& backend, WeightSource& loader, std::unique_ptr<WeightSource> host,
    DeviceWeightsOptions options) {
  std::unique_ptr<DeviceWeights> w(new DeviceWeights(backend, std::move(host), std::move(options)));
  SHOAL_RETURN_IF_ERROR(w->Init(loader));
  return w;
}

absl::Status DeviceWeights::Init(WeightSource& loader) {
  const std::vector<DeviceUnit>& units = options_.units;
  offset_.assign(units.size(), -1);
  cycle_index_.assign(units.size(), -1);
  pinned_.assign(units.size(), Pinned::kUnknown);
  for (size_t i = 0; i < options_.cycle.size(); ++i) {
    SHOAL_CHECK(units[options_.cycle[i]].place == DeviceUnit::Place::kStreamed, "bad cycle");
    cycle_index_[options_.cycle[i]] = static_cast<int>(i);
  }
  for (Stage& s : stages_) {
    SHOAL_ASSIGN_OR_RETURN(s.memory, backend_.AllocateStaging(kStageBytes));
    SHOAL_ASSIGN_OR_RETURN(s.read, copies_.NewFence());
  }
  SHOAL_RETURN_IF_ERROR(
      MakeSlots(DeviceUnit::Place::kStreamed, options_.ring_slots, ring_, ring_slots_));
  SHOAL_RETURN_IF_ERROR(
      MakeSlots(DeviceUnit::Place::kOnDemand, options_.expert_slots, experts_, expert_slots_));
  return LoadResident(loader);
}

absl::Status DeviceWeights::MakeSlots(DeviceUnit::Place place, int count, DeviceMemory& memory,
                                      std::vector<Slot>& slots) {
  int64_t bytes = 0;
  for (const DeviceUnit& u : options_.units) {
    if (u.place == place) bytes = std::max(bytes, RoundUp(u.bytes));
  }
  if (bytes == 0) return absl::OkStatus();
  SHOAL_CHECK(count > 0 && host_ != nullptr, "streamed units need slots and a source");
  SHOAL_ASSIGN_OR_RETURN(memory, backend_.Allocate(bytes * count));
  slots.resize(count);
  for (int i = 0; i < count; ++i) {
    slots[i].data = memory.data() + i * bytes;
    SHOAL_ASSIGN_OR_RETURN(slots[i].copied, copies_.NewFence());
    SHOAL_ASSIGN_OR_RETURN(slots[i].released, copies_.NewFence());
  }
  return absl::OkStatus();
}

absl::Status DeviceWeights::LoadResident(WeightSource& loader) {
  int64_t total = 0, done = 0;
  for (size_t i = 0; i < options_.units.size(); ++i) {
    if (options_.units[i].place != DeviceUnit::Place::kResident) continue;
    offset_[i] = total;
    total += RoundUp(options_.units[i].bytes);
  }
  SHOAL_ASSIGN_OR_RETURN(resident_, backend_.Allocate(total));
  for (size_t i = 0; i < options_.units.size(); ++i) {
    if (offset_[i] < 0) continue;
    const int unit = static_cast<int>(i);
    SHOAL_ASSIGN_OR_RETURN(const uint8_t* from, loader.Acquire(unit));
    const absl::Status sent =
        SendStaged(resident_.data() + offset_[i], from, options_.units[i].bytes);
    loader.Release(unit);
    SHOAL_RETURN_IF_ERROR(sent);
    done += RoundUp(options_.units[i].bytes);
    if (options_.progress) options_.progress(done, total);
  }
  for (const Stage& s : stages_) SHOAL_RETURN_IF_ERROR(copies_.Await(s.read));
  return absl::OkStatus();
}

// `from` may change when this returns.
absl::Status DeviceWeights::SendStaged(uint8_t* to, const uint8_t* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += kStageBytes) {
    Stage& stage = stages_[stage_];
    stage_ = 1 - stage_;
    const int64_t n = std::min(kStageBytes, bytes - at);
    SHOAL_RETURN_IF_ERROR(copies_.Await(stage.read));
    std::memcpy(stage.memory.data(), from + at, n);
    SHOAL_RETURN_IF_ERROR(copies_.Copy(to + at, stage.memory.data(), n));
    SHOAL_RETURN_IF_ERROR(copies_.MarkCopies(stage.read));
  }
  return absl::OkStatus();
}

std::vector<DeviceWeights::Slot>& DeviceWeights::SlotsOf(int unit) {
  return options_.units[unit].place == DeviceUnit::Place::kStreamed ? ring_slots_ : expert_slots_;
}

DeviceWeights::Slot* DeviceWeights::Find(int unit) {
  for (Slot& s : SlotsOf(unit)) {
    if (s.unit == unit) return &s;
  }
  return nullptr;
}

DeviceWeights::Slot* DeviceWeights::Free(std::vector<Slot>& slots, absl::Span<const int> keep) {
  Slot* best = nullptr;
  for (Slot& s : slots) {
    if (s.held > 0 || std::find(keep.begin(), keep.end(), s.unit) != keep.end()) continue;
    if (best == nullptr || s.used_at < best->used_at) best = &s;
  }
  return best;
}

absl::Status DeviceWeights::Fill(Slot& slot, int unit) {
  const int64_t bytes = options_.units[unit].bytes;
  SHOAL_ASSIGN_OR_RETURN(const uint8_t* from, host_->Acquire(unit));
  if (pinned_[unit] == Pinned::kUnknown) {
    const bool pinned = options_.host_is_constant && copies_.Pin(from, RoundUp(bytes));
    pinned_[unit] = pinned ? Pinned::kYes : Pinned::kNo;
  }
  slot.unit = -1;  // an error leaves no half of a unit behind
  absl::Status s = copies_.CopiesWaitFor(slot.released);
  if (s.ok()) {
    s = pinned_[unit] == Pinned::kYes ? copies_.Copy(slot.data, from, bytes)
                                      : SendStaged(slot.data, from, bytes);
  }
  if (s.ok()) s = copies_.MarkCopies(slot.copied);
  host_->Release(unit);  // staged, or where it stays
  SHOAL_RETURN_IF_ERROR(s);
  slot.unit = unit;
  slot.used_at = ++clock_;
  bytes_streamed_ += bytes;
  return absl::OkStatus();
}

// Copies of the units behind `unit` begin, as far as slots are free.
absl::Status DeviceWeights::FillAhead(int unit) {
  const int n = static_cast<int>(options_.cycle.size());
  std::vector<int> next = {unit};
  for (int k = 1; k < std::min<int>(n, static_cast<int>(ring_slots_.size())); ++k) {
    next.push_back(options_.cycle[(cycle_index_[unit] + k) % n]);
  }
  for (const int u : next) {
    if (Find(u) != nullptr) continue;
    Slot* const slot = Free(ring_slots_, next);
    if (slot == nullptr) break;
    SHOAL_RETURN_IF_ERROR(Fill(*slot, u));
  }
  return absl::OkStatus();
}

void DeviceWeights::Prefetch(absl::Span<const int> units) {
  for (const int u : units) {
    if (options_.units[u].place != DeviceUnit::Place::kOnDemand || Find(u) != nullptr) continue;
    Slot* const slot = Free(expert_slots_, units);
    // Acquire says what is wrong.
    if (slot == nullptr || !Fill(*slot, u).ok()) return;
  }
}

absl::StatusOr<const uint8_t*> DeviceWeights::Acquire(int unit) {
  if (offset_[unit] >= 0) return resident_.data() + offset_[unit];
  Slot* slot = Find(unit);
  if (slot == nullptr) {
    slot = Free(SlotsOf(unit), {});
    if (slot == nullptr) {
      return absl::ResourceExhaustedError(absl::StrCat(
          "all ", SlotsOf(unit).size(), " slots for streamed weights are in use at once"));
    }
    SHOAL_RETURN_IF_ERROR(Fill(*slot, unit));
  }
  ++slot->held;
  slot->used_at = ++clock_;
  absl::Status s = copies_.OpsWaitFor(slot->copied);
  if (s.ok() && cycle_index_[unit] >= 0) s = FillAhead(unit);
  if (!s.ok()) {
    --slot->held;
    return s;
  }
  return slot->data;
}

void DeviceWeights::Release(int unit) {
  if (offset_[unit] >= 0) return;
  Slot* const slot = Find(unit);
  SHOAL_CHECK(slot != nullptr && slot->held > 0, "a unit is released that nobody holds");
  if (--slot->held > 0) return;
  if (!copies_.MarkOps(slot->released).ok()) slot->unit = -1;  // the next op reports the device
}

}  // namespace shoal
