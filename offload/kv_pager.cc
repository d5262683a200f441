#include "offload/kv_pager.h"

#include <xxhash.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "kernels/check.h"
#include "kernels/status_macros.h"

namespace shoal {
namespace {

double Now() { return static_cast<double>(absl::GetCurrentTimeNanos()) * 1e-9; }

int ChunkLayers(const KvPageShape& shape) {
  return static_cast<int>(
      std::clamp<int64_t>(kIoPieceBytes / shape.part_bytes(), 1, std::max(1, shape.layers)));
}

}  // namespace

absl::StatusOr<DeviceMemory> KvMemory::MakeStaging(int64_t bytes, int /*buffers*/) {
  return AllocateHost(bytes);
}

int64_t KvPager::BufferBytes(const KvPageShape& shape) {
  return std::max(shape.header_bytes(), ChunkLayers(shape) * shape.part_bytes());
}

KvPager::KvPager(const Options& options, KvMemory& memory)
    : options_(options),
      shape_(options.file.shape),
      buffer_bytes_(BufferBytes(options.file.shape)),
      chunk_layers_(ChunkLayers(options.file.shape)),
      memory_(memory),
      folder_(options.file.dir, options.file.keep ? options.file.dir_bytes_max : 0),
      reserved_(options.file.records) {}

absl::StatusOr<std::unique_ptr<KvPager>> KvPager::Open(const Options& options, KvMemory& memory) {
  SHOAL_CHECK(options.buffers >= 4 && options.depth >= 1 && options.depth < kIoDepthMax,
              "a pager needs a few buffers");
  std::unique_ptr<KvPager> pager(new KvPager(options, memory));
  SHOAL_ASSIGN_OR_RETURN(pager->file_, OpenKvPageFile(options.file));
  // At least 2 MiB: such buffers are aligned for direct transfers.
  SHOAL_ASSIGN_OR_RETURN(
      pager->staging_,
      memory.MakeStaging(std::max<int64_t>(MemoryBytes(pager->shape_, options), 2 << 20),
                         options.buffers));
  AsyncFile& file = *pager->file_->file;
  file.Register(pager->staging_.data(), static_cast<int64_t>(pager->staging_.size()));
  pager->jobs_.resize(options.depth);
  for (int j = 0; j < options.depth; j++) pager->free_jobs_.push_back(j);
  for (size_t r = 0; r < pager->file_->found.size(); r++) {
    pager->reserved_[r] = pager->file_->found[r].blocks() > 0;
  }
  {
    MutexLock lock(&pager->mu_);
    for (int b = 0; b < options.buffers; b++) pager->free_buffers_.push_back(b);
    pager->records_.resize(options.file.records);
    for (size_t r = 0; r < pager->file_->found.size(); r++) {
      pager->records_[r].what = pager->file_->found[r];
      pager->next_stamp_ = std::max(pager->next_stamp_, pager->file_->found[r].stamp + 1);
    }
    pager->stats_.engine = file.Describe();
  }
  if (!pager->file_->note.empty()) pager->Warn(pager->file_->note);
  pager->thread_ = std::thread([p = pager.get()] { p->Run(); });
  for (int c = 0; c < options.copiers; c++) {
    pager->copiers_.emplace_back([p = pager.get()] { p->Copy(); });
  }
  return pager;
}

KvPager::~KvPager() {
  if (!thread_.joinable()) return;
  EndStream();
  Flush();
  {
    MutexLock lock(&mu_);
    stop_ = true;
    work_cv_.SignalAll();
  }
  thread_.join();
  {
    MutexLock lock(&mu_);
    stop_copying_ = true;
    read_cv_.SignalAll();
  }
  for (std::thread& t : copiers_) t.join();
}

void KvPager::Write(int record, absl::Span<const KvName> prefix, absl::Span<const int32_t> blocks) {
  {
    MutexLock lock(&mu_);
    Record& r = records_[record];
    while (r.writes > 0) done_cv_.Wait(&mu_);
    r.what = {{prefix.begin(), prefix.end()}, next_stamp_++, std::vector<uint64_t>(shape_.layers)};
    r.writes = (shape_.layers + chunk_layers_ - 1) / chunk_layers_ + 1;  // and the header
    r.bad = false;
    pending_writes_ += r.writes;
  }
  for (int layer = 0; layer < shape_.layers; layer += chunk_layers_) {
    Job job;
    job.record = record;
    job.layer = layer;
    job.layers = std::min(chunk_layers_, shape_.layers - layer);
    job.blocks = static_cast<int>(blocks.size());
    {
      MutexLock lock(&mu_);
      while (free_buffers_.empty()) done_cv_.Wait(&mu_);
      job.buffer = TakeBuffer();
    }
    for (int l = 0; l < job.layers; l++) {
      memory_.CopyOut(layer + l, blocks, BufferAt(job.buffer) + l * shape_.part_bytes());
    }
    const absl::Status copied = memory_.EndCopyOut(job.buffer);
    if (!copied.ok()) WarnOfCopy(copied);
    job.failed = !copied.ok();
    MutexLock lock(&mu_);
    writes_.push_back(job);
    work_cv_.Signal();
  }
}

void KvPager::Load(int record, const KvName& prefix, absl::Span<const int32_t> blocks) {
  const absl::Status begun = memory_.BeginCopyIn();
  if (!begun.ok()) WarnOfCopy(begun);
  MutexLock lock(&mu_);
  LoadState load{record, prefix, {blocks.begin(), blocks.end()}, 0, !begun.ok()};
  for (int layer = 0; layer < shape_.layers; layer += chunk_layers_) {
    Job job;
    job.kind = Kind::kLoad;
    job.record = record;
    job.layer = layer;
    job.layers = std::min(chunk_layers_, shape_.layers - layer);
    job.blocks = static_cast<int>(blocks.size());
    job.index = loads_.size();
    load_jobs_.push_back(job);
    load.jobs++;
  }
  loads_.push_back(std::move(load));
  loads_left_++;
  work_cv_.Signal();
}

bool KvPager::loads_done() {
  MutexLock lock(&mu_);
  return loads_left_ == 0;
}

std::vector<bool> KvPager::FinishLoads() {
  MutexLock lock(&mu_);
  while (loads_left_ > 0) done_cv_.Wait(&mu_);
  std::vector<bool> worked;
  for (const LoadState& load : loads_) {
    worked.push_back(!load.failed);
    load.failed ? stats_.failed++ : stats_.pages_in++;
  }
  loads_.clear();
  return worked;
}

void KvPager::BeginStream(const std::vector<StreamPart>& parts) {
  EndStream();
  MutexLock lock(&mu_);
  for (const StreamPart& part : parts) stream_.push_back({part, -1, false});
  work_cv_.Signal();
}

const uint8_t* KvPager::NextPart() {
  MutexLock lock(&mu_);
  if (held_ >= 0) {
    stream_buffers_--;
    GiveBuffer(std::exchange(held_, -1));
  }
  SHOAL_CHECK(next_part_ < stream_.size(), "more parts are asked for than were announced");
  const Streamed& s = stream_[next_part_++];
  while (!s.ready) done_cv_.Wait(&mu_);
  held_ = s.buffer;
  if (held_ >= 0) return BufferAt(held_);
  failed_records_.push_back(s.part.record);
  return nullptr;
}

void KvPager::EndStream() {
  MutexLock lock(&mu_);
  stream_picked_ = stream_.size();  // no new ones
  while (stream_reading_ > 0) done_cv_.Wait(&mu_);
  if (held_ >= 0) GiveBuffer(std::exchange(held_, -1));
  for (size_t i = next_part_; i < stream_.size(); i++) {
    if (stream_[i].buffer >= 0) GiveBuffer(stream_[i].buffer);
  }
  stream_.clear();
  stream_picked_ = next_part_ = 0;
  stream_buffers_ = 0;
}

void KvPager::Flush() {
  MutexLock lock(&mu_);
  while (pending_writes_ > 0) done_cv_.Wait(&mu_);
}

KvPagerStats KvPager::stats() {
  MutexLock lock(&mu_);
  return stats_;
}

int KvPager::TakeBuffer() {
  const int buffer = free_buffers_.back();
  free_buffers_.pop_back();
  return buffer;
}

void KvPager::GiveBuffer(int buffer) {
  free_buffers_.push_back(buffer);
  done_cv_.SignalAll();
  work_cv_.Signal();
}

void KvPager::Warn(const std::string& what) {
  {
    MutexLock lock(&mu_);
    if (warned_) return;
    warned_ = true;
  }
  if (options_.warn) options_.warn(what);
}

void KvPager::WarnOfCopy(const absl::Status& status) {
  Warn(absl::StrCat(status.message(),
                    "; KV pages that cannot be copied are computed again when needed"));
}

// Everything below runs on the I/O thread, but for what the copiers do.

void KvPager::Run() {
  AsyncFile& file = *file_->file;
  if (const absl::Status s = memory_.EnterThread(); !s.ok()) WarnOfCopy(s);
  std::vector<IoDone> done;
  for (;;) {
    Job job;
    bool picked = false;
    {
      MutexLock lock(&mu_);
      for (;;) {
        picked = file.in_flight() < options_.depth && Pick(&job);
        if (picked || file.in_flight() > 0) break;
        if (stop_) return;
        work_cv_.Wait(&mu_);
      }
    }
    if (picked) {
      if (Start(job)) {
        Submit(job);
      } else {
        Finish(job, absl::OkStatus());
      }
      continue;
    }
    done.clear();
    file.Wait(&done);
    for (const IoDone& d : done) {
      Job finished = jobs_[d.tag];
      free_jobs_.push_back(static_cast<int>(d.tag));
      Finish(finished, d.status);
    }
  }
}

// Compute waits for what is streamed, sequences for what is loaded, nobody for writes; but a
// record is read only when it is written.
bool KvPager::Pick(Job* job) {
  const bool buffer = !free_buffers_.empty();
  if (buffer && stream_picked_ < stream_.size() && stream_buffers_ < options_.buffers / 2) {
    const StreamPart& part = stream_[stream_picked_].part;
    if (records_[part.record].writes == 0) {
      *job = {Kind::kStream, part.record,  part.layer,       1,
              kKvPageBlocks, TakeBuffer(), stream_picked_++, false};
      stream_buffers_++;
      stream_reading_++;
      return true;
    }
  }
  if (buffer && !load_jobs_.empty() && records_[load_jobs_.front().record].writes == 0) {
    *job = load_jobs_.front();
    load_jobs_.pop_front();
    job->buffer = TakeBuffer();
    return true;
  }
  if (writes_.empty()) return false;
  *job = writes_.front();
  writes_.pop_front();
  return true;
}

// False when there is nothing to transfer because the job has failed already.
bool KvPager::Start(Job& job) {
  if (job.kind == Kind::kWrite) {
    const absl::Status copied = memory_.AwaitCopyOut(job.buffer);
    if (!copied.ok()) WarnOfCopy(copied);
    job.failed = job.failed || !copied.ok();
    if (job.failed) return false;
    if (!reserved_[job.record]) {
      const int64_t bytes = shape_.record_bytes();
      const absl::Status s = folder_.Grow(
          bytes, [&] { return file_->file->Reserve(shape_.record_offset(job.record), bytes); });
      if (!s.ok()) {
        Warn(
            absl::StrCat(s.message(), "; KV pages that do not fit are computed again when needed"));
        job.failed = true;
        return false;
      }
      reserved_[job.record] = true;
    }
    std::vector<uint64_t> sums;
    for (int l = 0; l < job.layers; l++) {
      sums.push_back(XXH3_64bits(BufferAt(job.buffer) + l * shape_.part_bytes(),
                                 job.blocks * shape_.block_bytes));
    }
    MutexLock lock(&mu_);
    std::copy(sums.begin(), sums.end(), records_[job.record].what.checksums.begin() + job.layer);
    return true;
  }
  MutexLock lock(&mu_);
  const Record& r = records_[job.record];
  job.failed = r.bad || r.what.blocks() < job.blocks;
  if (job.kind == Kind::kLoad && !job.failed) {
    const LoadState& load = loads_[job.index];
    job.failed = load.failed || r.what.prefix[job.blocks - 1] != load.prefix;
    job.blocks = r.what.blocks();  // those that the checksums are over
  }
  if (reads_in_flight_++ == 0) read_since_ = Now();
  return !job.failed;
}

void KvPager::Submit(const Job& job) {
  const int tag = free_jobs_.back();
  free_jobs_.pop_back();
  jobs_[tag] = job;
  IoPiece piece;
  piece.write = job.kind == Kind::kWrite || job.kind == Kind::kHeader;
  piece.data = BufferAt(job.buffer);
  piece.tag = static_cast<uint64_t>(tag);
  if (job.kind == Kind::kHeader) {
    piece.offset = shape_.record_offset(job.record);
    piece.bytes = shape_.header_bytes();
  } else {
    piece.offset = shape_.part_offset(job.record, job.layer);
    piece.bytes = job.layers * shape_.part_bytes();
  }
  file_->file->Submit(piece);
}

bool KvPager::Verify(const Job& job) {
  std::vector<uint64_t> sums;
  {
    MutexLock lock(&mu_);
    const std::vector<uint64_t>& all = records_[job.record].what.checksums;
    sums.assign(all.begin() + job.layer, all.begin() + job.layer + job.layers);
  }
  const int64_t bytes = job.blocks * shape_.block_bytes;
  for (int l = 0; l < job.layers; l++) {
    if (XXH3_64bits(BufferAt(job.buffer) + l * shape_.part_bytes(), bytes) != sums[l]) {
      Warn(absl::StrCat(file_->file->path(), ": the KV page in record ", job.record, ", layer ",
                        job.layer + l,
                        ", is damaged: it is computed again, as are others that may be"));
      return false;
    }
  }
  return true;
}

void KvPager::Finish(Job& job, const absl::Status& status) {
  const bool read = job.kind == Kind::kLoad || job.kind == Kind::kStream;
  if (!status.ok()) {
    Warn(absl::StrCat(status.message(), "; KV pages that cannot be ", read ? "read" : "written",
                      " are computed again when needed"));
  }
  job.failed = job.failed || !status.ok();
  MutexLock lock(&mu_);
  if (!read) {
    FinishWrite(job);
    return;
  }
  read_.push_back(job);
  read_cv_.Signal();
}

void KvPager::Copy() {
  if (const absl::Status s = memory_.EnterThread(); !s.ok()) WarnOfCopy(s);
  for (;;) {
    Job job;
    {
      MutexLock lock(&mu_);
      while (read_.empty() && !stop_copying_) read_cv_.Wait(&mu_);
      if (read_.empty()) return;
      job = read_.front();
      read_.pop_front();
    }
    FinishRead(job);
  }
}

// On a copier.
void KvPager::FinishRead(Job& job) {
  if (!job.failed) job.failed = !Verify(job);
  if (job.kind == Kind::kLoad && !job.failed) {
    std::vector<int32_t> blocks;
    {
      MutexLock lock(&mu_);
      blocks = loads_[job.index].blocks;
    }
    for (int l = 0; l < job.layers; l++) {
      const absl::Status copied =
          memory_.CopyIn(job.layer + l, blocks, BufferAt(job.buffer) + l * shape_.part_bytes());
      if (!copied.ok()) WarnOfCopy(copied);
      job.failed = job.failed || !copied.ok();
    }
  }
  MutexLock lock(&mu_);
  if (--reads_in_flight_ == 0) stats_.read_s += Now() - read_since_;
  if (job.failed) {
    records_[job.record].bad = true;
  } else {
    stats_.bytes_in += job.layers * shape_.part_bytes();
  }
  if (job.kind == Kind::kLoad) {
    LoadState& load = loads_[job.index];
    load.failed = load.failed || job.failed;
    if (--load.jobs == 0) loads_left_--;
    GiveBuffer(job.buffer);
    return;
  }
  Streamed& s = stream_[job.index];
  s.ready = true;
  stream_reading_--;
  if (job.failed) {
    stats_.failed++;
    stream_buffers_--;
    GiveBuffer(job.buffer);
  } else {
    s.buffer = job.buffer;
    done_cv_.SignalAll();
  }
}

void KvPager::FinishWrite(Job& job) {
  Record& r = records_[job.record];
  r.bad = r.bad || job.failed;
  r.writes--;
  pending_writes_--;
  if (!job.failed && job.kind == Kind::kWrite) stats_.bytes_out += job.layers * shape_.part_bytes();
  if (r.writes == 1 && !r.bad) {  // its parts are written: now the header, from the same buffer
    job.kind = Kind::kHeader;
    EncodeKvRecord(r.what, shape_, options_.file.key, BufferAt(job.buffer));
    Submit(job);
    return;
  }
  if (r.writes == 1) {  // no header: what lies there now is no page
    r.writes = 0;
    pending_writes_--;
  }
  if (r.writes == 0) r.bad ? stats_.failed++ : stats_.pages_out++;
  GiveBuffer(job.buffer);
}

}  // namespace shoal
