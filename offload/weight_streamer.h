// Weights larger than memory: resident units stay, the others come through a ring in execution
// order.
//
// The I/O side reads ahead of the forward pass as far as the ring has room, and goes on into the
// next pass, so that the disk never rests while a token takes longer to read than to compute. What
// a unit's tier is, the plan decided (shard/placement.h); nothing here is least-recently-used
// except the slots of MoE experts.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/buffer.h"
#include "kernels/mutex.h"
#include "offload/async_file.h"
#include "offload/byte_ring.h"
#include "offload/weight_source.h"

namespace shoal {

enum class Tier : uint8_t {
  kResident,  // read once, stays
  kStreamed,  // through the ring, once in each pass
  kOnDemand,  // an expert: read when it is asked for, kept while its slot is not needed
  kRows,      // an embedding: only the rows that are asked for
};

struct StreamUnit {
  Tier tier = Tier::kResident;
  int64_t bytes = 0;
  int64_t file_offset = 0;  // multiple of kIoAlignment; the file holds whole kIoAlignment blocks
  // An embedding: bytes of kPanelRows rows of the extent at offset 0. When it is also the head
  // (tied), its tier is kStreamed: AcquireRows reads rows, Acquire takes the whole from the ring.
  int64_t panel_bytes = 0;
};

// Fills out[0..bytes) of a unit, or panel `panel` of a kRows unit, from wherever the weights are.
using UnitLoader = std::function<absl::Status(int unit, uint8_t* out)>;
using PanelLoader = std::function<absl::Status(int unit, int64_t panel, uint8_t* out)>;

struct StreamerOptions {
  std::vector<StreamUnit> units;
  std::vector<int> cycle;  // the streamed units, in the order of one pass, each once
  int64_t ring_bytes = 0;  // at least the largest streamed unit; three times that to overlap fully
  int expert_slots =
      0;  // of the largest on-demand unit's size; at least what one pass holds at once

  // Source: a file of the units as they are ...
  std::string path;
  AsyncFile::Options file;
  // ... or, when path is empty, functions that make them (called by loader_threads threads at
  // once).
  UnitLoader load;
  PanelLoader load_panel;
  int loader_threads = 1;

  // Called once per unit, the first time it is whole in memory (checksums). It may mend the data.
  std::function<absl::Status(int unit, uint8_t* data)> check;
  std::function<void(int64_t done, int64_t total)> progress;  // while the resident units load
};

struct StreamStats {
  int64_t bytes_read = 0;
  int64_t streamed_units = 0;  // Acquires that came through the ring
  int64_t expert_hits = 0;
  int64_t expert_reads = 0;
  int64_t seeks = 0;    // times the pass did not ask for what was prefetched
  double wait_s = 0;    // the forward pass waited for weights
  double busy_s = 0;    // reads were in flight
  double io_cpu_s = 0;  // CPU time of the I/O threads
  int depth = 0;        // pieces in flight, as tuned
  std::string engine;   // "io_uring with registered buffers, direct"
};

// Acquire, AcquireRows, Prefetch and Release: one thread. stats(): any thread.
class WeightStreamer final : public WeightSource {
 public:
  // Loads the resident units and starts prefetching. Errors of the file, of the loader, of `check`,
  // and kResourceExhausted when the ring is smaller than the largest streamed unit.
  static absl::StatusOr<std::unique_ptr<WeightStreamer>> Create(StreamerOptions options);
  ~WeightStreamer() override;

  // A unit may be held several times. After an error it may be asked for again: it is then read
  // again.
  absl::StatusOr<const uint8_t*> Acquire(int unit) override;
  absl::StatusOr<const uint8_t*> AcquireRows(int unit, absl::Span<const int32_t> rows) override;
  void Prefetch(absl::Span<const int> units) override;
  void Release(int unit) override;

  StreamStats stats() const;
  // Memory held: resident units, ring and slots.
  int64_t bytes_held() const;

 private:
  // One read in progress, of a unit or a part of it, into memory that someone else owns.
  struct Fill {
    int unit = -1;
    int64_t panel = -1;  // kRows through a PanelLoader
    uint8_t* dst = nullptr;
    int64_t file_offset = 0;
    int64_t bytes = 0;  // multiple of kIoAlignment
    int64_t next = 0;   // first byte not asked for yet
    int pending = 0;    // pieces (or loader calls) in flight
    int64_t done = 0;
    int held = 0;          // ring: Acquires without their Release
    bool dropped = false;  // ring: nobody wants it any more
    absl::Status status;
    bool started_all() const { return next >= bytes || !status.ok() || dropped; }
    bool ready() const { return pending == 0 && (done >= bytes || !status.ok()); }
  };
  struct Slot {
    Fill fill;  // fill.unit -1: empty
    int held = 0;
    uint64_t used_at = 0;
  };

  explicit WeightStreamer(StreamerOptions options) : options_(std::move(options)) {}
  absl::Status Init();
  absl::Status LoadResident();
  absl::StatusOr<const uint8_t*> AcquireStreamed(int unit);
  absl::StatusOr<const uint8_t*> AcquireExpert(int unit);
  void ReleaseRows();
  absl::Status CheckOnce(int unit, uint8_t* data);
  Slot* FindSlot(int unit, bool take) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  Fill* FindRing(int unit) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Wake() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Seek(int unit) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Await(Fill* fill) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // The I/O side.
  void FileLoop();
  void LoaderLoop();
  Fill* NextFill() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool PlaceNext() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Reclaim() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const StreamerOptions options_;
  std::vector<int> cycle_index_;          // unit -> place in the cycle, -1
  std::vector<int64_t> resident_offset_;  // unit -> place in resident_
  std::vector<uint8_t> checked_;          // by the engine thread only
  Buffer resident_, ring_memory_, slot_memory_;
  uint8_t* rows_base_ = nullptr;  // address space of the kRows unit, pages come and go
  int64_t rows_mapped_ = 0;
  int rows_unit_ = -1;
  std::vector<Fill> rows_fills_;     // engine thread's list, alive while they are in demand_
  std::unique_ptr<AsyncFile> file_;  // used by the I/O thread alone once it runs
  int64_t slot_bytes_ = 0;

  mutable Mutex mu_;
  CondVar work_cv_;   // wake_ was set
  CondVar ready_cv_;  // a fill is ready, was placed, or cannot be placed
  bool stop_ ABSL_GUARDED_BY(mu_) = false;
  bool wake_ ABSL_GUARDED_BY(mu_) = false;  // something may have become possible for the I/O side
  bool blocked_ ABSL_GUARDED_BY(mu_) =
      false;  // the next unit finds no room although only held units remain
  size_t cursor_ ABSL_GUARDED_BY(mu_) = 0;  // next of the cycle to be placed in the ring
  std::deque<std::unique_ptr<Fill>> ring_ ABSL_GUARDED_BY(mu_);  // oldest first
  ByteRing places_ ABSL_GUARDED_BY(mu_){0};                      // of the fills in ring_
  std::deque<Fill*> demand_ ABSL_GUARDED_BY(mu_);                // before anything in the ring
  std::vector<Slot> slots_ ABSL_GUARDED_BY(mu_);
  uint64_t clock_ ABSL_GUARDED_BY(mu_) = 0;
  StreamStats stats_ ABSL_GUARDED_BY(mu_);
  DepthTuner tuner_ ABSL_GUARDED_BY(mu_);
  std::vector<std::thread> threads_;
};

}  // namespace shoal
