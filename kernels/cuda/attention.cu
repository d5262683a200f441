// Launches of what decode rows need, and of the writes to the cache.
#include <cstdlib>

#include "kernels/cuda/attention_decode.cuh"
#include "kernels/cuda/attention_ops.h"
#include "kernels/cuda/kv_view.cuh"
#include "kernels/cuda/prefill_params.cuh"
#include "kernels/cuda/qkv_to_cache.cuh"

namespace shoal::cuda {
namespace {

static_assert(kBlockTokens == kKvBlockTokens && kPartDims == kKvPartDims);

using DecodeKernel = void (*)(DecodeParams);

struct DecodeChoice {
  DecodeKernel kernel;
  int heads;  // query heads of a block
};

// Few heads leave registers to more warps; eight keep the reads of K and V at one for each group.
template <typename Format>
DecodeChoice ChooseDecode(int heads, int head_dim) {
  if (head_dim % Format::kLane != 0) return {AttendSplit<Format, 4, false>, 4};
  if (heads <= 1) return {AttendSplit<Format, 1, true>, 1};
  if (heads <= 4) return {AttendSplit<Format, 4, true>, 4};
  return {AttendSplit<Format, 8, true>, 8};
}

DecodeChoice ChooseDecode(KvType type, int heads, int head_dim) {
  switch (type) {
    case KvType::kF32:
      return ChooseDecode<F32Kv>(heads, head_dim);
    case KvType::kF16:
      return ChooseDecode<F16Kv>(heads, head_dim);
    case KvType::kQ8_0:
      break;
  }
  return ChooseDecode<Q8Kv>(heads, head_dim);
}

void WriteCache(const CacheParams& params, KvType type, int rows, Stream stream) {
  const int heads = params.q_heads + 2 * params.kv.kv_heads;
  const dim3 grid(rows, (heads + kCacheWarps - 1) / kCacheWarps);
  const size_t shared = sizeof(float) * kCacheWarps * params.kv.head_dim;
  const auto kernel = type == KvType::kF32   ? WriteQkv<F32Writer>
                      : type == KvType::kF16 ? WriteQkv<F16Writer>
                                             : WriteQkv<Q8Writer>;
  Launch(kernel, grid, dim3(32 * kCacheWarps), shared, stream, params);
}

}  // namespace

void QkvToCache(const QkvArgs& args, const AttentionShape& shape, const KvLayer& kv,
                const BatchPlan& plan, Stream stream) {
  if (plan.row_count == 0) return;
  CacheParams params = {};
  params.q = args.q;
  params.k = args.k;
  params.v = args.v;
  params.stride = args.stride;
  params.norm = args.norm;
  params.q_norm = args.q_norm;
  params.k_norm = args.k_norm;
  params.eps = args.eps;
  params.squares = args.squares;
  params.q_scale = args.q_scale;
  params.q_cols = args.q_cols;
  params.k_cols = args.k_cols;
  if (args.rope != nullptr && args.rope->rotary_dim > 0) {
    params.rope = {args.rope->cos, args.rope->sin, args.rope->rotary_dim / 2, args.rope->neox};
  }
  params.q_heads = shape.q_heads;
  params.kv = ViewOf(kv);
  params.rows = plan.rows;
  params.tables = plan.tables;
  WriteCache(params, kv.shape.type, plan.row_count, stream);
}

void Attention(const float* q, int64_t q_stride, const AttentionShape& shape, const KvLayer& kv,
               const BatchPlan& plan, uint8_t* workspace, float* out, int64_t out_stride,
               Stream stream) {
  const KvView view = ViewOf(kv);
  const HeadMap heads = MapOf(shape);
  if (plan.prefill_pass_count > 0) {
    PrefillParams prompts = {};
    prompts.q = q;
    prompts.q_stride = q_stride;
    prompts.out = out;
    prompts.out_stride = out_stride;
    prompts.kv = view;
    prompts.heads = heads;
    prompts.scale_log2 = ScaleLog2(shape);
    prompts.segments = plan.segments;
    prompts.tables = plan.tables;
    AttendPrompts(prompts, kv.shape.type, plan, workspace, stream);
  }
  const int most_heads = shape.group < shape.q_heads ? shape.group : shape.q_heads;
  const DecodeChoice choice = ChooseDecode(kv.shape.type, most_heads, shape.head_dim);
  const int stride = PartialStride(shape.head_dim);
  const char* const wanted = std::getenv("SHOAL_CUDA_PREFETCH");
  const bool prefetch = wanted == nullptr || wanted[0] != '0';
  DecodePass begin = {0, 0};
  for (int i = 0; i < plan.pass_count; ++i) {
    const DecodePass end = plan.passes[i];
    const int items = end.item_end - begin.item_end;
    float* acc = reinterpret_cast<float*>(workspace);
    auto* state =
        reinterpret_cast<float2*>(acc + static_cast<int64_t>(items) * shape.q_heads * stride);
    const dim3 grid(items, view.kv_heads, (most_heads + choice.heads - 1) / choice.heads);
    Launch(choice.kernel, grid, dim3(kDecodeThreads),
           DecodeSharedBytes(choice.heads, shape.head_dim), stream,
           DecodeParams{q, q_stride, view, heads, ScaleLog2(shape), plan.rows, plan.tables,
                        plan.decode_items + begin.item_end, acc, state, stride, prefetch});
    Launch(MergeSplits, dim3(end.row_end - begin.row_end, shape.q_heads), dim3(kMergeThreads),
           MergeSharedBytes(stride), stream,
           MergeParams{plan.decode_rows + begin.row_end, plan.rows, acc, state, out, out_stride,
                       heads, begin.item_end, shape.head_dim, stride});
    begin = end;
  }
}

}  // namespace shoal::cuda
