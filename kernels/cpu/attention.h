// Attention over a paged KV cache, on the threads of one CPU rank.
//
// A decode row takes one item for each few KV heads, or, when those are too few for the threads or
// the context is long, one for each run of 256 tokens of them, whose partial softmaxes are merged
// afterwards. A prefill segment takes items of up to 128 rows for each KV head, which walk over the
// runs and merge as they go. Merging happens in order of position either way, so the result of a
// row does not depend on the number of threads nor on the rest of the batch.
#pragma once

#include <atomic>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/backend.h"
#include "kernels/buffer.h"
#include "kernels/cpu/attention_kernels.h"
#include "kernels/cpu/features.h"
#include "kernels/cpu/thread_pool.h"

namespace shoal {

// Not thread-safe: one call at a time, like the Backend that owns it.
class AttentionEngine {
 public:
  // `level` must be one that this machine has. The pool outlives the engine.
  AttentionEngine(CpuLevel level, ThreadPool* pool);

  // Sizes the workspace; call once before Run. kResourceExhausted when the system refuses.
  absl::Status Reserve(const Backend::Limits& limits);
  int64_t WorkspaceBytes(const Backend::Limits& limits) const;

  // As Backend::Attention.
  void Run(const float* q, int64_t q_stride, const AttentionShape& shape, const KvLayer& kv,
           absl::Span<const Segment> segments, float* out, int64_t out_stride);

  const AttentionKernels& kernels() const { return kernels_; }

 private:
  struct Layout;   // where the parts of the workspace lie
  struct Call;     // the arguments of Run, and its work items
  struct Scratch;  // one thread's part of the workspace
  struct Queries;  // query vectors of one work item

  Layout MakeLayout(const Backend::Limits& limits) const;
  Scratch ThreadScratch(const Call& call, int thread);
  int ChunkRows(const Call& call, absl::Span<const Segment> segments) const;
  void PlanItems(Call* call, absl::Span<const Segment> segments);
  void Work(const Call& call, int thread);
  void DecodeItem(const Call& call, int64_t item, const Scratch& scratch);
  void PrefillItem(const Call& call, int64_t item, const Scratch& scratch);
  // Attends queries to all that they see, run by run; they differ in their KV head only.
  void Walk(absl::Span<const Queries> heads, const Scratch& scratch);
  void WalkTiles(const Queries& queries, const Scratch& scratch);
  // Attends the queries of a decode row to one run; the result goes to the partials of work unit
  // `unit`. next_k: see AttendArgs.
  void SplitItem(const Queries& queries, int run, int64_t unit, int64_t next_k,
                 const Scratch& scratch);
  // Merges the partials of a few heads of a decode row, from `head` on.
  void MergeRow(const Call& call, int row, int head, const Scratch& scratch);

  static AttendArgs Arguments(const Call& call, const Scratch& scratch);
  // Merges what `run` found for n queries into the states from v on.
  void MergeRun(const AttendArgs& run, int n, const Scratch& scratch, int v);

  const AttentionKernels& kernels_;
  const TileKernels* const tiles_;  // null: prefill uses kernels_
  ThreadPool* const pool_;
  Backend::Limits limits_;
  Buffer workspace_;
  alignas(64) std::atomic<int64_t> next_item_{0};
  alignas(64) std::atomic<int64_t> next_merge_{0};
};

}  // namespace shoal
