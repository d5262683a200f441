// A rank's KV pages on disk: written behind, read back into blocks, or streamed past attention.
//
// The pager decides nothing: which page lies in which record comes from rank 0's scheduler, the
// same on every rank. Whatever goes wrong with a page shows when it is read, as a page that is not
// there.
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
#include "kernels/device_memory.h"
#include "kernels/mutex.h"
#include "offload/kv_directory.h"
#include "offload/kv_page_file.h"

namespace shoal {

// The memory that blocks live in, RAM or VRAM: moves one layer of some blocks to or from host
// memory, where they lie one after the other.
class KvMemory {
 public:
  virtual ~KvMemory() = default;
  // `buffers` equal buffers of host memory, zeros, once, before the rest.
  virtual absl::StatusOr<DeviceMemory> MakeStaging(int64_t bytes, int buffers);
  virtual void CopyOut(int layer, absl::Span<const int32_t> blocks, uint8_t* to) = 0;
  // Called by threads of the pager, several at once for different layers or blocks, which nobody
  // else uses meanwhile. Skips blocks < 0.
  virtual absl::Status CopyIn(int layer, absl::Span<const int32_t> blocks, const uint8_t* from) = 0;

  // A device's own memory is copied in an order beside the thread's. EndCopyOut: what was copied to
  // this buffer since the last call is one thing; its blocks may be used for other tokens now, its
  // bytes are there after AwaitCopyOut, which the I/O thread calls. An error says that they are
  // not.
  virtual absl::Status EndCopyOut(int /*buffer*/) { return absl::OkStatus(); }
  virtual absl::Status AwaitCopyOut(int /*buffer*/) { return absl::OkStatus(); }
  // The engine thread gives up blocks that CopyIn will be called for.
  virtual absl::Status BeginCopyIn() { return absl::OkStatus(); }
  // The first call of each of the pager's threads.
  virtual absl::Status EnterThread() { return absl::OkStatus(); }
};

struct KvPagerStats {
  int64_t pages_out = 0;
  int64_t pages_in = 0;   // into blocks
  int64_t bytes_out = 0;  // to disk
  int64_t bytes_in = 0;   // from disk, streamed ones included
  int64_t failed = 0;     // pages that could not be written or read back
  double read_s = 0;      // reads were in flight
  std::string engine;
};

// One engine thread calls it; an I/O thread and a few copiers of its own do the rest.
class KvPager {
 public:
  struct Options {
    KvFileOptions file;
    int buffers = 24;  // staging of buffer_bytes each
    int depth = 8;     // transfers in flight
    // Threads that check what was read and copy it into blocks. One is slower than a fast disk, and
    // much slower where the blocks are touched for the first time.
    int copiers = 2;
    // Called at most once for all that goes wrong with the file, from any thread.
    std::function<void(const std::string&)> warn;
  };
  // What it holds in memory, for the plan.
  static int64_t BufferBytes(const KvPageShape& shape);
  static int64_t MemoryBytes(const KvPageShape& shape, const Options& options) {
    return options.buffers * BufferBytes(shape);
  }
  static absl::StatusOr<std::unique_ptr<KvPager>> Open(const Options& options, KvMemory& memory);
  ~KvPager();  // what is to be written is written

  // Pages of an earlier run, by record; empty where there is none. Checksums of the parts are
  // looked at when they are read.
  const std::vector<KvRecord>& found() const { return file_->found; }

  // Copies the blocks to staging and returns; waits only while the disk is behind by all of it.
  // REQUIRES: nothing reads the record's old content any more.
  // prefix: the names of the prefixes that end with each block.
  void Write(int record, absl::Span<const KvName> prefix, absl::Span<const int32_t> blocks);

  // Starts to read the first blocks of a page, `prefix` ends with the last of them; those < 0 are
  // skipped. The blocks are the page's own until FinishLoads().
  void Load(int record, const KvName& prefix, absl::Span<const int32_t> blocks);
  bool loads_done();
  // Waits for all loads since the last call and says for each, in order, whether it worked.
  std::vector<bool> FinishLoads();

  // Parts of whole pages in the order in which they will be asked for, read ahead.
  struct StreamPart {
    int record = 0;
    int layer = 0;
  };
  void BeginStream(const std::vector<StreamPart>& parts);
  // The next part, [block][K, V], valid until the next call; null when it could not be read.
  const uint8_t* NextPart();
  void EndStream();  // drops what was not asked for
  // Records whose parts NextPart could not deliver, since the last call.
  std::vector<int> TakeFailedRecords() { return std::exchange(failed_records_, {}); }

  void Flush();  // waits for all writes
  KvPagerStats stats();

 private:
  enum class Kind : uint8_t { kWrite, kHeader, kLoad, kStream };
  // `layers` layers of a record, one after the other in a staging buffer.
  struct Job {
    Kind kind = Kind::kWrite;
    int record = 0;
    int layer = 0;
    int layers = 1;
    int blocks = 0;
    int buffer = -1;
    size_t index = 0;  // kLoad: into loads_; kStream: into stream_
    bool failed = false;
  };
  struct LoadState {
    int record = 0;
    KvName prefix;
    std::vector<int32_t> blocks;
    int jobs = 0;  // still to do
    bool failed = false;
  };
  struct Record {
    KvRecord what;
    int writes = 0;  // jobs that have not reached the disk
    bool bad = false;
  };

  KvPager(const Options& options, KvMemory& memory);
  void Run();
  void Copy();
  bool Pick(Job* job) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool Start(Job& job) ABSL_LOCKS_EXCLUDED(mu_);
  void Finish(Job& job, const absl::Status& status) ABSL_LOCKS_EXCLUDED(mu_);
  void FinishRead(Job& job) ABSL_LOCKS_EXCLUDED(mu_);
  void FinishWrite(Job& job) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool Verify(const Job& job) ABSL_LOCKS_EXCLUDED(mu_);
  void Submit(const Job& job);
  void Warn(const std::string& what);
  void WarnOfCopy(const absl::Status& status);
  int TakeBuffer() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void GiveBuffer(int buffer) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  uint8_t* BufferAt(int buffer) { return staging_.data() + buffer * buffer_bytes_; }

  const Options options_;
  const KvPageShape shape_;
  const int64_t buffer_bytes_;
  const int chunk_layers_;  // layers of one transfer of a whole page
  KvMemory& memory_;
  std::unique_ptr<KvPageFile> file_;
  DeviceMemory staging_;

  // Engine thread.
  int held_ = -1;  // buffer of the last NextPart
  size_t next_part_ = 0;
  std::vector<int> failed_records_;

  // I/O thread.
  std::vector<Job> jobs_;  // in flight, by tag
  std::vector<int> free_jobs_;
  const KvDirectory folder_;
  std::vector<bool> reserved_;  // [records]: has its place on the disk

  Mutex mu_;
  CondVar work_cv_;  // I/O thread: there is something to do
  CondVar done_cv_;  // engine thread: something is done
  CondVar read_cv_;  // copiers: something was read
  bool stop_ ABSL_GUARDED_BY(mu_) = false;
  bool stop_copying_ ABSL_GUARDED_BY(mu_) = false;
  std::deque<Job> read_ ABSL_GUARDED_BY(mu_);  // to be checked and copied
  std::vector<int> free_buffers_ ABSL_GUARDED_BY(mu_);
  std::deque<Job> writes_ ABSL_GUARDED_BY(mu_);
  std::deque<Job> load_jobs_ ABSL_GUARDED_BY(mu_);
  std::vector<LoadState> loads_ ABSL_GUARDED_BY(mu_);
  int loads_left_ ABSL_GUARDED_BY(mu_) = 0;
  struct Streamed {
    StreamPart part;
    int buffer = -1;
    bool ready = false;
  };
  std::vector<Streamed> stream_ ABSL_GUARDED_BY(mu_);
  size_t stream_picked_ ABSL_GUARDED_BY(mu_) = 0;
  int stream_buffers_ ABSL_GUARDED_BY(mu_) = 0;  // taken by parts not yet released
  int stream_reading_ ABSL_GUARDED_BY(mu_) = 0;
  int pending_writes_ ABSL_GUARDED_BY(mu_) = 0;
  std::vector<Record> records_ ABSL_GUARDED_BY(mu_);
  uint64_t next_stamp_ ABSL_GUARDED_BY(mu_) = 1;
  bool warned_ ABSL_GUARDED_BY(mu_) = false;
  int reads_in_flight_ ABSL_GUARDED_BY(mu_) = 0;  // until they are copied
  double read_since_ ABSL_GUARDED_BY(mu_) = 0;
  KvPagerStats stats_ ABSL_GUARDED_BY(mu_);

  std::thread thread_;  // last, with the copiers: they use all of the above
  std::vector<std::thread> copiers_;
};

}  // namespace shoal
