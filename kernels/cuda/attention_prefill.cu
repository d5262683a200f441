#include "kernels/cuda/attention_prefill.cuh"

#include <algorithm>
#include <cstdlib>

#include "kernels/cuda/attention_ops.h"

namespace shoal::cuda {
namespace {

// Query vectors, K and V of a tile fit in what every chip since sm_75 gives a block, apart from
// heads of more than 128 dims.
struct PrefillChoice {
  void (*kernel)(PrefillParams) = nullptr;
  int vectors = 0;
  int tokens = 0;
  int threads = 0;
  int64_t shared_bytes = 0;
};

template <typename T>
PrefillChoice Choice() {
  return {AttendTile<T>, T::kVectors, T::kTokens, T::kThreads, T::kSharedBytes};
}

template <bool kQ8>
PrefillChoice Choose(int head_dim) {
  if (head_dim <= 64) return Choice<PrefillTraits<kQ8, 64, 4, 64>>();
  // The sums of 32 dims of q8_0 are registers too: fewer scores at a time leave room for them.
  constexpr int kTokens = kQ8 ? 48 : 64;
  if (head_dim <= 96) return Choice<PrefillTraits<kQ8, 96, 4, kTokens>>();
  if (head_dim <= 128) return Choice<PrefillTraits<kQ8, 128, 4, kTokens>>();
  if (head_dim <= 256) return Choice<PrefillTraits<kQ8, 256, 2, 32>>();
  return {};
}

PrefillChoice Choose(KvType type, int head_dim) {
  switch (type) {
    case KvType::kF32:
      break;
    case KvType::kF16:
      return Choose<false>(head_dim);
    case KvType::kQ8_0:
      return Choose<true>(head_dim);
  }
  return {};
}

// Positions of a run, about. Joining costs a block of 64 vectors of 128 dims 64 KB of reads and
// writes each in the L2 cache, beside 512 KB of K and V; a chunk of few rows over a context of 8k
// has 8 runs.
constexpr int kRunTokens = 1024;
constexpr int kBlocksOnSm = 2;  // what the registers of most tiles leave

// Two carries (PrefillMergeParams) come first in the workspace, then a pass's partial results.
int64_t CarryBytes(int kv_heads, int vectors) {
  return 2 * static_cast<int64_t>(sizeof(float2)) * kv_heads * vectors;
}
int64_t RunBytes(int kv_heads, int vectors, int head_dim) {
  return static_cast<int64_t>(kv_heads) * vectors *
         static_cast<int64_t>(PartialStride(head_dim) * sizeof(float) + sizeof(float2));
}

int PartialRuns(const AttentionShape& shape, const KvShape& kv, int partial_items) {
  const int vectors = Choose(kv.type, kv.head_dim).vectors;
  if (vectors == 0) return 0;
  const int64_t bytes = AttentionWorkspaceBytes(shape.q_heads, shape.head_dim, partial_items) -
                        CarryBytes(kv.kv_heads, vectors);
  return static_cast<int>(std::max<int64_t>(0, bytes) /
                          RunBytes(kv.kv_heads, vectors, kv.head_dim));
}

}  // namespace

int PrefillTile(const KvShape& kv, int64_t max_shared_bytes) {
  const PrefillChoice choice = Choose(kv.type, kv.head_dim);
  return choice.shared_bytes <= max_shared_bytes ? choice.vectors : 0;
}

PlanOptions PlanOptionsFor(const AttentionShape& shape, const KvShape& kv,
                           const AttentionChip& chip, int partial_items) {
  PlanOptions options;
  options.partial_items = partial_items;
  options.prefill_tile = PrefillTile(kv, chip.max_shared_bytes);
  if (options.prefill_tile == 0) return options;
  const PrefillChoice choice = Choose(kv.type, kv.head_dim);
  options.run_tokens = kRunTokens / choice.tokens * choice.tokens;
  options.kv_heads = kv.kv_heads;
  options.resident_blocks = kBlocksOnSm * chip.multiprocessors;
  const char* const wanted = std::getenv("SHOAL_CUDA_SPLIT_PROMPTS");
  if (wanted == nullptr || wanted[0] != '0') {
    options.partial_runs = PartialRuns(shape, kv, partial_items);
  }
  return options;
}

void AttendPrompts(PrefillParams params, KvType type, const BatchPlan& plan, uint8_t* workspace,
                   Stream stream) {
  const PrefillChoice choice = Choose(type, params.kv.head_dim);
  const int vectors = choice.vectors, kv_heads = params.kv.kv_heads;
  auto* const carries = reinterpret_cast<float2*>(workspace);
  params.run_tokens = plan.run_tokens;
  params.acc_stride = PartialStride(params.kv.head_dim);
  params.acc = reinterpret_cast<float*>(workspace + CarryBytes(kv_heads, vectors));
  params.whole_tiles = plan.whole_tiles;
  PrefillPass begin = {0, 0};
  for (int i = 0; i < plan.prefill_pass_count; ++i) {
    const PrefillPass end = plan.prefill_passes[i];
    const int64_t runs = end.item_end - begin.item_end - params.whole_tiles;
    params.state =
        reinterpret_cast<float2*>(params.acc + runs * kv_heads * vectors * params.acc_stride);
    params.items = plan.prefill_items + begin.item_end;
    Launch(choice.kernel, dim3(end.item_end - begin.item_end, kv_heads), dim3(choice.threads),
           static_cast<size_t>(choice.shared_bytes), stream, params);
    if (runs > 0) {
      float2* const carry[2] = {carries, carries + static_cast<int64_t>(kv_heads) * vectors};
      const dim3 grid(end.merge_end - begin.merge_end, kv_heads, vectors / kMergeWarps);
      Launch(MergeRuns, grid, dim3(32 * kMergeWarps), 0, stream,
             PrefillMergeParams{params, plan.prefill_merges + begin.merge_end, vectors,
                                carry[(i + 1) % 2], carry[i % 2]});
    }
    params.whole_tiles = 0;
    begin = end;
  }
}

}  // namespace shoal::cuda
