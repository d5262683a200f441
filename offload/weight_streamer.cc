// The side of the forward pass; weight_streamer_io.cc is the side that reads.
#include "offload/weight_streamer.h"

#include <string.h>
#include <sys/mman.h>

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "kernels/check.h"
#include "kernels/packed_matrix.h"

namespace shoal {
namespace {

int64_t RoundUp(int64_t n) { return (n + kIoAlignment - 1) / kIoAlignment * kIoAlignment; }
int64_t RoundDown(int64_t n) { return n / kIoAlignment * kIoAlignment; }

}  // namespace

absl::StatusOr<std::unique_ptr<WeightStreamer>> WeightStreamer::Create(StreamerOptions options) {
  std::unique_ptr<WeightStreamer> streamer(new WeightStreamer(std::move(options)));
  if (absl::Status s = streamer->Init(); !s.ok()) return s;
  if (absl::Status s = streamer->LoadResident(); !s.ok()) return s;
  return streamer;
}

absl::Status WeightStreamer::Init() {
  const std::vector<StreamUnit>& units = options_.units;
  cycle_index_.assign(units.size(), -1);
  resident_offset_.assign(units.size(), -1);
  checked_.assign(units.size(), 0);
  int64_t resident = 0, streamed_max = 0;
  for (size_t i = 0; i < units.size(); i++) {
    int64_t bytes = RoundUp(units[i].bytes);
    if (units[i].tier == Tier::kResident) {
      resident_offset_[i] = resident;
      resident += bytes;
    } else if (units[i].tier == Tier::kStreamed) {
      streamed_max = std::max(streamed_max, bytes);
    } else if (units[i].tier == Tier::kOnDemand) {
      slot_bytes_ = std::max(slot_bytes_, bytes);
    }
    if (units[i].tier != Tier::kResident && units[i].panel_bytes > 0) {
      SHOAL_CHECK(rows_unit_ < 0, "there is one embedding");
      rows_unit_ = static_cast<int>(i);
    }
    SHOAL_CHECK(units[i].tier != Tier::kRows || units[i].panel_bytes > 0,
                "the panel size is needed");
  }
  for (size_t i = 0; i < options_.cycle.size(); i++) {
    int unit = options_.cycle[i];
    SHOAL_CHECK(units[unit].tier == Tier::kStreamed && cycle_index_[unit] < 0, "bad cycle");
    cycle_index_[unit] = static_cast<int>(i);
  }
  if (options_.ring_bytes < streamed_max) {
    return absl::ResourceExhaustedError(absl::StrCat("the ring has ", options_.ring_bytes,
                                                     " bytes, the largest streamed part needs ",
                                                     streamed_max));
  }
  auto allocate = [](int64_t bytes, Buffer* out) {
    if (bytes == 0) return absl::OkStatus();
    absl::StatusOr<Buffer> buffer = Buffer::Allocate(std::max(bytes, kIoAlignment * 512));
    if (!buffer.ok()) return buffer.status();
    *out = *std::move(buffer);
    return absl::OkStatus();
  };
  absl::Status s = allocate(resident, &resident_);
  if (streamed_max > 0) s.Update(allocate(RoundDown(options_.ring_bytes), &ring_memory_));
  s.Update(allocate(slot_bytes_ * options_.expert_slots, &slot_memory_));
  if (!s.ok()) return s;
  {
    MutexLock lock(&mu_);
    slots_.resize(slot_bytes_ > 0 ? options_.expert_slots : 0);
    places_ = ByteRing(static_cast<int64_t>(ring_memory_.size()));
  }
  if (rows_unit_ >= 0) {
    rows_mapped_ = RoundUp(units[rows_unit_].bytes) + kIoAlignment;
    void* p = mmap(nullptr, rows_mapped_, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return absl::ResourceExhaustedError("no address space for the embedding");
    // Huge pages would bring 2 MiB of memory for each row that is read.
    madvise(p, rows_mapped_, MADV_NOHUGEPAGE);
    rows_base_ = static_cast<uint8_t*>(p);
  }
  if (options_.path.empty()) {
    SHOAL_CHECK(options_.load != nullptr, "neither a file nor a loader");
    for (int i = 0; i < options_.loader_threads; i++)
      threads_.emplace_back([this] { LoaderLoop(); });
    return absl::OkStatus();
  }
  absl::StatusOr<std::unique_ptr<AsyncFile>> file = AsyncFile::Open(options_.path, options_.file);
  if (!file.ok()) return file.status();
  file_ = *std::move(file);
  if (ring_memory_.size() > 0) file_->Register(ring_memory_.data(), ring_memory_.size());
  threads_.emplace_back([this] { FileLoop(); });
  return absl::OkStatus();
}

WeightStreamer::~WeightStreamer() {
  {
    MutexLock lock(&mu_);
    stop_ = true;
    Wake();
  }
  for (std::thread& t : threads_) t.join();
  file_.reset();
  if (rows_base_ != nullptr) munmap(rows_base_, rows_mapped_);
}

absl::Status WeightStreamer::CheckOnce(int unit, uint8_t* data) {
  if (checked_[unit] || !options_.check) return absl::OkStatus();
  absl::Status s = options_.check(unit, data);
  checked_[unit] = s.ok();
  return s;
}

absl::Status WeightStreamer::LoadResident() {
  std::deque<Fill> fills;
  int64_t total = 0, done = 0;
  for (size_t i = 0; i < options_.units.size(); i++) {
    const StreamUnit& u = options_.units[i];
    if (u.tier != Tier::kResident || u.bytes == 0) continue;
    Fill fill;
    fill.unit = static_cast<int>(i);
    fill.dst = resident_.data() + resident_offset_[i];
    fill.file_offset = u.file_offset;
    fill.bytes = RoundUp(u.bytes);
    total += fill.bytes;
    fills.push_back(fill);
  }
  absl::Status status;
  {
    MutexLock lock(&mu_);
    for (Fill& f : fills) demand_.push_back(&f);
    Wake();
  }
  for (Fill& f : fills) {
    {
      MutexLock lock(&mu_);
      while (!f.ready()) ready_cv_.Wait(&mu_);
      status.Update(f.status);
      done += f.bytes;
    }
    if (status.ok()) status.Update(CheckOnce(f.unit, f.dst));
    if (!status.ok()) break;
    if (options_.progress) options_.progress(done, total);
  }
  // The fills live on this stack: none may be in flight or queued when it unwinds.
  MutexLock lock(&mu_);
  for (Fill& f : fills) f.dropped = true;
  for (Fill& f : fills) {
    while (f.pending > 0) ready_cv_.Wait(&mu_);
  }
  demand_.clear();
  return status;
}

absl::StatusOr<const uint8_t*> WeightStreamer::Acquire(int unit) {
  SHOAL_CHECK(unit >= 0 && unit < static_cast<int>(options_.units.size()), "no such unit");
  switch (options_.units[unit].tier) {
    case Tier::kResident:
      return resident_.data() + resident_offset_[unit];
    case Tier::kStreamed:
      return AcquireStreamed(unit);
    case Tier::kOnDemand:
      return AcquireExpert(unit);
    case Tier::kRows:
      break;
  }
  const StreamUnit& u = options_.units[unit];
  std::vector<int32_t> all;
  for (int64_t row = 0; row * u.panel_bytes < u.bytes * kPanelRows; row += kPanelRows) {
    all.push_back(static_cast<int32_t>(row));
  }
  return AcquireRows(unit, all);
}

void WeightStreamer::Wake() {
  wake_ = true;
  work_cv_.SignalAll();
}

void WeightStreamer::Await(Fill* fill) {
  if (fill->ready()) return;
  absl::Time start = absl::Now();
  while (!fill->ready()) ready_cv_.Wait(&mu_);
  stats_.wait_s += absl::ToDoubleSeconds(absl::Now() - start);
}

WeightStreamer::Fill* WeightStreamer::FindRing(int unit) {
  for (const std::unique_ptr<Fill>& f : ring_) {
    if (!f->held && !f->dropped) return f->unit == unit ? f.get() : nullptr;
  }
  return nullptr;
}

// The pass starts over, or skips (a prompt's chunk that needs no logits skips the head): what was
// prefetched before `unit` is of no use.
void WeightStreamer::Seek(int unit) {
  const bool ahead = std::any_of(ring_.begin(), ring_.end(), [unit](const auto& f) {
    return !f->held && !f->dropped && f->unit == unit;
  });
  for (const std::unique_ptr<Fill>& f : ring_) {
    if (f->held || f->dropped) continue;
    if (f->unit == unit) break;
    f->dropped = true;
    stats_.seeks++;
  }
  if (!ahead) cursor_ = cycle_index_[unit];
  blocked_ = false;
  Reclaim();
}

absl::StatusOr<const uint8_t*> WeightStreamer::AcquireStreamed(int unit) {
  SHOAL_CHECK(cycle_index_[unit] >= 0, "a streamed unit that is not in the cycle");
  Fill* fill = nullptr;
  {
    MutexLock lock(&mu_);
    for (const std::unique_ptr<Fill>& f : ring_) {
      if (f->held > 0 && f->unit == unit) {
        f->held++;
        return f->dst;
      }
    }
    fill = FindRing(unit);
    if (fill == nullptr) {
      bool next = std::none_of(ring_.begin(), ring_.end(),
                               [](const auto& f) { return !f->held && !f->dropped; }) &&
                  options_.cycle[cursor_] == unit;
      if (!next) Seek(unit);
      Wake();
      absl::Time start = absl::Now();
      while (!blocked_ && FindRing(unit) == nullptr) ready_cv_.Wait(&mu_);
      stats_.wait_s += absl::ToDoubleSeconds(absl::Now() - start);
      fill = FindRing(unit);
    }
    if (fill == nullptr) {
      return absl::ResourceExhaustedError(
          absl::StrCat("the ring of ", ring_memory_.size(), " bytes has no room for a part of ",
                       options_.units[unit].bytes, " bytes beside those in use"));
    }
    Await(fill);
    if (!fill->status.ok()) {
      absl::Status status = fill->status;
      fill->dropped = true;
      Reclaim();
      return status;
    }
    fill->held = 1;
    stats_.streamed_units++;
  }
  if (absl::Status s = CheckOnce(unit, fill->dst); !s.ok()) {
    Release(unit);
    return s;
  }
  return fill->dst;
}

WeightStreamer::Slot* WeightStreamer::FindSlot(int unit, bool take) {
  Slot* oldest = nullptr;
  for (Slot& slot : slots_) {
    if (slot.fill.unit == unit && slot.fill.status.ok()) return &slot;
    bool free = !slot.held && slot.fill.pending == 0 && slot.fill.started_all();
    if (free && (oldest == nullptr || slot.used_at < oldest->used_at)) oldest = &slot;
  }
  if (!take || oldest == nullptr) return nullptr;
  const StreamUnit& u = options_.units[unit];
  Fill fill;
  fill.unit = unit;
  fill.dst = slot_memory_.data() + (oldest - slots_.data()) * slot_bytes_;
  fill.file_offset = u.file_offset;
  fill.bytes = RoundUp(u.bytes);
  oldest->fill = fill;
  oldest->used_at = ++clock_;
  demand_.push_back(&oldest->fill);
  stats_.expert_reads++;
  Wake();
  return oldest;
}

void WeightStreamer::Prefetch(absl::Span<const int> units) {
  MutexLock lock(&mu_);
  for (int unit : units) {
    if (options_.units[unit].tier != Tier::kOnDemand) continue;
    // Those that are here already must not be thrown out for the ones that are not.
    if (Slot* slot = FindSlot(unit, false)) slot->used_at = ++clock_;
  }
  for (int unit : units) {
    if (options_.units[unit].tier == Tier::kOnDemand) FindSlot(unit, true);
  }
}

absl::StatusOr<const uint8_t*> WeightStreamer::AcquireExpert(int unit) {
  Slot* slot;
  {
    MutexLock lock(&mu_);
    int64_t reads = stats_.expert_reads;
    slot = FindSlot(unit, true);
    if (slot == nullptr) {
      return absl::ResourceExhaustedError(absl::StrCat("all ", slots_.size(), " expert slots of ",
                                                       slot_bytes_, " bytes are in use"));
    }
    if (reads == stats_.expert_reads) stats_.expert_hits++;
    slot->used_at = ++clock_;
    Await(&slot->fill);
    if (!slot->fill.status.ok()) {
      absl::Status status = slot->fill.status;
      slot->fill = Fill();
      return status;
    }
    slot->held++;
  }
  if (absl::Status s = CheckOnce(unit, slot->fill.dst); !s.ok()) {
    MutexLock lock(&mu_);
    slot->held = 0;
    slot->fill = Fill();
    return s;
  }
  return slot->fill.dst;
}

absl::StatusOr<const uint8_t*> WeightStreamer::AcquireRows(int unit,
                                                           absl::Span<const int32_t> rows) {
  const StreamUnit& u = options_.units[unit];
  if (unit != rows_unit_) return Acquire(unit);
  std::vector<int64_t> panels;
  for (int32_t row : rows) {
    if (row >= 0) panels.push_back(row / kPanelRows);
  }
  std::sort(panels.begin(), panels.end());
  panels.erase(std::unique(panels.begin(), panels.end()), panels.end());
  SHOAL_CHECK(rows_fills_.empty(), "the embedding is already held");
  for (int64_t panel : panels) {
    int64_t begin = panel * u.panel_bytes, end = std::min(begin + u.panel_bytes, u.bytes);
    SHOAL_CHECK(begin < u.bytes, "row beyond the embedding");
    Fill fill;
    fill.unit = unit;
    fill.panel = panel;
    fill.dst = rows_base_ + begin;
    fill.bytes = end - begin;
    if (options_.path.empty()) {
      rows_fills_.push_back(fill);
      continue;
    }
    begin = RoundDown(begin);
    if (!rows_fills_.empty()) {
      // Neighbours share a block: read it once.
      Fill& last = rows_fills_.back();
      int64_t last_end = last.dst + last.bytes - rows_base_;
      if (begin <= last_end) {
        last.bytes += std::max<int64_t>(0, RoundUp(end) - last_end);
        continue;
      }
    }
    fill.dst = rows_base_ + begin;
    fill.file_offset = u.file_offset + begin;
    fill.bytes = RoundUp(end) - begin;
    rows_fills_.push_back(fill);
  }
  absl::Status status;
  {
    MutexLock lock(&mu_);
    for (Fill& f : rows_fills_) demand_.push_back(&f);
    Wake();
    for (Fill& f : rows_fills_) {
      Await(&f);
      status.Update(f.status);
    }
    std::erase_if(demand_, [](Fill* f) { return f->ready(); });
  }
  if (!status.ok()) {
    Release(unit);
    return status;
  }
  return rows_base_;
}

void WeightStreamer::ReleaseRows() {
  for (const Fill& f : rows_fills_) {
    const int64_t begin = RoundDown(f.dst - rows_base_);
    madvise(rows_base_ + begin, RoundUp(f.dst + f.bytes - rows_base_) - begin, MADV_DONTNEED);
  }
  rows_fills_.clear();
}

void WeightStreamer::Release(int unit) {
  if (unit == rows_unit_ && !rows_fills_.empty()) return ReleaseRows();
  switch (options_.units[unit].tier) {
    case Tier::kResident:
    case Tier::kRows:
      return;
    case Tier::kStreamed: {
      MutexLock lock(&mu_);
      for (const std::unique_ptr<Fill>& f : ring_) {
        if (f->held > 0 && f->unit == unit) {
          f->dropped = --f->held == 0;
          break;
        }
      }
      blocked_ = false;
      Wake();
      Reclaim();
      return;
    }
    case Tier::kOnDemand: {
      MutexLock lock(&mu_);
      Slot* slot = FindSlot(unit, false);
      if (slot != nullptr && slot->held > 0) slot->held--;
      return;
    }
  }
}

StreamStats WeightStreamer::stats() const {
  MutexLock lock(&mu_);
  return stats_;
}

int64_t WeightStreamer::bytes_held() const {
  return static_cast<int64_t>(resident_.size() + ring_memory_.size() + slot_memory_.size());
}

}  // namespace shoal
