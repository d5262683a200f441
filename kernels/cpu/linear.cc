#include "kernels/cpu/linear.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "kernels/buffer.h"
#include "kernels/check.h"
#include "kernels/cpu/linear_kernels.h"
#include "kernels/cpu/operand.h"

namespace shoal {
namespace {

// Bytes of weights that a thread takes at a time from its own share.
constexpr int64_t kRunBytes = 256 << 10;
// Of int8 activations that it multiplies with all panels of a run before it goes on to the next.
constexpr int64_t kInt8RowsBytes = 512 << 10;

int64_t RoundUp(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

bool IsFloat(DType type) { return Info(type).block_elems == 1; }

// Rows [first, first + count) of the operand times one matrix.
struct Job {
  const PackedMatrix* weight = nullptr;
  Path path = Path::kInt8;
  int first = 0;
  int count = 0;
  const int32_t* operand_row = nullptr;  // [count] or null: row first + i
  const int32_t* out_row = nullptr;      // [count] or null: row first + i
  const float* row_scale = nullptr;      // [count] or null: 1
  float* out = nullptr;
  int64_t stride = 0;
  const float* bias = nullptr;
  bool accumulate = false;
  int64_t panel_begin = 0;  // panels of the phase's earlier jobs
  int64_t most_panels = 1;  // of a run

  // Joined with the same panels of this matrix, the product becomes rows first + i of an operand,
  // in place of `out`. Null: it stands alone.
  const PackedMatrix* up = nullptr;
  const float* up_bias = nullptr;
  Activation activation = Activation::kSwiGlu;
  const Operand* gated = nullptr;
};

// Panels [begin, end) of a job.
struct Run {
  const Job* job;
  int64_t begin, end;
};

// The jobs of a phase. Each thread has a share of the panels, all behind each other, and takes runs
// of them from its front: memory streams that start anew every 128 KiB read a fifth less. A thread
// whose share is used up takes the back half of the largest one that is left. Runs shrink towards
// the end of a share, so that the threads end together; those of tiles do not, as they unpack their
// panels for all rows.
class WorkList {
 public:
  explicit WorkList(int threads) : shares_(threads) {}

  std::vector<Job> jobs;

  void Start();  // when the jobs are complete
  bool Take(int thread, Run* run);

 private:
  // Panels [begin, end): end above begin in one word, so that owner and thieves agree.
  struct alignas(64) Share {
    std::atomic<uint64_t> range{0};
  };
  static int64_t Begin(uint64_t range) { return static_cast<int64_t>(range & 0xffffffff); }
  static int64_t End(uint64_t range) { return static_cast<int64_t>(range >> 32); }
  static uint64_t Range(int64_t begin, int64_t end) {
    return (static_cast<uint64_t>(end) << 32) | static_cast<uint64_t>(begin);
  }
  bool Steal(int thread);

  std::vector<Share> shares_;  // [threads]
};

void WorkList::Start() {
  int64_t panels = 0;
  for (Job& job : jobs) {
    const PackedShape& shape = job.weight->shape;
    job.panel_begin = panels;
    panels += shape.panels();
    job.most_panels =
        job.path == Path::kBf16
            ? (job.up != nullptr ? kBf16GatedPanels : kBf16Panels)
            : std::max<int64_t>(1, kRunBytes / std::max<int64_t>(1, shape.panel_bytes()));
  }
  const int64_t threads = static_cast<int64_t>(shares_.size());
  // Even borders, as a product with tiles takes panels in pairs.
  const auto border = [&](int64_t t) {
    return t == threads ? panels : (panels * t / threads) & ~1;
  };
  for (int64_t t = 0; t < threads; ++t) {
    shares_[t].range.store(Range(border(t), border(t + 1)), std::memory_order_relaxed);
  }
}

bool WorkList::Take(int thread, Run* run) {
  do {
    std::atomic<uint64_t>& own = shares_[thread].range;
    uint64_t range = own.load(std::memory_order_relaxed);
    while (Begin(range) < End(range)) {
      const auto after =
          std::upper_bound(jobs.begin(), jobs.end(), Begin(range),
                           [](int64_t panel, const Job& job) { return panel < job.panel_begin; });
      const Job& job = *(after - 1);
      const int64_t begin = Begin(range) - job.panel_begin;
      const int64_t left = End(range) - Begin(range);
      const int64_t most =
          job.path == Path::kBf16 ? job.most_panels : std::min(job.most_panels, (left + 1) / 2);
      const int64_t end =
          std::min({begin + most, job.weight->shape.panels(), End(range) - job.panel_begin});
      if (own.compare_exchange_weak(range, Range(job.panel_begin + end, End(range)),
                                    std::memory_order_relaxed)) {
        *run = {&job, begin, end};
        return true;
      }
    }
  } while (Steal(thread));
  return false;
}

bool WorkList::Steal(int thread) {
  while (true) {
    Share* victim = nullptr;
    uint64_t most = 0;
    for (Share& share : shares_) {
      const uint64_t range = share.range.load(std::memory_order_relaxed);
      if (End(range) - Begin(range) > End(most) - Begin(most)) {
        victim = &share;
        most = range;
      }
    }
    if (victim == nullptr) return false;
    const int64_t middle = std::max(Begin(most), ((Begin(most) + End(most)) / 2) & ~1);
    if (victim->range.compare_exchange_weak(most, Range(Begin(most), middle),
                                            std::memory_order_relaxed)) {
      shares_[thread].range.store(Range(middle, End(most)), std::memory_order_relaxed);
      return true;
    }
  }
}

}  // namespace

struct LinearEngine::Impl {
  Impl(CpuLevel level, ThreadPool* pool)
      : kernels(LinearKernelsOf(level)), pool(pool), work(pool->threads()) {}

  // Workspace layout for some limits; offsets into the buffer.
  struct Layout {
    int64_t slots = 0;  // rows x experts
    Operand input, hidden;
    Operand gated;  // of Ffn: what down's tiles read
    int64_t gate = 0, up = 0, scratch = 0, thread_bytes = 0, total = 0;
    int64_t hidden_cols = 0;
  };

  // By the kind of row alone, never by their number: how a prompt is cut into batches must not
  // change its result. (The scheduler sends prompts of a few tokens down the decode path.)
  Path PathOf(const PackedMatrix& weight, bool prefill) const;
  void Prepare(const OperandRows& rows, int row_begin, int row_end, const int32_t* slot_row,
               const Needs& needs, int thread) const {
    PrepareRows(kernels, rows, row_begin, row_end, slot_row, needs, thread, pool->threads());
  }
  // What the products of rows with several matrices have in common: BeginLinear, an AddJob for
  // each, RunLinear.
  void BeginLinear(int cols, RowCount rows);
  void AddJob(const LinearOutput& o, Path path, int first, int count, Needs* needs);
  void RunLinear(const OperandRows& in, RowCount rows, const Needs& decode, const Needs& prefill);
  void Multiply(const Run& run, const Operand& operand, int thread);
  int Int8Rows(int64_t blocks) const;
  void MultiplyRows(const Run& run, const Operand& operand);
  void MultiplyBf16(const Run& run, const Operand& operand, int thread);
  void MultiplyGated(const Run& run, const Operand& operand, int thread);
  // Gate and up of a prompt can be joined by the product itself.
  bool TilesOnly(const PackedMatrix& gate, const PackedMatrix& up, const PackedMatrix& down) const;
  int GroupByExpert(const int32_t* ids, const float* weights, int row_begin, int row_end, int used,
                    int experts, int slot);
  bool TilesOnly(const ExpertWeights& experts, int slot_begin, int slot_end) const;
  void AddExpertJobs(const ExpertWeights& experts, bool prefill, int slot_begin, int slot_end,
                     Needs* in, Needs* hidden, float* out, int64_t out_stride);

  const LinearKernels kernels;
  ThreadPool* const pool;
  Backend::Limits limits;
  Layout layout;
  Buffer buffer;
  Operand input, hidden, gated;  // pointers into buffer
  float* gate = nullptr;         // [slots, hidden_cols]
  float* up = nullptr;
  WorkList work;
  std::vector<Job> down_jobs;
  std::vector<int32_t> slot_row, slot_expert, expert_count;
  std::vector<float> slot_weight;
  alignas(64) std::atomic<int64_t> next_down{0};

  uint8_t* scratch(int thread) {
    return buffer.data() + layout.scratch + thread * layout.thread_bytes;
  }

  static Layout Plan(const Backend::Limits& limits, int threads, bool bf16);
};

LinearEngine::Impl::Layout LinearEngine::Impl::Plan(const Backend::Limits& limits, int threads,
                                                    bool bf16) {
  Layout l;
  l.slots = int64_t{limits.rows} * limits.experts_used;
  const int64_t rows = limits.rows;
  int64_t at = 0;
  // Tiles need the rows of an expert side by side, so tokens are repeated for each of their
  // experts.
  l.input = PlaceOperand(rows, bf16 ? std::max(rows, l.slots) : 0, limits.cols, &at);
  if (bf16) l.gated = PlaceBf16Operand(rows, limits.cols, &at);
  if (l.slots > 0) {
    l.hidden_cols = RoundUp(limits.expert_cols, 16);
    l.hidden = PlaceOperand(l.slots, bf16 ? l.slots : 0, limits.expert_cols, &at);
    l.gate = at;
    at += l.slots * l.hidden_cols * static_cast<int64_t>(sizeof(float));
    l.up = at;
    at += l.slots * l.hidden_cols * static_cast<int64_t>(sizeof(float));
  }
  l.scratch = at;
  const int64_t tile_rows = std::min<int64_t>(std::max(rows, l.slots), kBf16Rows);
  l.thread_bytes = bf16 ? kBf16ScratchBytes + Bf16SumsBytes(tile_rows) : 0;
  at += threads * l.thread_bytes;
  l.total = at;
  return l;
}

LinearKernels LinearKernelsOf(CpuLevel level) {
  switch (level) {
#if defined(__x86_64__)
    case CpuLevel::kAvx2:
      return Avx2LinearKernels();
    case CpuLevel::kAvxVnni:
      return AvxVnniLinearKernels();
    case CpuLevel::kAvx512:
      return Avx512LinearKernels();
    case CpuLevel::kAmx: {
      LinearKernels table = Avx512LinearKernels();
      AddAmx(&table);
      return table;
    }
#elif defined(__aarch64__)
    case CpuLevel::kNeon:
      return NeonLinearKernels();
    case CpuLevel::kI8mm:
      return I8mmLinearKernels();
#endif
    default:
      return ScalarLinearKernels();
  }
}

LinearEngine::LinearEngine(CpuLevel level, ThreadPool* pool)
    : impl_(std::make_unique<Impl>(level, pool)) {}
LinearEngine::~LinearEngine() = default;

int64_t LinearEngine::WorkspaceBytes(const Backend::Limits& limits) const {
  return Impl::Plan(limits, impl_->pool->threads(), impl_->kernels.bf16 != nullptr).total;
}

absl::Status LinearEngine::Reserve(const Backend::Limits& limits) {
  Impl& m = *impl_;
  m.limits = limits;
  m.layout = Impl::Plan(limits, m.pool->threads(), m.kernels.bf16 != nullptr);
  absl::StatusOr<Buffer> buffer = Buffer::Allocate(m.layout.total);
  if (!buffer.ok()) return buffer.status();
  m.buffer = *std::move(buffer);
  m.input = MoveOperand(m.layout.input, m.buffer.data());
  m.hidden = MoveOperand(m.layout.hidden, m.buffer.data());
  m.gated = MoveOperand(m.layout.gated, m.buffer.data());
  m.gate = reinterpret_cast<float*>(m.buffer.data() + m.layout.gate);
  m.up = reinterpret_cast<float*>(m.buffer.data() + m.layout.up);
  m.work.jobs.reserve(2 * m.layout.slots + 64);
  m.down_jobs.reserve(m.layout.slots);
  m.slot_row.resize(m.layout.slots);
  m.slot_expert.resize(m.layout.slots);
  m.slot_weight.resize(m.layout.slots);
  return absl::OkStatus();
}

Path LinearEngine::Impl::PathOf(const PackedMatrix& weight, bool prefill) const {
  const DType type = weight.shape.type;
  if (prefill && kernels.bf16 != nullptr && type != DType::kF32 && type != DType::kF16) {
    return Path::kBf16;
  }
  return IsFloat(type) ? Path::kF32 : Path::kInt8;
}

// out[0..n) (+)= scale * (tile + bias)
static inline void StoreValues(const float* tile, const float* bias, float scale, bool accumulate,
                               int n, float* out) {
  float v[kPanelRows];
  for (int i = 0; i < n; ++i) v[i] = tile[i];
  if (bias != nullptr) {
    for (int i = 0; i < n; ++i) v[i] += bias[i];
  }
  for (int i = 0; i < n; ++i) v[i] *= scale;
  if (accumulate) {
    for (int i = 0; i < n; ++i) v[i] += out[i];
  }
  for (int i = 0; i < n; ++i) out[i] = v[i];
}

static void StoreTile(const float* tile, const float* bias, float scale, bool accumulate, int n,
                      float* out) {
  if (n == kPanelRows) {  // a constant count becomes vector code
    StoreValues(tile, bias, scale, accumulate, kPanelRows, out);
  } else {
    StoreValues(tile, bias, scale, accumulate, n, out);
  }
}

void LinearEngine::Impl::Multiply(const Run& run, const Operand& operand, int thread) {
  if (run.job->up != nullptr) {
    MultiplyGated(run, operand, thread);
  } else if (run.job->path == Path::kBf16) {
    MultiplyBf16(run, operand, thread);
  } else {
    MultiplyRows(run, operand);
  }
}

// As many as share a call's work and stay in L2.
int LinearEngine::Impl::Int8Rows(int64_t blocks) const {
  const int64_t fit = kInt8RowsBytes / (blocks * static_cast<int64_t>(sizeof(Q8Block)));
  return static_cast<int>(std::clamp<int64_t>(fit, kFewRows, kernels.int8_rows));
}

void LinearEngine::Impl::MultiplyRows(const Run& run, const Operand& operand) {
  const Job& job = *run.job;
  const PackedShape& shape = job.weight->shape;
  const int type = static_cast<int>(shape.type);
  alignas(64) float tile[kMaxTileRows * kPanelRows];
  const int most = job.path == Path::kInt8 ? Int8Rows(operand.blocks) : kFewRows;
  for (int r = 0; r < job.count; r += most) {
    const int m = std::min(most, job.count - r);
    const Q8Block* int8_rows[kMaxTileRows];
    const float* f32_rows[kMaxTileRows];
    for (int i = 0; i < m; ++i) {
      const int64_t row = job.operand_row != nullptr ? job.operand_row[r + i] : job.first + r + i;
      int8_rows[i] = operand.int8 + row * operand.blocks;
      f32_rows[i] = operand.f32 + row * operand.f32_stride;
    }
    for (int64_t p = run.begin; p < run.end; ++p) {
      if (job.path == Path::kInt8) {
        kernels.int8[type](shape, job.weight->panel(p), int8_rows, m, tile);
      } else {
        kernels.f32[type](shape, job.weight->panel(p), f32_rows, m, tile);
      }
      const int64_t col = p * kPanelRows;
      const int n = static_cast<int>(std::min<int64_t>(kPanelRows, shape.rows - col));
      for (int i = 0; i < m; ++i) {
        const int64_t row = job.out_row != nullptr ? job.out_row[r + i] : job.first + r + i;
        StoreTile(tile + kPanelRows * i, job.bias != nullptr ? job.bias + col : nullptr,
                  job.row_scale != nullptr ? job.row_scale[r + i] : 1, job.accumulate, n,
                  job.out + row * job.stride + col);
      }
    }
  }
}

void LinearEngine::Impl::MultiplyBf16(const Run& run, const Operand& operand, int thread) {
  const Job& job = *run.job;
  const PackedShape& shape = job.weight->shape;
  const int panels = static_cast<int>(run.end - run.begin);
  uint8_t* unpacked = scratch(thread);
  float* sums = reinterpret_cast<float*>(unpacked + kBf16ScratchBytes);
  const int64_t col = run.begin * kPanelRows;
  for (int r = 0; r < job.count; r += kBf16Rows) {
    const int m = std::min(kBf16Rows, job.count - r);
    const Bf16Operand a = {operand.bf16 + (job.first + r) * 32, operand.bf16_rows};
    const int64_t row = job.out_row != nullptr ? 0 : job.first + r;
    const Bf16Result result{
        .out = job.out + row * job.stride + col,
        .stride = job.stride,
        .cols = std::min(run.end * kPanelRows, shape.rows) - col,
        .row = job.out_row != nullptr ? job.out_row + r : nullptr,
        .scale = job.row_scale != nullptr ? job.row_scale + r : nullptr,
        .bias = job.bias != nullptr ? job.bias + col : nullptr,
        .accumulate = job.accumulate,
    };
    kernels.bf16(shape, job.weight->panel(run.begin), panels, a, m, unpacked, sums, result);
  }
}

void LinearEngine::Impl::MultiplyGated(const Run& run, const Operand& operand, int thread) {
  const Job& job = *run.job;
  uint8_t* unpacked = scratch(thread);
  float* sums = reinterpret_cast<float*>(unpacked + kBf16ScratchBytes);
  const Bf16Matrix gate_panels = {job.weight->shape, job.weight->panel(run.begin)};
  const Bf16Matrix up_panels = {job.up->shape, job.up->panel(run.begin)};
  for (int r = 0; r < job.count; r += kBf16Rows) {
    const int64_t row = job.first + r;
    const Bf16Operand a = {operand.bf16 + row * 32, operand.bf16_rows};
    const Bf16Gated result{
        .out = job.gated->bf16 + row * 32,
        .row_stride = job.gated->bf16_rows,
        .begin = run.begin * kPanelRows,
        .cols = job.weight->shape.rows,
        .gate_bias = job.bias,
        .up_bias = job.up_bias,
        .activation = job.activation,
    };
    kernels.bf16_gated(gate_panels, up_panels, static_cast<int>(run.end - run.begin), a,
                       std::min(kBf16Rows, job.count - r), unpacked, sums, result);
  }
}

bool LinearEngine::Impl::TilesOnly(const PackedMatrix& gate, const PackedMatrix& up,
                                   const PackedMatrix& down) const {
  return PathOf(gate, true) == Path::kBf16 && PathOf(up, true) == Path::kBf16 &&
         PathOf(down, true) == Path::kBf16;
}

void LinearEngine::Impl::BeginLinear(int cols, RowCount rows) {
  SHOAL_CHECK(rows.total() <= limits.rows && cols <= limits.cols, "Reserve() for larger batches");
  work.jobs.clear();
}

void LinearEngine::Impl::AddJob(const LinearOutput& o, Path path, int first, int count,
                                Needs* needs) {
  if (count == 0) return;
  needs->Add(path);
  work.jobs.push_back({.weight = o.weight,
                       .path = path,
                       .first = first,
                       .count = count,
                       .out = o.out,
                       .stride = o.stride,
                       .bias = o.bias,
                       .accumulate = o.accumulate});
}

void LinearEngine::Impl::RunLinear(const OperandRows& in, RowCount rows, const Needs& decode,
                                   const Needs& prefill) {
  work.Start();
  pool->Run([&](int thread) {
    Prepare(in, 0, rows.decode, nullptr, decode, thread);
    Prepare(in, rows.decode, rows.total(), nullptr, prefill, thread);
    pool->Barrier();
    for (Run run; work.Take(thread, &run);) Multiply(run, in.operand, thread);
  });
}

void LinearEngine::Linear(const LinearInput& input, int cols, RowCount rows,
                          absl::Span<const LinearOutput> outputs) {
  Impl& m = *impl_;
  if (rows.total() == 0) return;
  m.BeginLinear(cols, rows);
  Needs decode_needs, prefill_needs;
  for (const LinearOutput& o : outputs) {
    SHOAL_CHECK(o.weight->shape.cols == cols, "the weight's columns must match the input's");
    const Path decode = m.PathOf(*o.weight, false);
    const Path prefill = m.PathOf(*o.weight, true);
    if (decode == prefill) {
      m.AddJob(o, decode, 0, rows.total(), &decode_needs);
      if (rows.prefill > 0) prefill_needs.Add(prefill);
      continue;
    }
    m.AddJob(o, decode, 0, rows.decode, &decode_needs);
    m.AddJob(o, prefill, rows.decode, rows.prefill, &prefill_needs);
  }
  m.RunLinear({input, cols, m.input}, rows, decode_needs, prefill_needs);
}

void LinearEngine::Ffn(const LinearInput& input, int cols, RowCount rows, const FfnWeights& ffn,
                       float* gate, float* up, const LinearOutput& out) {
  Impl& m = *impl_;
  const int hidden_cols = static_cast<int>(ffn.gate->shape.rows);
  const LinearOutput gate_up[] = {{ffn.gate, nullptr, gate, hidden_cols, false},
                                  {ffn.up, nullptr, up, hidden_cols, false}};
  const LinearInput hidden = LinearInput::Gated(ffn.activation, gate, up, hidden_cols);
  if (rows.prefill == 0 || !m.TilesOnly(*ffn.gate, *ffn.up, *out.weight)) {
    Linear(input, cols, rows, gate_up);
    Linear(hidden, hidden_cols, rows, {&out, 1});
    return;
  }
  SHOAL_CHECK(hidden_cols <= m.limits.cols, "Reserve() for wider layers");
  m.BeginLinear(cols, rows);
  Needs decode_needs;
  for (const LinearOutput& o : gate_up) {
    m.AddJob(o, m.PathOf(*o.weight, false), 0, rows.decode, &decode_needs);
  }
  m.work.jobs.push_back({.weight = ffn.gate,
                         .path = Path::kBf16,
                         .first = rows.decode,
                         .count = rows.prefill,
                         .up = ffn.up,
                         .activation = ffn.activation,
                         .gated = &m.gated});
  m.RunLinear({input, cols, m.input}, rows, decode_needs, {.bf16 = true});

  m.BeginLinear(hidden_cols, rows);
  decode_needs = {};
  Needs prefill_needs;  // its rows stand in their operand already
  m.AddJob(out, m.PathOf(*out.weight, false), 0, rows.decode, &decode_needs);
  m.AddJob(out, Path::kBf16, rows.decode, rows.prefill, &prefill_needs);
  Operand both = m.input;
  both.bf16 = m.gated.bf16;
  both.bf16_rows = m.gated.bf16_rows;
  m.RunLinear({hidden, hidden_cols, both}, rows, decode_needs, {});
}

// Sorts the (row, expert) pairs of rows [row_begin, row_end) by expert into slots from `slot` on;
// returns the slot after the last. Negative ids are experts that live elsewhere.
int LinearEngine::Impl::GroupByExpert(const int32_t* ids, const float* weights, int row_begin,
                                      int row_end, int used, int experts, int slot) {
  expert_count.assign(experts + 1, 0);
  for (int i = row_begin * used; i < row_end * used; ++i) {
    SHOAL_CHECK(ids[i] < experts, "an expert id beyond the experts given");
    if (ids[i] >= 0) ++expert_count[ids[i] + 1];
  }
  for (int e = 0; e < experts; ++e) expert_count[e + 1] += expert_count[e];
  const int end = slot + expert_count[experts];
  for (int i = row_begin * used; i < row_end * used; ++i) {
    if (ids[i] < 0) continue;
    const int at = slot + expert_count[ids[i]]++;
    slot_row[at] = i / used;
    slot_expert[at] = ids[i];
    slot_weight[at] = weights != nullptr ? weights[i] : 1;
  }
  return end;
}

bool LinearEngine::Impl::TilesOnly(const ExpertWeights& experts, int slot_begin,
                                   int slot_end) const {
  for (int slot = slot_begin; slot < slot_end; ++slot) {
    const int e = slot_expert[slot];
    if (!TilesOnly(experts.gate[e], experts.up[e], experts.down[e])) return false;
  }
  return true;
}

// One gate, one up and one down product for each expert among slots [slot_begin, slot_end); gate
// and up in one where all are tiles.
void LinearEngine::Impl::AddExpertJobs(const ExpertWeights& experts, bool prefill, int slot_begin,
                                       int slot_end, Needs* in, Needs* hidden_needs, float* out,
                                       int64_t out_stride) {
  const bool join = prefill && TilesOnly(experts, slot_begin, slot_end);
  for (int begin = slot_begin, end; begin < slot_end; begin = end) {
    const int expert = slot_expert[begin];
    end = begin + 1;
    while (end < slot_end && slot_expert[end] == expert) ++end;
    const PackedMatrix* weights[] = {&experts.gate[expert], &experts.up[expert]};
    const float* biases[] = {experts.gate_bias.empty() ? nullptr : experts.gate_bias[expert],
                             experts.up_bias.empty() ? nullptr : experts.up_bias[expert]};
    for (int part = 0; part < (join ? 1 : 2); ++part) {
      Job job{.weight = weights[part],
              .path = PathOf(*weights[part], prefill),
              .first = begin,
              .count = end - begin,
              .out = part == 0 ? gate : up,
              .stride = layout.hidden_cols,
              .bias = biases[part]};
      if (join) {
        job.up = weights[1];
        job.up_bias = biases[1];
        job.activation = experts.activation;
        job.gated = &hidden;
      }
      job.operand_row = job.path == Path::kBf16 ? nullptr : &slot_row[begin];
      in->Add(job.path);
      work.jobs.push_back(job);
    }
    Job down{.weight = &experts.down[expert], .first = begin, .count = end - begin};
    down.path = PathOf(*down.weight, prefill);
    down.out_row = &slot_row[begin];
    down.row_scale = &slot_weight[begin];
    if (!experts.down_bias.empty()) down.bias = experts.down_bias[expert];
    down.out = out;
    down.stride = out_stride;
    down.accumulate = true;
    if (!join) hidden_needs->Add(down.path);
    down_jobs.push_back(down);
  }
}

void LinearEngine::Experts(const LinearInput& input, int cols, RowCount rows, const int32_t* ids,
                           const float* weights, int used, const ExpertWeights& experts, float* out,
                           int64_t out_stride) {
  Impl& m = *impl_;
  SHOAL_CHECK(
      rows.total() <= m.limits.rows && cols <= m.limits.cols && used <= m.limits.experts_used,
      "Reserve() for larger batches or more experts");
  if (rows.total() == 0) return;
  const int count = static_cast<int>(experts.gate.size());
  const int64_t ffn = experts.gate[0].shape.rows;
  const int64_t out_panels = experts.down[0].shape.panels();
  const int64_t out_cols = experts.down[0].shape.rows;
  SHOAL_CHECK(ffn <= m.limits.expert_cols, "Reserve() for wider experts");
  const int decode_slots = m.GroupByExpert(ids, weights, 0, rows.decode, used, count, 0);
  const int slots =
      m.GroupByExpert(ids, weights, rows.decode, rows.total(), used, count, decode_slots);
  m.work.jobs.clear();
  m.down_jobs.clear();
  Needs decode_in, prefill_in, decode_hidden, prefill_hidden;
  m.AddExpertJobs(experts, false, 0, decode_slots, &decode_in, &decode_hidden, out, out_stride);
  m.AddExpertJobs(experts, true, decode_slots, slots, &prefill_in, &prefill_hidden, out,
                  out_stride);
  m.work.Start();
  // A down task is a range of output columns for all experts one after another: their sums meet in
  // `out` in one order without locks or a buffer of partial results.
  const int64_t down_panels =
      std::clamp<int64_t>(out_panels / (4 * m.pool->threads()), 1, kBf16Panels);
  const int64_t down_tasks = (out_panels + down_panels - 1) / down_panels;
  const OperandRows in{input, cols, m.input};
  const LinearInput products =
      LinearInput::Gated(experts.activation, m.gate, m.up, m.layout.hidden_cols);
  const OperandRows hidden{products, ffn, m.hidden};
  // Tiles read their rows by slot, the other paths by token.
  const Needs prefill_tokens{prefill_in.int8, prefill_in.f32, false};
  const Needs prefill_slots{false, false, prefill_in.bf16};
  m.next_down.store(0, std::memory_order_relaxed);
  m.pool->Run([&](int thread) {
    m.Prepare(in, 0, rows.decode, nullptr, decode_in, thread);
    m.Prepare(in, rows.decode, rows.total(), nullptr, prefill_tokens, thread);
    if (prefill_slots.bf16) {
      m.Prepare(in, decode_slots, slots, m.slot_row.data(), prefill_slots, thread);
    }
    m.pool->Barrier();
    for (Run run; m.work.Take(thread, &run);) m.Multiply(run, m.input, thread);
    m.pool->Barrier();
    m.Prepare(hidden, 0, decode_slots, nullptr, decode_hidden, thread);
    m.Prepare(hidden, decode_slots, slots, nullptr, prefill_hidden, thread);
    m.pool->Barrier();
    for (int64_t t; (t = m.next_down.fetch_add(1, std::memory_order_relaxed)) < down_tasks;) {
      const int64_t begin = t * down_panels, end = std::min(begin + down_panels, out_panels);
      const int64_t col_end = std::min(end * kPanelRows, out_cols);
      for (int r = 0; r < rows.total(); ++r) {
        std::fill(out + r * out_stride + begin * kPanelRows, out + r * out_stride + col_end, 0.0f);
      }
      for (const Job& job : m.down_jobs) m.Multiply({&job, begin, end}, m.hidden, thread);
    }
  });
}

}  // namespace shoal
