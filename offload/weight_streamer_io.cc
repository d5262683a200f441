// The reading side of WeightStreamer: what is read next, and where it is put.
#include <time.h>

#include <algorithm>

#include "absl/time/clock.h"
#include "kernels/check.h"
#include "offload/weight_streamer.h"

namespace shoal {
namespace {

double ClockSeconds(clockid_t clock) {
  timespec t;
  clock_gettime(clock, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

}  // namespace

void WeightStreamer::Reclaim() {
  while (!ring_.empty() && ring_.front()->dropped && ring_.front()->pending == 0) {
    ring_.pop_front();
    places_.Pop();
    Wake();
  }
}

// Gives the next unit of the cycle a place in the ring.
bool WeightStreamer::PlaceNext() {
  if (options_.cycle.empty()) return false;
  int unit = options_.cycle[cursor_];
  int64_t need = (options_.units[unit].bytes + kIoAlignment - 1) / kIoAlignment * kIoAlignment;
  const std::optional<int64_t> at = places_.Push(need);
  if (!at.has_value()) {
    blocked_ = std::all_of(ring_.begin(), ring_.end(), [](const auto& f) { return f->held; });
    if (blocked_) ready_cv_.SignalAll();
    return false;
  }
  auto fill = std::make_unique<Fill>();
  fill->unit = unit;
  fill->dst = ring_memory_.data() + *at;
  fill->file_offset = options_.units[unit].file_offset;
  fill->bytes = need;
  ring_.push_back(std::move(fill));
  cursor_ = (cursor_ + 1) % options_.cycle.size();
  blocked_ = false;
  ready_cv_.SignalAll();
  return true;
}

// Demand first, then the ring in order. Null when there is nothing to start.
WeightStreamer::Fill* WeightStreamer::NextFill() {
  while (!demand_.empty()) {
    if (!demand_.front()->started_all()) return demand_.front();
    demand_.pop_front();
  }
  do {
    for (const std::unique_ptr<Fill>& f : ring_) {
      if (!f->started_all()) return f.get();
    }
  } while (PlaceNext());
  return nullptr;
}

void WeightStreamer::FileLoop() {
  std::vector<IoDone> done;
  double busy_since = 0;
  MutexLock lock(&mu_);
  stats_.engine = file_->Describe();
  while (true) {
    wake_ = false;
    bool saturated = true;
    while (file_->in_flight() < tuner_.depth()) {
      Fill* fill = stop_ ? nullptr : NextFill();
      if (fill == nullptr) {
        saturated = false;
        break;
      }
      int64_t n = std::min(kIoPieceBytes, fill->bytes - fill->next);
      IoPiece piece{false, fill->file_offset + fill->next, fill->dst + fill->next, n,
                    reinterpret_cast<uintptr_t>(fill)};
      fill->next += n;
      fill->pending++;
      mu_.Unlock();
      if (file_->in_flight() == 0) busy_since = ClockSeconds(CLOCK_MONOTONIC);
      file_->Submit(piece);
      mu_.Lock();
    }
    if (file_->in_flight() == 0) {
      if (stop_) return;
      while (!wake_) work_cv_.Wait(&mu_);
      continue;
    }
    mu_.Unlock();
    done.clear();
    file_->Wait(&done);
    double now = ClockSeconds(CLOCK_MONOTONIC);
    mu_.Lock();
    for (IoDone& d : done) {
      Fill* fill = reinterpret_cast<Fill*>(static_cast<uintptr_t>(d.tag));
      fill->pending--;
      fill->done += d.bytes;
      fill->status.Update(d.status);
      stats_.bytes_read += d.bytes;
      tuner_.OnBytes(d.bytes, saturated, now);
      if (fill->ready() || fill->pending == 0) ready_cv_.SignalAll();
    }
    stats_.busy_s += now - busy_since;
    busy_since = now;
    stats_.io_cpu_s = ClockSeconds(CLOCK_THREAD_CPUTIME_ID);
    stats_.depth = tuner_.depth();
    Reclaim();
  }
}

void WeightStreamer::LoaderLoop() {
  double cpu_before = 0;
  MutexLock lock(&mu_);
  stats_.engine = "repacked from the checkpoint";
  while (!stop_) {
    wake_ = false;
    Fill* fill = NextFill();
    if (fill == nullptr) {
      while (!wake_) work_cv_.Wait(&mu_);
      continue;
    }
    fill->next = fill->bytes;
    fill->pending++;
    Wake();  // another loader thread may find the one behind it
    mu_.Unlock();
    double start = ClockSeconds(CLOCK_MONOTONIC);
    absl::Status status = fill->panel >= 0 ? options_.load_panel(fill->unit, fill->panel, fill->dst)
                                           : options_.load(fill->unit, fill->dst);
    double seconds = ClockSeconds(CLOCK_MONOTONIC) - start;
    double cpu = ClockSeconds(CLOCK_THREAD_CPUTIME_ID);
    mu_.Lock();
    fill->pending--;
    fill->done = fill->bytes;
    fill->status.Update(status);
    stats_.bytes_read += fill->bytes;
    stats_.busy_s += seconds;
    stats_.io_cpu_s += cpu - cpu_before;
    cpu_before = cpu;
    ready_cv_.SignalAll();
    Reclaim();
  }
}

}  // namespace shoal
