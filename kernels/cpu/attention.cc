#include "kernels/cpu/attention.h"

#include <algorithm>
#include <cmath>

#include "kernels/check.h"
#include "kernels/kv_layout.h"

namespace shoal {
namespace {

constexpr int kStateQueries = 256;  // most query vectors of a prefill item
constexpr int kPrefillRows = 64;    // most rows of a prefill item
constexpr int kItemsPerThread = 4;  // fewer decode items than this are split by runs

static_assert(kRunTokens == kRunBlocks * kKvBlockTokens);
static_assert(kMaxGroup <= kStateQueries);

int RoundUp(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }
int64_t DivUp(int64_t n, int64_t by) { return (n + by - 1) / by; }

const AttentionKernels& KernelsFor(CpuLevel level) {
  switch (level) {
    case CpuLevel::kScalar:
      return ScalarAttentionKernels();
    case CpuLevel::kAvx2:
    case CpuLevel::kAvxVnni:
      return Avx2AttentionKernels();
    case CpuLevel::kAvx512:
    case CpuLevel::kAmx:
      return Avx512AttentionKernels();
  }
  return ScalarAttentionKernels();
}

// An open softmax: acc / sum is the output of the tokens seen so far, with weights relative to
// exp(max).
struct Softmax {
  float* acc;
  float* max;
  float* sum;
};

void Clear(const Softmax& state, int dims) {
  *state.max = kNoScore;
  *state.sum = 0;
  std::fill(state.acc, state.acc + dims, 0.0f);
}

void Merge(const Softmax& state, const Softmax& run, int dims) {
  const float max = std::max(*state.max, *run.max);
  const float keep = std::exp(*state.max - max);
  const float add = std::exp(*run.max - max);
  *state.max = max;
  *state.sum = *state.sum * keep + *run.sum * add;
  for (int d = 0; d < dims; ++d) state.acc[d] = state.acc[d] * keep + run.acc[d] * add;
}

void Finish(const Softmax& state, int dims, float* out) {
  const float inverse = 1 / *state.sum;  // a token sees itself, so the sum is at least exp(0)
  for (int d = 0; d < dims; ++d) out[d] = state.acc[d] * inverse;
}

// A decode row, or a prefill segment.
struct WorkUnit {
  const Segment* segment;
  int32_t row;         // decode: row within the segment
  int32_t first_run;   // decode: first run that the row sees
  int64_t unit_begin;  // work units (runs, rows or chunks of rows) of all entries before this one
};

// The last entry whose unit_begin is not beyond `unit`.
const WorkUnit& FindUnit(const WorkUnit* list, int count, int64_t unit) {
  return *(std::upper_bound(list, list + count, unit,
                            [](int64_t u, const WorkUnit& w) { return u < w.unit_begin; }) -
           1);
}

}  // namespace

void CheckSegments(const Backend::Limits& limits, const AttentionShape& shape, const KvLayer& kv,
                   absl::Span<const Segment> segments) {
  SHOAL_CHECK(limits.rows > 0, "call Reserve before the ops");
  SHOAL_CHECK(shape.head_dim == kv.shape.head_dim, "queries and KV cache differ in head_dim");
  SHOAL_CHECK(shape.head_dim >= 2 && shape.head_dim % 2 == 0 && shape.head_dim <= limits.head_dim,
              "head_dim is odd or beyond Limits");
  SHOAL_CHECK(shape.q_heads >= 1 && shape.q_heads <= limits.heads, "q_heads are beyond Limits");
  SHOAL_CHECK(shape.group >= 1 && shape.group <= kMaxGroup, "group is out of range");
  const int first = shape.q_head_begin / shape.group - shape.kv_head_begin;
  const int last = (shape.q_head_begin + shape.q_heads - 1) / shape.group - shape.kv_head_begin;
  SHOAL_CHECK(first >= 0 && last < kv.shape.kv_heads, "a query head's KV head is not held here");
  SHOAL_CHECK(static_cast<int>(segments.size()) <= limits.rows, "more segments than rows");
  for (const Segment& s : segments) {
    SHOAL_CHECK(s.row >= 0 && s.rows >= 0 && s.row <= limits.rows - s.rows,
                "a segment's rows are beyond Limits");
    SHOAL_CHECK(s.pos >= 0 && s.pos <= limits.context - s.rows,
                "a segment's positions are beyond Limits");
    SHOAL_CHECK(s.rows == 0 || s.blocks != nullptr, "a segment has no block table");
  }
}

// The workspace: partial softmaxes of split rows, lists of work, then a scratch for each thread.
struct AttentionEngine::Layout {
  int acc_stride = 0;         // floats of an accumulator
  int64_t partial_slots = 0;  // (query head, run) pairs that split rows may have
  int64_t partial_acc = 0;    // offsets in bytes
  int64_t partial_max = 0;
  int64_t partial_sum = 0;
  int64_t decode_rows = 0;
  int64_t prefill_chunks = 0;
  int64_t threads = 0;
  int64_t thread_bytes = 0;
  int64_t bytes = 0;
};

struct AttentionEngine::Call {
  Layout layout;
  const float* q;
  int64_t q_stride;
  const AttentionShape* shape;
  const KvLayer* kv;
  float* out;
  int64_t out_stride;
  void (*attend)(const AttendArgs& args);

  bool split = false;  // decode rows are split by runs
  WorkUnit* decode;    // [decode_count + 1], the last one ends the list
  WorkUnit* prefill;   // [prefill_count + 1]
  int decode_count = 0;
  int prefill_count = 0;
  int chunk_rows = 1;  // rows of a prefill item
  uint8_t* workspace;

  int64_t decode_items() const { return decode[decode_count].unit_begin * kv->shape.kv_heads; }
  int64_t prefill_items() const { return prefill[prefill_count].unit_begin * kv->shape.kv_heads; }
  // Query heads that read local KV head h: [first, last).
  int FirstHead(int kv_head) const {
    return std::max(0, (shape->kv_head_begin + kv_head) * shape->group - shape->q_head_begin);
  }
  int LastHead(int kv_head) const {
    return std::min(shape->q_heads,
                    (shape->kv_head_begin + kv_head + 1) * shape->group - shape->q_head_begin);
  }
  int FirstVisible(int pos) const {
    return shape->window > 0 ? std::max(0, pos - shape->window + 1) : 0;
  }
  Softmax Partial(int64_t slot) const {
    return {reinterpret_cast<float*>(workspace + layout.partial_acc) + slot * layout.acc_stride,
            reinterpret_cast<float*>(workspace + layout.partial_max) + slot,
            reinterpret_cast<float*>(workspace + layout.partial_sum) + slot};
  }
};

struct AttentionEngine::Scratch {
  int acc_stride;
  float* scores;     // [kTileQueries, kRunTokens]
  float* run_acc;    // [kTileQueries, acc_stride]
  float* run_max;    // [kTileQueries]
  float* run_sum;    // [kTileQueries]
  float* state_acc;  // [kStateQueries, acc_stride]
  float* state_max;  // [kStateQueries]
  float* state_sum;  // [kStateQueries]

  Softmax Run(int i) const { return {run_acc + i * acc_stride, run_max + i, run_sum + i}; }
  Softmax State(int i) const { return {state_acc + i * acc_stride, state_max + i, state_sum + i}; }
};

// Rows of one segment times the query heads of one KV head. Vector v is head v / rows, row v %
// rows.
struct AttentionEngine::Queries {
  const Call& call;
  const Segment& segment;
  int row;  // within the segment
  int rows;
  int kv_head;
  int first_head;
  int heads;

  int count() const { return rows * heads; }
  int Pos(int v) const { return segment.pos + row + v % rows; }
  int Head(int v) const { return first_head + v / rows; }
  int64_t BatchRow(int v) const { return segment.row + row + v % rows; }
  int FirstRun() const { return call.FirstVisible(segment.pos + row) / kRunTokens; }
  int LastRun() const { return (segment.pos + row + rows - 1) / kRunTokens; }

  // Fills everything but the scratch of `args` for vectors [v, v + n). False when none sees a token
  // of the run.
  bool Prepare(int v, int n, int run, AttendArgs* args) const;
};

bool AttentionEngine::Queries::Prepare(int v, int n, int run, AttendArgs* args) const {
  const int base = run * kRunTokens;
  int begin = kRunTokens, end = 0;
  for (int i = 0; i < n; ++i) {
    const int pos = Pos(v + i);
    args->q[i] = call.q + BatchRow(v + i) * call.q_stride +
                 static_cast<int64_t>(Head(v + i)) * call.shape->head_dim;
    args->end[i] = std::clamp(pos + 1 - base, 0, kRunTokens);
    args->begin[i] = std::clamp(call.FirstVisible(pos) - base, 0, args->end[i]);
    if (args->begin[i] == args->end[i]) continue;
    begin = std::min(begin, args->begin[i]);
    end = std::max(end, args->end[i]);
  }
  if (begin >= end) return false;
  args->queries = n;
  args->head_dim = call.shape->head_dim;
  args->scale = call.shape->scale;
  args->block_begin = begin / kKvBlockTokens;
  args->block_end = static_cast<int>(DivUp(end, kKvBlockTokens));
  args->token_end = end;
  for (int b = args->block_begin; b < args->block_end; ++b) {
    const int32_t block = segment.blocks[run * kRunBlocks + b];
    SHOAL_CHECK(block >= 0, "a visible position has no KV block");
    args->k[b] = KvBlockK(*call.kv, block, kv_head);
    args->v[b] = KvBlockV(*call.kv, block, kv_head);
  }
  return true;
}

AttentionEngine::AttentionEngine(CpuLevel level, ThreadPool* pool)
    : kernels_(KernelsFor(level)), pool_(pool) {}

AttentionEngine::Layout AttentionEngine::MakeLayout(const Backend::Limits& limits) const {
  Layout l;
  const auto take = [&l](int64_t bytes) {
    const int64_t offset = l.bytes;
    l.bytes += DivUp(bytes, 64) * 64;
    return offset;
  };
  l.acc_stride = RoundUp(limits.head_dim, kKvBlockTokens);
  const int64_t runs = DivUp(limits.context, kRunTokens);
  const int64_t split_rows = std::max<int64_t>(
      1, DivUp(int64_t{kItemsPerThread} * pool_->threads(), std::max(limits.heads, 1)));
  l.partial_slots = split_rows * runs * limits.heads;
  l.partial_acc = take(l.partial_slots * l.acc_stride * 4);
  l.partial_max = take(l.partial_slots * 4);
  l.partial_sum = take(l.partial_slots * 4);
  l.decode_rows = take((limits.rows + int64_t{1}) * sizeof(WorkUnit));
  l.prefill_chunks = take((limits.rows + int64_t{1}) * sizeof(WorkUnit));
  l.threads = l.bytes;
  const int64_t floats = int64_t{kTileQueries} * kRunTokens +
                         int64_t{kTileQueries + kStateQueries} * (l.acc_stride + 2);
  l.thread_bytes = DivUp(floats * 4, 4096) * 4096;
  l.bytes += pool_->threads() * l.thread_bytes;
  return l;
}

absl::Status AttentionEngine::Reserve(const Backend::Limits& limits) {
  SHOAL_CHECK(limits.head_dim <= kMaxHeadDim, "head_dim is larger than the kernels take");
  absl::StatusOr<Buffer> workspace = Buffer::Allocate(MakeLayout(limits).bytes);
  if (!workspace.ok()) return workspace.status();
  workspace_ = *std::move(workspace);
  limits_ = limits;
  return absl::OkStatus();
}

int64_t AttentionEngine::WorkspaceBytes(const Backend::Limits& limits) const {
  return MakeLayout(limits).bytes;
}

AttentionEngine::Scratch AttentionEngine::ThreadScratch(const Call& call, int thread) {
  Scratch s;
  s.acc_stride = call.layout.acc_stride;
  float* next = reinterpret_cast<float*>(workspace_.data() + call.layout.threads +
                                         thread * call.layout.thread_bytes);
  const auto take = [&next](int floats) {
    float* begin = next;
    next += floats;
    return begin;
  };
  s.scores = take(kTileQueries * kRunTokens);
  s.run_acc = take(kTileQueries * s.acc_stride);
  s.state_acc = take(kStateQueries * s.acc_stride);
  s.run_max = take(kTileQueries);
  s.run_sum = take(kTileQueries);
  s.state_max = take(kStateQueries);
  s.state_sum = take(kStateQueries);
  return s;
}

void AttentionEngine::Run(const float* q, int64_t q_stride, const AttentionShape& shape,
                          const KvLayer& kv, absl::Span<const Segment> segments, float* out,
                          int64_t out_stride) {
  CheckSegments(limits_, shape, kv, segments);
  Call call;
  call.layout = MakeLayout(limits_);
  call.q = q;
  call.q_stride = q_stride;
  call.shape = &shape;
  call.kv = &kv;
  call.out = out;
  call.out_stride = out_stride;
  call.workspace = workspace_.data();
  call.attend = kv.shape.type == KvType::kF32   ? kernels_.attend_f32
                : kv.shape.type == KvType::kF16 ? kernels_.attend_f16
                                                : kernels_.attend_q8;
  call.decode = reinterpret_cast<WorkUnit*>(workspace_.data() + call.layout.decode_rows);
  call.prefill = reinterpret_cast<WorkUnit*>(workspace_.data() + call.layout.prefill_chunks);
  PlanItems(&call, segments);
  next_item_.store(0, std::memory_order_relaxed);
  next_merge_.store(0, std::memory_order_relaxed);
  pool_->Run([&](int thread) { Work(call, thread); });
}

void AttentionEngine::PlanItems(Call* call, absl::Span<const Segment> segments) {
  const int chunk = std::min(kPrefillRows, kStateQueries / call->shape->group);
  call->chunk_rows = chunk >= kTileQueries ? chunk / kTileQueries * kTileQueries : chunk;
  int64_t chunks = 0, runs = 0;
  for (const Segment& s : segments) {
    if (s.rows == 0) continue;
    if (!s.decode) {
      call->prefill[call->prefill_count++] = {&s, 0, 0, chunks};
      chunks += DivUp(s.rows, call->chunk_rows);
      continue;
    }
    for (int row = 0; row < s.rows; ++row) {
      const int pos = s.pos + row;
      const int first_run = call->FirstVisible(pos) / kRunTokens;
      SHOAL_CHECK(call->decode_count < limits_.rows, "more decode rows than Limits");
      call->decode[call->decode_count++] = {&s, row, first_run, runs};
      runs += pos / kRunTokens + 1 - first_run;
    }
  }
  call->prefill[call->prefill_count] = {nullptr, 0, 0, chunks};
  call->decode[call->decode_count] = {nullptr, 0, 0, runs};
  const int64_t items = int64_t{call->decode_count} * call->kv->shape.kv_heads;
  call->split = items < int64_t{kItemsPerThread} * pool_->threads() && runs > call->decode_count &&
                runs * call->shape->q_heads <= call->layout.partial_slots;
  if (call->split) return;
  for (int i = 0; i <= call->decode_count; ++i) call->decode[i].unit_begin = i;
}

void AttentionEngine::Work(const Call& call, int thread) {
  const Scratch scratch = ThreadScratch(call, thread);
  const int kv_heads = call.kv->shape.kv_heads;
  const int64_t decode_items = call.decode_items();
  const int64_t items = decode_items + call.prefill_items();
  while (true) {
    const int64_t item = next_item_.fetch_add(1, std::memory_order_relaxed);
    if (item >= items) break;
    // Later chunks of a prompt see more tokens: they go first, so that no thread ends with a long
    // one.
    const bool decode = item < decode_items;
    const int64_t index = decode ? item : items - 1 - item;
    const int kv_head = static_cast<int>(index % kv_heads);
    const int64_t unit = index / kv_heads;
    const int first_head = call.FirstHead(kv_head);
    const int heads = call.LastHead(kv_head) - first_head;
    if (heads <= 0) continue;
    const WorkUnit& work = decode ? FindUnit(call.decode, call.decode_count, unit)
                                  : FindUnit(call.prefill, call.prefill_count, unit);
    const int64_t part = unit - work.unit_begin;
    if (decode) {
      const Queries queries{call, *work.segment, work.row, 1, kv_head, first_head, heads};
      if (call.split) {
        SplitItem(queries, work.first_run + static_cast<int>(part), unit, scratch);
      } else {
        Walk(queries, scratch);
      }
    } else {
      const int row = static_cast<int>(part) * call.chunk_rows;
      const int rows = std::min(call.chunk_rows, work.segment->rows - row);
      Walk(Queries{call, *work.segment, row, rows, kv_head, first_head, heads}, scratch);
    }
  }
  if (!call.split) return;
  pool_->Barrier();
  const int64_t merges = int64_t{call.decode_count} * call.shape->q_heads;
  while (true) {
    const int64_t item = next_merge_.fetch_add(1, std::memory_order_relaxed);
    if (item >= merges) break;
    MergeRow(call, static_cast<int>(item / call.shape->q_heads),
             static_cast<int>(item % call.shape->q_heads), scratch);
  }
}

void AttentionEngine::Walk(const Queries& queries, const Scratch& scratch) {
  const Call& call = queries.call;
  const int dims = call.shape->head_dim;
  for (int v = 0; v < queries.count(); ++v) Clear(scratch.State(v), dims);
  AttendArgs args;
  args.scores = scratch.scores;
  args.acc = scratch.run_acc;
  args.acc_stride = scratch.acc_stride;
  args.max = scratch.run_max;
  args.sum = scratch.run_sum;
  for (int run = queries.FirstRun(); run <= queries.LastRun(); ++run) {
    for (int v = 0; v < queries.count(); v += kTileQueries) {
      const int n = std::min(kTileQueries, queries.count() - v);
      if (!queries.Prepare(v, n, run, &args)) continue;
      call.attend(args);
      for (int i = 0; i < n; ++i) Merge(scratch.State(v + i), scratch.Run(i), dims);
    }
  }
  for (int v = 0; v < queries.count(); ++v) {
    Finish(scratch.State(v), dims,
           call.out + queries.BatchRow(v) * call.out_stride + int64_t{queries.Head(v)} * dims);
  }
}

void AttentionEngine::SplitItem(const Queries& queries, int run, int64_t unit,
                                const Scratch& scratch) {
  const Call& call = queries.call;
  AttendArgs args;
  args.scores = scratch.scores;
  args.acc_stride = scratch.acc_stride;
  for (int v = 0; v < queries.count(); v += kTileQueries) {
    const int n = std::min(kTileQueries, queries.count() - v);
    const Softmax out = call.Partial(unit * call.shape->q_heads + queries.Head(v));
    args.acc = out.acc;
    args.max = out.max;
    args.sum = out.sum;
    SHOAL_CHECK(queries.Prepare(v, n, run, &args), "a split run holds no visible token");
    call.attend(args);
  }
}

void AttentionEngine::MergeRow(const Call& call, int row, int head, const Scratch& scratch) {
  const int dims = call.shape->head_dim;
  const WorkUnit& work = call.decode[row];
  const Softmax state = scratch.State(0);
  Clear(state, dims);
  for (int64_t unit = work.unit_begin; unit < call.decode[row + 1].unit_begin; ++unit) {
    Merge(state, call.Partial(unit * call.shape->q_heads + head), dims);
  }
  const int64_t batch_row = work.segment->row + work.row;
  Finish(state, dims, call.out + batch_row * call.out_stride + int64_t{head} * dims);
}

}  // namespace shoal
