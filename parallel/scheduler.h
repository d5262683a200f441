// Decides what the next step computes: continuous batching without I/O or clocks.
//
// Every step first takes one row of each sequence that decodes, then fills up with prefill chunks
// of admitted sequences, then admits waiting ones, clients in turn. How many prompt rows go beside
// decode rows is a matter of time, not of rows: see RowsBesideDecode. When KV blocks run out, the
// sequence admitted last gives its blocks back and is computed again later (its prefix is usually
// still cached).
//
// Requests of a client with the same prompt that wait together (the n answers of one) are admitted
// when the first of them has its prompt computed: they sample from the same row and share all
// blocks. Who writes to a block that others use takes a copy of it (Batch::PageOp).
//
// With pages on disk every page (16 blocks) is written once it is full, and the rest of a sequence
// when it ends or gives way. Blocks that memory has lost come back from there when that is cheaper
// than computing them: the sequence waits, the others go on, until FinishLoads() says that every
// rank has read them.
//
// A context may then be larger than all blocks together. When nobody else can give way any more,
// the oldest pages of the sequence stay on disk only, and every step reads them from there
// (Batch::kOnDisk). There is one such sequence at a time, the first of those that run; to others
// it gives way page by page, so that they run beside it. Its blocks are known to others, and go to
// disk, only when their step is done, since a page may turn out to be unreadable.
//
// With a Drafter a sequence that decodes may have further rows, for tokens that it guesses come
// next (scheduler_drafts.cc). Only tokens that were drawn are ever part of a sequence: a wrong
// guess leaves keys and values behind its end, which are known to nobody and written over.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "parallel/batch.h"
#include "parallel/block_allocator.h"
#include "parallel/drafter.h"
#include "parallel/sequence.h"

namespace shoal {

struct SchedulerLimits {
  int rows = 512;                // of a batch
  int rows_beside_decode = 256;  // of prompts in a batch that also decodes, see StepCosts
  int slots = 16;                // sequences admitted at once
  int context = 0;               // tokens of a sequence
  int blocks = 0;                // KV blocks
  int waiting = 1024;            // sequences in the queue
  int64_t waiting_tokens = int64_t{1} << 22;
  bool prefix_cache = true;
  int pages = 0;               // KV pages that the disk holds; 0: nothing goes to disk
  bool stream = false;         // contexts may be larger than `blocks`; `pages` hold a whole one
  int draft_max = 0;           // tokens guessed for a sequence in a step; 0: none
  bool draft_adaptive = true;  // false: as many as there is room for, whether it pays or not
};

// What work takes, in seconds, as far as it was measured; 0: not yet.
struct StepCosts {
  double page_s = 0;        // a KV page is read back from disk; it is only when that is cheaper
  double token_s = 0;       // a token of a prompt is computed
  double decode_s = 0;      // a step that only decodes
  double many_token_s = 0;  // a token of a prompt among many, which is less
  double step_s = 0;        // a step that only decodes, without drafts, until its results are there
  double draft_row_s = 0;   // what a row of a draft adds to it; a mean, and may be below 0
  int draft_age = -1;       // steps since a draft was timed; -1: there was none
  bool drafts_known() const { return draft_age >= 0; }
};

// A page on disk from an earlier run.
struct KeptPage {
  int record = 0;
  std::vector<PrefixHash> prefix;  // that ends with each of its blocks
};

// One thread.
class Scheduler {
 public:
  struct Step {
    Batch batch;
    // One for each of batch.logits. Of a sequence with a draft there are several in a row: what it
    // draws next, then what it draws after each token of the draft.
    std::vector<SequenceId> sequences;
    // Of `sequences`, those without rows: what they sample from is another one's last row.
    std::vector<SequenceId> twins;
    bool streams = false;  // reads pages from disk: see StreamFailed
    int drafted = 0;       // rows of drafts
  };
  // In place of a token, for a row behind a draft's token that was not drawn.
  static constexpr int32_t kNoToken = -1;
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
    int64_t disk_tokens = 0;  // of cached_tokens, those read back from disk
    int64_t pages_written = 0;
    int pages_in_use = 0;         // records that loads read
    int64_t pages_lost = 0;       // could not be read back
    int64_t pages_streamed = 0;   // left memory while their sequence ran on
    int64_t drafted_tokens = 0;   // that were checked
    int64_t accepted_tokens = 0;  // of those, were drawn indeed
  };

  // drafter: null: none, whatever the limits say.
  explicit Scheduler(const SchedulerLimits& limits, std::unique_ptr<Drafter> drafter = nullptr);

  // kInvalidArgument: empty, or longer than the context or the KV pool could ever hold (with both
  // counts). kResourceExhausted: the queue is full.
  absl::StatusOr<SequenceId> Submit(SequenceRequest request);
  // Wherever it stands: waiting, prefilling or decoding. Unknown ids are ignored (it may just have
  // ended).
  void Cancel(SequenceId id);

  // The next step, or nullopt when nothing can run (idle, or everything waits for steps in flight).
  std::optional<Step> Next();
  // A step is done: one sampled token for each of its rows with logits (any for one that embeds),
  // kNoToken from the first that follows a wrong guess. Steps complete in the order they were
  // handed out. Returns the sequences that ended.
  std::vector<Finished> Complete(const Step& step, const std::vector<int32_t>& tokens);
  // Sequences that Cancel() ended outside of Complete().
  std::vector<Finished> TakeCancelled();

  // Pages that every rank has from an earlier run, the least recently used first.
  void RestorePages(absl::Span<const KeptPage> pages);
  // Pages whose loads were handed out and not yet finished.
  int loads_pending() const { return static_cast<int>(loads_.size()); }
  // Which of them every rank has read, in the order in which they were handed out.
  void FinishLoads(const std::vector<bool>& worked);
  // Before Complete() of a step that streams: these records could not be read on some rank. Who
  // needs them is computed again.
  void StreamFailed(absl::Span<const int> records);
  // What is to be written and will not come with another step: before the engine stops.
  std::vector<Batch::PageOp> TakeWrites();
  // So many steps are under way at once, each in another stage of the pipeline: prompts are cut
  // into pieces that keep all of them busy. Without, a step takes as much as it may.
  void CutPromptsFor(int stages) { stages_ = stages; }
  void SetCosts(const StepCosts& costs) { costs_ = costs; }

  // Null once the sequence has been reported as finished.
  const Sequence* Find(SequenceId id) const;
  bool idle() const { return sequences_.empty(); }
  Stats stats() const;

 private:
  int64_t PromptTokens() const;
  int RowsOfPrompts() const;
  int RowsBesideDecode() const;
  int RowsToEndPrompts(int decoding) const;
  Sequence* NextWaiting();
  void PopWaiting(const Sequence& s);
  void TakeSlot(Sequence& s);
  void Enqueue(Sequence& s, bool front);
  bool Admit(Sequence& s, Batch& batch);
  // Part of a page on disk: blocks [begin, end) of a sequence. Holds a reference on the record.
  struct DiskPart {
    int record = 0;
    int begin = 0;
    int end = 0;
  };
  std::vector<DiskPart> FindOnDisk(const std::vector<PrefixHash>& hashes, int begin);
  void Load(Sequence& s, const DiskPart& part, const std::vector<PrefixHash>& hashes, Batch& batch);
  void Truncate(Sequence& s, int blocks);
  bool TakeFromDisk(Sequence& s, const std::vector<PrefixHash>& hashes, int found, Batch& batch);
  void KeepOnDisk(Sequence& s, int record, Batch& batch);
  bool Spill(Batch& batch);
  int SpillableBlocks(const Sequence& s) const;
  bool streaming() const;
  int MostTokens() const;
  void Recompute(std::vector<Finished>& finished);
  void WriteLater(const Sequence& s, int begin, int end);
  void WritePages(std::vector<Batch::PageOp>& ops);
  std::optional<int> LookupPage(const PrefixHash& prefix);
  void IndexPage(int record, std::vector<PrefixHash> prefix);
  void EndCancelled(std::vector<Finished>& finished);
  bool Grow(Sequence& s, int tokens, Batch& batch);
  bool GrowOrPreempt(Sequence& s, int tokens, Batch& batch);
  bool PreemptAnother(const Sequence& keep, Batch& batch);
  bool AnyInFlight() const;
  void AddRun(Sequence& s, int rows, bool decode, Step& step);
  double DraftPrice(int decoding) const;
  int MostDrafts() const;
  int RoomForDrafts(const Sequence& s) const;
  int AddDrafts(int rows, Step& step);
  void TakeDraft(Sequence& s, int accepted);
  void AddLogits(Sequence& s, int row, Step& step);
  void AdmitTwins(const Sequence& of, Batch& batch,
                  std::vector<std::pair<const Sequence*, Sequence*>>& twins);
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
  BlockAllocator
      pages_;  // records of the page files, by the prefix that ends with their last block
  std::unordered_map<PrefixHash, int, PrefixHasher> record_of_;  // by that of any of their blocks
  std::vector<std::vector<PrefixHash>> prefixes_;                // [records]
  struct PendingLoad {
    Sequence* sequence = nullptr;  // stays while it has loads
    DiskPart part;
  };
  std::vector<PendingLoad> loads_;
  struct PendingWrite {
    std::vector<PrefixHash> prefix;
    std::vector<int> blocks;
  };
  std::vector<PendingWrite> writes_;  // filled by steps handed out; written with the next
  StepCosts costs_;
  int stages_ = 1;
  std::unique_ptr<Drafter> drafter_;
  DraftRecord drafts_held_;  // of all sequences: what a new one begins with
  double stalls_;            // long steps that decoding sequences may still see, added up over them
  SequenceId next_id_ = 1;
  int64_t next_step_ = 1;
  int64_t admissions_ = 0;
  Stats totals_;
};

}  // namespace shoal
