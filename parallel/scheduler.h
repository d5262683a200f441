// Decides what the next step computes: continuous batching without I/O or clocks.
//
// Every step first takes one row of each sequence that decodes, then fills up with prefill chunks
// of admitted sequences, then admits waiting ones, clients in turn. When KV blocks run out, the
// sequence admitted last gives its blocks back and is computed again later (its prefix is usually
// still cached).
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "parallel/batch.h"
#include "parallel/block_allocator.h"
#include "parallel/sequence.h"

namespace shoal {

struct SchedulerLimits {
  int rows = 512;  // of a batch
  int rows_beside_decode =
      256;             // prefill rows of a batch that also decodes: bounds the inter-token time
  int slots = 16;      // sequences admitted at once
  int context = 0;     // tokens of a sequence
  int blocks = 0;      // KV blocks
  int waiting = 1024;  // sequences in the queue
  int64_t waiting_tokens = int64_t{1} << 22;
  bool prefix_cache = true;
};

// One thread.
class Scheduler {
 public:
  struct Step {
    Batch batch;
    std::vector<SequenceId> sequences;  // one for each of batch.logits
  };
  struct Finished {
    SequenceId id = 0;
    FinishReason reason = FinishReason::kNone;
  };
  struct Stats {
    int waiting = 0;
    int running = 0;
    int blocks_in_use = 0;
    int blocks_total = 0;
    int64_t preempted = 0;
    int64_t prompt_tokens = 0;
    int64_t cached_tokens = 0;
  };

  explicit Scheduler(const SchedulerLimits& limits);

  // kInvalidArgument: empty, or longer than the context or the KV pool could ever hold (with both
  // counts). kResourceExhausted: the queue is full.
  absl::StatusOr<SequenceId> Submit(SequenceRequest request);
  // Wherever it stands: waiting, prefilling or decoding. Unknown ids are ignored (it may just have
  // ended).
  void Cancel(SequenceId id);

  // The next step, or nullopt when nothing can run (idle, or everything waits for steps in flight).
  std::optional<Step> Next();
  // A step is done: one sampled token for each of its sequences. Steps complete in the order they
  // were handed out. Returns the sequences that ended.
  std::vector<Finished> Complete(const Step& step, const std::vector<int32_t>& tokens);
  // Sequences that Cancel() ended outside of Complete().
  std::vector<Finished> TakeCancelled();

  // Null once the sequence has been reported as finished.
  const Sequence* Find(SequenceId id) const;
  bool idle() const { return sequences_.empty(); }
  Stats stats() const;

 private:
  Sequence* NextWaiting();
  void PopWaiting(const Sequence& s);
  void Enqueue(Sequence& s, bool front);
  bool Admit(Sequence& s, Batch& batch);
  bool Grow(Sequence& s, int tokens, Batch& batch);
  bool GrowOrPreempt(Sequence& s, int tokens, Batch& batch);
  bool PreemptAnother(const Sequence& keep);
  bool AnyInFlight() const;
  void AddRun(Sequence& s, int rows, bool decode, Step& step);
  void PublishBlocks(Sequence& s);
  void ReleaseBlocks(Sequence& s);
  void Remove(Sequence& s);
  FinishReason ReasonToEnd(const Sequence& s) const;

  SchedulerLimits limits_;
  BlockAllocator blocks_;
  std::unordered_map<SequenceId, std::unique_ptr<Sequence>> sequences_;
  std::map<std::string, std::deque<Sequence*>> waiting_;  // by client
  std::string last_client_;
  int waiting_count_ = 0;
  int64_t waiting_tokens_ = 0;
  std::vector<Sequence*> running_;  // in order of admission
  std::vector<int> free_slots_;
  std::vector<Finished> cancelled_;
  SequenceId next_id_ = 1;
  int64_t next_step_ = 1;
  int64_t admissions_ = 0;
  Stats totals_;
};

}  // namespace shoal
