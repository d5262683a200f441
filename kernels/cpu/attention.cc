#include "kernels/cpu/attention.h"

#include <algorithm>
#include <cmath>

#include "absl/container/inlined_vector.h"
#include "kernels/check.h"
#include "kernels/cpu/segments.h"
#include "kernels/kv_layout.h"

namespace shoal {
namespace {

constexpr int kStateQueries = 512;   // most query vectors of a prefill item
constexpr int kPrefillRows = 128;    // most rows of a prefill item: they share what is packed
constexpr int kItemsPerThread = 4;   // fewer items than this are split: decode by runs
constexpr int kLongRuns = 4;         // rows of as many runs are split if they are few
constexpr int kMostDecodeHeads = 8;  // KV heads of a decode item
constexpr int kMergeHeads = 8;       // query heads whose runs are merged together

static_assert(kRunTokens == kRunBlocks * kKvBlockTokens);
static_assert(kMaxGroup <= kStateQueries);

int RoundUp(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }
int64_t DivUp(int64_t n, int64_t by) { return (n + by - 1) / by; }

const AttentionKernels& KernelsFor(CpuLevel level) {
  switch (level) {
#if defined(__x86_64__)
    case CpuLevel::kAvx2:
    case CpuLevel::kAvxVnni:
      return Avx2AttentionKernels();
    case CpuLevel::kAvx512:
    case CpuLevel::kAmx:
      return Avx512AttentionKernels();
#elif defined(__aarch64__)
    case CpuLevel::kNeon:
    case CpuLevel::kI8mm:
      return NeonAttentionKernels();
#endif
    default:
      return ScalarAttentionKernels();
  }
}

// Null where the level has no tiles.
const TileKernels* TileKernelsFor(CpuLevel level) {
#if defined(__x86_64__)
  if (level == CpuLevel::kAmx) return &AmxTileKernels();
#endif
  return nullptr;
}

// bf16 numbers in the packed operands of a prefill item; see TileArgs.
struct TileSizes {
  int64_t q, k, v, p;
  int64_t total() const { return q + k + v + p; }
};

TileSizes TileNumbers(int head_dim) {
  constexpr int64_t kPair = 2 * kTileElems;
  return {kStateQueries / kTileRows * TileSteps(head_dim) * kPair,
          kRunBlocks * TileSteps(head_dim) * kPair, kRunBlocks / 2 * TileVectors(head_dim) * kPair,
          int64_t{kTileQueries} * kProbStride};
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
  std::fill(state.acc, state.acc + RoundUp(dims, kKvBlockTokens), 0.0f);
}

// `sink`: another score, which weighs but has no value; null: none.
void Finish(const Softmax& state, const float* sink, int dims, float* out) {
  float sum = *state.sum;  // a token sees itself, so this is at least exp(0)
  if (sink != nullptr) sum += std::exp(*sink - *state.max);
  const float inverse = 1 / sum;
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
  const TileKernels* tiles;  // for prefill; null: attend does it
  void (*pack)(const AttendArgs& args, uint16_t* k, uint16_t* v);

  bool split = false;    // decode rows are split by runs
  int decode_heads = 1;  // KV heads of a decode item
  int64_t k_bytes;       // of a head in a block
  WorkUnit* decode;      // [decode_count + 1], the last one ends the list
  WorkUnit* prefill;     // [prefill_count + 1]
  int decode_count = 0;
  int prefill_count = 0;
  int chunk_rows = 1;  // rows of a prefill item
  uint8_t* workspace;

  int decode_groups() const { return (kv->shape.kv_heads + decode_heads - 1) / decode_heads; }
  int64_t decode_items() const { return decode[decode_count].unit_begin * decode_groups(); }
  int64_t prefill_items() const { return prefill[prefill_count].unit_begin * kv->shape.kv_heads; }
  // Query heads that read local KV head h: [first, last).
  int FirstHead(int kv_head) const {
    return std::max(0, (shape->kv_head_begin + kv_head) * shape->group - shape->q_head_begin);
  }
  int LastHead(int kv_head) const {
    return std::min(shape->q_heads,
                    (shape->kv_head_begin + kv_head + 1) * shape->group - shape->q_head_begin);
  }
  int FirstVisible(int pos) const { return shape->FirstVisible(pos); }
  const float* Sink(int head) const {
    return shape->sinks == nullptr ? nullptr : shape->sinks + head;
  }
  Softmax Partial(int64_t slot) const {
    return {reinterpret_cast<float*>(workspace + layout.partial_acc) + slot * layout.acc_stride,
            reinterpret_cast<float*>(workspace + layout.partial_max) + slot,
            reinterpret_cast<float*>(workspace + layout.partial_sum) + slot};
  }
};

struct AttentionEngine::Scratch {
  int acc_stride;
  float* scores;     // [2, kTileQueries, kRunTokens], the second half for tiles only
  float* run_acc;    // [kTileQueries, acc_stride]
  float* run_max;    // [kTileQueries]
  float* run_sum;    // [kTileQueries]
  float* state_acc;  // [kStateQueries, acc_stride]
  float* state_max;  // [kStateQueries]
  float* state_sum;  // [kStateQueries]

  uint16_t*
      tile_q;  // [kStateQueries / kTileQueries, steps] pairs of tiles; these four only with tiles
  uint16_t* tile_k;
  uint16_t* tile_v;
  uint16_t* tile_p;

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
  const float* Q(int v) const {
    return call.q + BatchRow(v) * call.q_stride + int64_t{Head(v)} * call.shape->head_dim;
  }
  float* Out(int v) const {
    return call.out + BatchRow(v) * call.out_stride + int64_t{Head(v)} * call.shape->head_dim;
  }
  int FirstRun() const { return call.FirstVisible(segment.pos + row) / kRunTokens; }
  int LastRun() const { return (segment.pos + row + rows - 1) / kRunTokens; }

  // Says who asks: vectors [v, v + n), and the blocks of the run that they see. False when they see
  // none.
  bool SetQueries(int v, int n, int run, AttendArgs* args) const;
  // Sees tokens [begin, end) of the run: which blocks these are.
  void SetRange(int begin, int end, AttendArgs* args) const;
  // Where those blocks lie.
  void SetBlocks(int run, AttendArgs* args) const;
};

bool AttentionEngine::Queries::SetQueries(int v, int n, int run, AttendArgs* args) const {
  const int base = run * kRunTokens;
  int begin = kRunTokens, end = 0;
  int head = Head(v), r = v % rows;  // followed along: a division for each vector would show
  for (int i = 0; i < n; ++i) {
    const int pos = segment.pos + row + r;
    args->q[i] =
        call.q + (segment.row + row + r) * call.q_stride + int64_t{head} * call.shape->head_dim;
    args->end[i] = std::clamp(pos + 1 - base, 0, kRunTokens);
    args->begin[i] = std::clamp(call.FirstVisible(pos) - base, 0, args->end[i]);
    if (args->begin[i] < args->end[i]) {
      begin = std::min(begin, args->begin[i]);
      end = std::max(end, args->end[i]);
    }
    if (++r == rows) {
      r = 0;
      ++head;
    }
  }
  if (begin >= end) return false;
  args->queries = n;
  SetRange(begin, end, args);
  return true;
}

void AttentionEngine::Queries::SetRange(int begin, int end, AttendArgs* args) const {
  args->block_begin = begin / kKvBlockTokens;
  args->block_end = static_cast<int>(DivUp(end, kKvBlockTokens));
  args->token_end = end;
}

void AttentionEngine::Queries::SetBlocks(int run, AttendArgs* args) const {
  for (int b = args->block_begin; b < args->block_end; ++b) {
    const int32_t block = segment.blocks[run * kRunBlocks + b];
    SHOAL_CHECK(block >= 0, "a visible position has no KV block");
    args->k[b] = KvBlockK(*call.kv, block, kv_head);
    args->v[b] = KvBlockV(*call.kv, block, kv_head);
  }
}

AttentionEngine::AttentionEngine(CpuLevel level, ThreadPool* pool)
    : kernels_(KernelsFor(level)), tiles_(TileKernelsFor(level)), pool_(pool) {}

AttentionEngine::Layout AttentionEngine::MakeLayout(const Backend::Limits& limits) const {
  Layout l;
  const auto take = [&l](int64_t bytes) {
    const int64_t offset = l.bytes;
    l.bytes += DivUp(bytes, 64) * 64;
    return offset;
  };
  l.acc_stride = RoundUp(limits.head_dim, 32);
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
  const int64_t floats = int64_t{2} * kTileQueries * kRunTokens +
                         int64_t{kTileQueries + kStateQueries} * (l.acc_stride + 2);
  const int64_t numbers = tiles_ == nullptr ? 0 : TileNumbers(limits.head_dim).total();
  l.thread_bytes = DivUp(floats * 4 + numbers * 2, 4096) * 4096;
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
  s.scores = take(2 * kTileQueries * kRunTokens);
  s.run_acc = take(kTileQueries * s.acc_stride);
  s.state_acc = take(kStateQueries * s.acc_stride);
  s.run_max = take(kTileQueries);
  s.run_sum = take(kTileQueries);
  s.state_max = take(kStateQueries);
  s.state_sum = take(kStateQueries);
  const TileSizes sizes = TileNumbers(limits_.head_dim);
  s.tile_q =
      reinterpret_cast<uint16_t*>(next);  // beyond the end, and unused, where there are no tiles
  s.tile_k = s.tile_q + sizes.q;
  s.tile_v = s.tile_k + sizes.k;
  s.tile_p = s.tile_v + sizes.v;
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
  call.k_bytes = KvHeadBytes(kv.shape.type, kv.shape.head_dim);
  call.attend = kv.shape.type == KvType::kF32   ? kernels_.attend_f32
                : kv.shape.type == KvType::kF16 ? kernels_.attend_f16
                                                : kernels_.attend_q8;
  // An f32 cache is for those who want every bit: it stays with the f32 kernels.
  call.tiles = kv.shape.type == KvType::kF32 ? nullptr : tiles_;
  call.pack = call.tiles == nullptr           ? nullptr
              : kv.shape.type == KvType::kF16 ? tiles_->pack_f16
                                              : tiles_->pack_q8;
  call.decode = reinterpret_cast<WorkUnit*>(workspace_.data() + call.layout.decode_rows);
  call.prefill = reinterpret_cast<WorkUnit*>(workspace_.data() + call.layout.prefill_chunks);
  PlanItems(&call, segments);
  next_item_.store(0, std::memory_order_relaxed);
  next_merge_.store(0, std::memory_order_relaxed);
  pool_->Run([&](int thread) { Work(call, thread); });
}

// Rows of a prefill item: as many as fit, but no more than leave every thread several items.
int AttentionEngine::ChunkRows(const Call& call, absl::Span<const Segment> segments) const {
  int chunk = std::min(kPrefillRows, kStateQueries / call.shape->group);
  int64_t rows = 0;
  for (const Segment& s : segments) rows += s.decode ? 0 : s.rows;
  const int64_t items = int64_t{kItemsPerThread} * pool_->threads();
  while (chunk > 2 * kTileRows && DivUp(rows, chunk) * call.kv->shape.kv_heads < items) chunk /= 2;
  return chunk >= kTileRows ? chunk / kTileRows * kTileRows : chunk;
}

void AttentionEngine::PlanItems(Call* call, absl::Span<const Segment> segments) {
  call->chunk_rows = ChunkRows(*call, segments);
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
  const int64_t least = int64_t{kItemsPerThread} * pool_->threads();
  call->split = (items < least || runs >= int64_t{kLongRuns} * call->decode_count) &&
                runs > call->decode_count &&
                runs * call->shape->q_heads <= call->layout.partial_slots;
  for (int i = 0; i <= call->decode_count && !call->split; ++i) call->decode[i].unit_begin = i;
  // Heads of a block lie side by side: a thread that takes several reads longer stretches of
  // memory.
  const int64_t units = call->decode[call->decode_count].unit_begin;
  while (call->decode_heads < std::min(kMostDecodeHeads, call->kv->shape.kv_heads) &&
         DivUp(call->kv->shape.kv_heads, 2 * call->decode_heads) * units >= least &&
         2 * call->decode_heads * call->shape->group <= kStateQueries) {
    call->decode_heads *= 2;
  }
}

void AttentionEngine::Work(const Call& call, int thread) {
  const Scratch scratch = ThreadScratch(call, thread);
  const int64_t decode_items = call.decode_items();
  const int64_t items = decode_items + call.prefill_items();
  while (true) {
    const int64_t item = next_item_.fetch_add(1, std::memory_order_relaxed);
    if (item >= items) break;
    if (item < decode_items) {
      DecodeItem(call, item, scratch);
    } else {
      // Later chunks of a prompt see more tokens: they go first, so that no thread ends with a long
      // one.
      PrefillItem(call, items - 1 - item, scratch);
    }
  }
  if (!call.split) return;
  pool_->Barrier();
  const int64_t parts = DivUp(call.shape->q_heads, kMergeHeads);
  while (true) {
    const int64_t item = next_merge_.fetch_add(1, std::memory_order_relaxed);
    if (item >= call.decode_count * parts) break;
    MergeRow(call, static_cast<int>(item / parts), static_cast<int>(item % parts) * kMergeHeads,
             scratch);
  }
}

void AttentionEngine::DecodeItem(const Call& call, int64_t item, const Scratch& scratch) {
  const int64_t unit = item / call.decode_groups();
  const WorkUnit& work = FindUnit(call.decode, call.decode_count, unit);
  const int first = static_cast<int>(item % call.decode_groups()) * call.decode_heads;
  const int last = std::min(first + call.decode_heads, call.kv->shape.kv_heads);
  absl::InlinedVector<Queries, kMostDecodeHeads> queries;
  for (int kv_head = first; kv_head < last; ++kv_head) {
    const int first_head = call.FirstHead(kv_head);
    const int heads = call.LastHead(kv_head) - first_head;
    if (heads <= 0) continue;
    queries.push_back({call, *work.segment, work.row, 1, kv_head, first_head, heads});
  }
  if (!call.split) {
    Walk(queries, scratch);
    return;
  }
  const int run = work.first_run + static_cast<int>(unit - work.unit_begin);
  for (const Queries& q : queries) {
    const bool last = &q == &queries.back();
    SplitItem(q, run, unit, last ? 0 : call.k_bytes, scratch);
  }
}

void AttentionEngine::PrefillItem(const Call& call, int64_t item, const Scratch& scratch) {
  const int kv_heads = call.kv->shape.kv_heads;
  const int kv_head = static_cast<int>(item % kv_heads);
  const int first_head = call.FirstHead(kv_head);
  const int heads = call.LastHead(kv_head) - first_head;
  if (heads <= 0) return;
  const WorkUnit& work = FindUnit(call.prefill, call.prefill_count, item / kv_heads);
  const int row = static_cast<int>(item / kv_heads - work.unit_begin) * call.chunk_rows;
  const int rows = std::min(call.chunk_rows, work.segment->rows - row);
  const Queries queries{call, *work.segment, row, rows, kv_head, first_head, heads};
  if (call.tiles != nullptr) {
    WalkTiles(queries, scratch);
  } else {
    Walk({&queries, 1}, scratch);
  }
}

AttendArgs AttentionEngine::Arguments(const Call& call, const Scratch& scratch) {
  AttendArgs args;
  args.head_dim = call.shape->head_dim;
  args.scale = call.shape->scale;
  args.scores = scratch.scores;
  args.acc = scratch.run_acc;
  args.acc_stride = scratch.acc_stride;
  args.max = scratch.run_max;
  args.sum = scratch.run_sum;
  return args;
}

void AttentionEngine::MergeRun(const AttendArgs& run, int n, const Scratch& scratch, int v) {
  const Softmax state = scratch.State(v);
  kernels_.merge({.queries = n,
                  .dims = run.head_dim,
                  .run_acc = run.acc,
                  .run_max = run.max,
                  .run_sum = run.sum,
                  .acc = state.acc,
                  .max = state.max,
                  .sum = state.sum,
                  .stride = scratch.acc_stride});
}

void AttentionEngine::Walk(absl::Span<const Queries> heads, const Scratch& scratch) {
  if (heads.empty()) return;
  const Call& call = heads[0].call;
  const int dims = call.shape->head_dim;
  AttendArgs args = Arguments(call, scratch);
  int states = 0;
  for (const Queries& queries : heads) states += queries.count();
  for (int v = 0; v < states; ++v) Clear(scratch.State(v), dims);
  for (int run = heads[0].FirstRun(); run <= heads[0].LastRun(); ++run) {
    int state = 0;
    for (const Queries& queries : heads) {
      const int count = queries.count();
      for (int v = 0; v < count; v += kTileQueries) {
        const int n = std::min(kTileQueries, count - v);
        if (!queries.SetQueries(v, n, run, &args)) continue;
        queries.SetBlocks(run, &args);
        args.next_k = v + n == count && &queries != &heads.back() ? call.k_bytes : 0;
        call.attend(args);
        MergeRun(args, n, scratch, state + v);
      }
      state += count;
    }
  }
  int state = 0;
  for (const Queries& queries : heads) {
    for (int v = 0; v < queries.count(); ++v) {
      Finish(scratch.State(state++), call.Sink(queries.Head(v)), dims, queries.Out(v));
    }
  }
}

void AttentionEngine::WalkTiles(const Queries& queries, const Scratch& scratch) {
  const Call& call = queries.call;
  const int dims = call.shape->head_dim;
  const int count = queries.count();
  const int64_t q_numbers = int64_t{TileSteps(dims)} * 2 * kTileElems * kTileQueries / kTileRows;
  AttendArgs packed = Arguments(call, scratch);
  for (int v = 0; v < count; v += kTileQueries) {
    const int n = std::min(kTileQueries, count - v);
    for (int i = 0; i < n; ++i) {
      Clear(scratch.State(v + i), dims);
      packed.q[i] = queries.Q(v + i);
    }
    call.tiles->pack_q(packed.q, n, dims, scratch.tile_q + v / kTileQueries * q_numbers);
  }
  // Two tiles of queries are under way, one of them scored.
  AttendArgs args[2] = {packed, packed};
  args[1].scores += kTileQueries * kRunTokens;
  TileArgs tiles[2] = {};
  const int first = call.FirstVisible(queries.Pos(0));
  const int last = queries.Pos(queries.rows - 1) + 1;
  for (int run = queries.FirstRun(); run <= queries.LastRun(); ++run) {
    // The item's rows share the packed run; each tile then looks at the part that its rows see.
    const int base = run * kRunTokens;
    queries.SetRange(std::max(first - base, 0), std::min(last - base, kRunTokens), &packed);
    queries.SetBlocks(run, &packed);
    call.pack(packed, scratch.tile_k, scratch.tile_v);
    int scored = -1, at = 0;  // the first vector of the tile that is scored, and which it is
    for (int v = 0; v < count; v += kTileQueries) {
      AttendArgs& next = args[1 - at];
      if (!queries.SetQueries(v, std::min(kTileQueries, count - v), run, &next)) continue;
      tiles[1 - at] = {scratch.tile_q + v / kTileQueries * q_numbers, scratch.tile_k,
                       scratch.tile_v, scratch.tile_p};
      if (scored < 0) {
        call.tiles->score(next, tiles[1 - at]);
      } else {
        call.tiles->attend(args[at], tiles[at], &next, &tiles[1 - at]);
        MergeRun(args[at], args[at].queries, scratch, scored);
      }
      scored = v;
      at = 1 - at;
    }
    if (scored < 0) continue;
    call.tiles->attend(args[at], tiles[at], nullptr, nullptr);
    MergeRun(args[at], args[at].queries, scratch, scored);
  }
  for (int v = 0; v < count; ++v) {
    Finish(scratch.State(v), call.Sink(queries.Head(v)), dims, queries.Out(v));
  }
}

void AttentionEngine::SplitItem(const Queries& queries, int run, int64_t unit, int64_t next_k,
                                const Scratch& scratch) {
  const Call& call = queries.call;
  AttendArgs args = Arguments(call, scratch);
  args.next_k = next_k;
  for (int v = 0; v < queries.count(); v += kTileQueries) {
    const int n = std::min(kTileQueries, queries.count() - v);
    const Softmax out = call.Partial(unit * call.shape->q_heads + queries.Head(v));
    args.acc = out.acc;
    args.max = out.max;
    args.sum = out.sum;
    SHOAL_CHECK(queries.SetQueries(v, n, run, &args), "a split run holds no visible token");
    queries.SetBlocks(run, &args);
    call.attend(args);
  }
}

void AttentionEngine::MergeRow(const Call& call, int row, int head, const Scratch& scratch) {
  const WorkUnit& work = call.decode[row];
  const int heads = std::min(kMergeHeads, call.shape->q_heads - head);
  AttendArgs run = Arguments(call, scratch);
  for (int i = 0; i < heads; ++i) Clear(scratch.State(i), run.head_dim);
  for (int64_t unit = work.unit_begin; unit < call.decode[row + 1].unit_begin; ++unit) {
    const Softmax partial = call.Partial(unit * call.shape->q_heads + head);
    run.acc = partial.acc;
    run.max = partial.max;
    run.sum = partial.sum;
    MergeRun(run, heads, scratch, 0);
  }
  float* out = call.out + (work.segment->row + work.row) * call.out_stride;
  for (int i = 0; i < heads; ++i) {
    Finish(scratch.State(i), call.Sink(head + i), run.head_dim,
           out + int64_t{head + i} * run.head_dim);
  }
}

}  // namespace shoal
