// Attention and the writes to its cache. See ops.h.
#pragma once

#include <cstdint>

#include "kernels/backend.h"
#include "kernels/cuda/batch_plan.h"
#include "kernels/cuda/workspace.h"

struct CUstream_st;

namespace shoal::cuda {

using Stream = CUstream_st*;

// Attention (attention.cu, attention_prefill.cu). Arguments as those of the Backend methods, with
// device pointers in them; the segments come as a plan (planner.h). Rows of no segment are left
// alone.

// args.rope is read here, on the host.
void QkvToCache(const QkvArgs& args, const AttentionShape& shape, const KvLayer& kv,
                const BatchPlan& plan, Stream stream);

// What PlanOptions::prefill_tile shall be on a device whose blocks may have `max_shared_bytes` of
// shared memory. 0 for an f32 cache, whose users want every bit.
int PrefillTile(const KvShape& kv, int64_t max_shared_bytes);

struct AttentionChip {
  int64_t max_shared_bytes = 0;  // of a block: cudaDevAttrMaxSharedMemoryPerBlockOptin
  int multiprocessors = 1;
};
// How batches are cut where the workspace holds partial results of `partial_items` splits.
// SHOAL_CUDA_SPLIT_PROMPTS=0: no prompt over its context.
PlanOptions PlanOptionsFor(const AttentionShape& shape, const KvShape& kv,
                           const AttentionChip& chip, int partial_items);

// `workspace`: AttentionWorkspaceBytes of the plan's PlanOptions::partial_items.
void Attention(const float* q, int64_t q_stride, const AttentionShape& shape, const KvLayer& kv,
               const BatchPlan& plan, uint8_t* workspace, float* out, int64_t out_stride,
               Stream stream);

}  // namespace shoal::cuda
