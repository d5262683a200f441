#include "kernels/cpu/linear.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "kernels/buffer.h"
#include "kernels/check.h"
#include "kernels/cpu/linear_kernels.h"

namespace shoal {
namespace {

// Columns that one preparation task converts: the row stays in L1 between norm and conversion.
constexpr int kChunkCols = 512;
static_assert(kChunkCols % 32 == 0);
// Work of one task of the multiply phase: small enough that threads finish together, large enough
// that the shared counter and a fresh memory stream cost nothing.
constexpr int64_t kTaskBytesMax = 256 << 10;
constexpr int64_t kTasksPerThread = 12;
int64_t RoundUp(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

bool IsFloat(DType type) { return Info(type).block_elems == 1; }

// Which operand a product reads.
enum class Path { kInt8, kF32, kBf16 };

// Rows of activations in up to three forms. Bf16 columns are padded with zeros to 32, f32 rows to
// 16 floats.
struct Operand {
  Q8Block* int8 = nullptr;   // [rows][blocks]
  float* f32 = nullptr;      // [rows][f32_stride]
  uint16_t* bf16 = nullptr;  // [blocks][bf16_rows][32]
  int64_t blocks = 0;
  int64_t f32_stride = 0;
  int64_t bf16_rows = 0;
};

// Rows between the column blocks of a bf16 operand: an odd multiple of 32, so that the tiles of
// successive column blocks fall into different L1 sets; 32 more, as products read whole tiles.
int64_t Bf16RowStride(int64_t rows) {
  const int64_t units = RoundUp(rows, 32) / 32 + 1;
  return 32 * (units | 1);
}

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
  int64_t task_begin = 0;  // first task of the phase that belongs to this job
  int64_t task_panels = 1;
};

struct Needs {
  bool int8 = false, f32 = false, bf16 = false;
};

}  // namespace

struct LinearEngine::Impl {
  Impl(CpuLevel level, ThreadPool* pool) : kernels(LinearKernelsOf(level)), pool(pool) {}

  // Workspace layout for some limits; offsets into the buffer.
  struct Layout {
    int64_t slots = 0;  // rows x experts
    Operand input, hidden;
    int64_t gate = 0, up = 0, scratch = 0, thread_bytes = 0, total = 0;
    int64_t hidden_cols = 0;
  };

  // By the kind of row alone, never by their number: how a prompt is cut into batches must not
  // change its result. (The scheduler sends prompts of a few tokens down the decode path.)
  Path PathOf(const PackedMatrix& weight, bool prefill) const;
  void Add(Needs* needs, Path path) const;
  void Prepare(const LinearInput& input, int64_t cols, int row_begin, int row_end,
               const int32_t* slot_row, int thread, const Needs& needs, const Operand& operand);
  void ConvertChunk(const float* x, int64_t row, int64_t col, int64_t n, const Needs& needs,
                    const Operand& operand);
  void PlanTasks(std::vector<Job>* jobs, int64_t* tasks) const;
  void RunTask(const std::vector<Job>& jobs, const Operand& operand, int64_t task, int thread);
  void Multiply(const Job& job, const Operand& operand, int64_t panel_begin, int64_t panel_end,
                int thread);
  void MultiplyRows(const Job& job, const Operand& operand, int64_t panel_begin, int64_t panel_end);
  void MultiplyBf16(const Job& job, const Operand& operand, int64_t panel_begin, int64_t panel_end,
                    int thread);
  int GroupByExpert(const int32_t* ids, const float* weights, int row_begin, int row_end, int used,
                    int experts, int slot);
  void AddExpertJobs(const ExpertWeights& experts, bool prefill, int slot_begin, int slot_end,
                     Needs* in, Needs* hidden, float* out, int64_t out_stride);

  const LinearKernels kernels;
  ThreadPool* const pool;
  Backend::Limits limits;
  Layout layout;
  Buffer buffer;
  Operand input, hidden;  // pointers into buffer
  float* gate = nullptr;  // [slots, hidden_cols]
  float* up = nullptr;
  std::vector<Job> jobs, down_jobs;
  std::vector<int32_t> slot_row, slot_expert, expert_count;
  std::vector<float> slot_weight;
  alignas(64) std::atomic<int64_t> next[2];

  uint8_t* scratch(int thread) {
    return buffer.data() + layout.scratch + thread * layout.thread_bytes;
  }

  static Layout Plan(const Backend::Limits& limits, int threads, bool bf16);
};

// Places the operand's parts behind each other from *at on. Offsets stand in the pointers until
// Reserve.
static void PlaceOperand(int64_t rows, int64_t bf16_rows, int64_t cols, int64_t* at, Operand* o) {
  o->blocks = RoundUp(cols, 32) / 32;
  o->f32_stride = RoundUp(cols, 16);
  o->bf16_rows = bf16_rows > 0 ? Bf16RowStride(bf16_rows) : 0;
  o->int8 = reinterpret_cast<Q8Block*>(*at);
  *at += rows * o->blocks * static_cast<int64_t>(sizeof(Q8Block));
  o->f32 = reinterpret_cast<float*>(*at);
  *at += RoundUp(rows * o->f32_stride * static_cast<int64_t>(sizeof(float)), 64);
  o->bf16 = reinterpret_cast<uint16_t*>(*at);
  *at += o->blocks * o->bf16_rows * 64;
}

LinearEngine::Impl::Layout LinearEngine::Impl::Plan(const Backend::Limits& limits, int threads,
                                                    bool bf16) {
  Layout l;
  l.slots = int64_t{limits.rows} * limits.experts_used;
  const int64_t rows = limits.rows;
  int64_t at = 0;
  // Tiles need the rows of an expert side by side, so tokens are repeated for each of their
  // experts.
  PlaceOperand(rows, bf16 ? std::max(rows, l.slots) : 0, limits.cols, &at, &l.input);
  if (l.slots > 0) {
    l.hidden_cols = RoundUp(limits.expert_cols, 16);
    PlaceOperand(l.slots, bf16 ? l.slots : 0, limits.expert_cols, &at, &l.hidden);
    l.gate = at;
    at += l.slots * l.hidden_cols * static_cast<int64_t>(sizeof(float));
    l.up = at;
    at += l.slots * l.hidden_cols * static_cast<int64_t>(sizeof(float));
  }
  l.scratch = at;
  const int64_t tile_rows = RoundUp(std::min<int64_t>(std::max(rows, l.slots), kBf16Rows), 32);
  l.thread_bytes = bf16 ? kBf16ScratchBytes + tile_rows * kBf16Panels * kPanelRows *
                                                  static_cast<int64_t>(sizeof(float))
                        : 0;
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
  const auto place = [&](const Operand& offsets) {
    Operand o = offsets;
    o.int8 = reinterpret_cast<Q8Block*>(m.buffer.data() + reinterpret_cast<int64_t>(offsets.int8));
    o.f32 = reinterpret_cast<float*>(m.buffer.data() + reinterpret_cast<int64_t>(offsets.f32));
    o.bf16 = reinterpret_cast<uint16_t*>(m.buffer.data() + reinterpret_cast<int64_t>(offsets.bf16));
    return o;
  };
  m.input = place(m.layout.input);
  m.hidden = place(m.layout.hidden);
  m.gate = reinterpret_cast<float*>(m.buffer.data() + m.layout.gate);
  m.up = reinterpret_cast<float*>(m.buffer.data() + m.layout.up);
  m.jobs.reserve(2 * m.layout.slots + 64);
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

void LinearEngine::Impl::Add(Needs* needs, Path path) const {
  if (path == Path::kInt8) needs->int8 = true;
  if (path == Path::kF32) needs->f32 = true;
  if (path == Path::kBf16) needs->bf16 = true;
}

// x holds columns [col, col + n) of an operand row; n is a multiple of 32 except at the row's end.
void LinearEngine::Impl::ConvertChunk(const float* x, int64_t row, int64_t col, int64_t n,
                                      const Needs& needs, const Operand& operand) {
  if (needs.int8) kernels.quantize(x, n / 32, operand.int8 + row * operand.blocks + col / 32);
  if (needs.f32) {
    float* dst = operand.f32 + row * operand.f32_stride + col;
    std::copy(x, x + n, dst);
    if (n % 2 != 0) dst[n] = 0;
  }
  if (needs.bf16) {
    for (int64_t i = 0; i < n; i += 32) {
      uint16_t* dst = operand.bf16 + ((col + i) / 32 * operand.bf16_rows + row) * 32;
      const int64_t held = std::min<int64_t>(32, n - i);
      kernels.to_bf16(x + i, held, dst);
      std::fill(dst + held, dst + 32, static_cast<uint16_t>(0));
    }
  }
}

// Every thread calls this. Operand rows [row_begin, row_end) become input rows slot_row[row] (or
// row itself).
void LinearEngine::Impl::Prepare(const LinearInput& input, int64_t cols, int row_begin, int row_end,
                                 const int32_t* slot_row, int thread, const Needs& needs,
                                 const Operand& operand) {
  const int64_t chunks = (cols + kChunkCols - 1) / kChunkCols;
  const int64_t tasks = (row_end - row_begin) * chunks;
  const int64_t begin = tasks * thread / pool->threads();
  const int64_t end = tasks * (thread + 1) / pool->threads();
  alignas(64) float local[kChunkCols];
  int64_t norm_row = -1;
  float norm = 0;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row = row_begin + task / chunks;
    const int64_t col = task % chunks * kChunkCols;
    const int64_t n = std::min<int64_t>(kChunkCols, cols - col);
    const int64_t source = (slot_row != nullptr ? slot_row[row] : row) * input.stride;
    const float* x = input.x + source + col;
    if (input.kind == LinearInput::Kind::kRmsNorm) {
      // Threads that share a row each add up its squares: cheaper than another barrier.
      if (norm_row != row) {
        const float mean = kernels.sum_squares(input.x + source, cols) / static_cast<float>(cols);
        norm = 1 / std::sqrt(mean + input.eps);
        norm_row = row;
      }
      kernels.scale(x, input.weight + col, norm, n, local);
      x = local;
    } else if (input.kind == LinearInput::Kind::kSwiGlu) {
      kernels.swiglu(x, input.up + source + col, n, local);
      x = local;
    }
    ConvertChunk(x, row, col, n, needs, operand);
  }
}

// Cuts the jobs into tasks: runs of panels of about equal bytes.
void LinearEngine::Impl::PlanTasks(std::vector<Job>* list, int64_t* tasks) const {
  int64_t bytes = 0;
  for (const Job& job : *list) bytes += job.weight->shape.bytes();
  const int64_t target = std::min(kTaskBytesMax, bytes / (pool->threads() * kTasksPerThread));
  *tasks = 0;
  for (Job& job : *list) {
    const PackedShape& shape = job.weight->shape;
    job.task_panels = std::max<int64_t>(1, target / std::max<int64_t>(1, shape.panel_bytes()));
    if (job.path == Path::kBf16) {
      // Whole groups where every thread still gets several, else as few panels as two tiles need.
      const int64_t fair = shape.panels() / (2 * pool->threads());
      job.task_panels = std::clamp<int64_t>(fair / 2 * 2, 2, kBf16Panels);
    }
    job.task_begin = *tasks;
    *tasks += (shape.panels() + job.task_panels - 1) / job.task_panels;
  }
}

void LinearEngine::Impl::RunTask(const std::vector<Job>& list, const Operand& operand, int64_t task,
                                 int thread) {
  const auto after = std::upper_bound(list.begin(), list.end(), task,
                                      [](int64_t t, const Job& job) { return t < job.task_begin; });
  const Job& job = *(after - 1);
  const int64_t begin = (task - job.task_begin) * job.task_panels;
  Multiply(job, operand, begin, std::min(begin + job.task_panels, job.weight->shape.panels()),
           thread);
}

// out[0..n) (+)= scale * tile + bias
static void StoreTile(const float* tile, const float* bias, float scale, bool accumulate, int n,
                      float* out) {
  for (int i = 0; i < n; ++i) {
    float v = scale * tile[i];
    if (bias != nullptr) v += bias[i];
    out[i] = accumulate ? out[i] + v : v;
  }
}

void LinearEngine::Impl::Multiply(const Job& job, const Operand& operand, int64_t panel_begin,
                                  int64_t panel_end, int thread) {
  if (job.path == Path::kBf16) {
    MultiplyBf16(job, operand, panel_begin, panel_end, thread);
  } else {
    MultiplyRows(job, operand, panel_begin, panel_end);
  }
}

void LinearEngine::Impl::MultiplyRows(const Job& job, const Operand& operand, int64_t panel_begin,
                                      int64_t panel_end) {
  const PackedShape& shape = job.weight->shape;
  const int type = static_cast<int>(shape.type);
  alignas(64) float tile[kMaxTileRows * kPanelRows];
  for (int r = 0; r < job.count; r += kMaxTileRows) {
    const int m = std::min(kMaxTileRows, job.count - r);
    const Q8Block* int8_rows[kMaxTileRows];
    const float* f32_rows[kMaxTileRows];
    for (int i = 0; i < m; ++i) {
      const int64_t row = job.operand_row != nullptr ? job.operand_row[r + i] : job.first + r + i;
      int8_rows[i] = operand.int8 + row * operand.blocks;
      f32_rows[i] = operand.f32 + row * operand.f32_stride;
    }
    for (int64_t p = panel_begin; p < panel_end; ++p) {
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

void LinearEngine::Impl::MultiplyBf16(const Job& job, const Operand& operand, int64_t panel_begin,
                                      int64_t panel_end, int thread) {
  const PackedShape& shape = job.weight->shape;
  const int panels = static_cast<int>(panel_end - panel_begin);
  uint8_t* unpacked = scratch(thread);
  float* c = reinterpret_cast<float*>(unpacked + kBf16ScratchBytes);
  for (int r = 0; r < job.count; r += kBf16Rows) {
    const int m = std::min(kBf16Rows, job.count - r);
    const Bf16Operand a = {operand.bf16 + (job.first + r) * 32, operand.bf16_rows};
    kernels.bf16(shape, job.weight->panel(panel_begin), panels, a, m, unpacked, c);
    for (int i = 0; i < m; ++i) {
      const int64_t row = job.out_row != nullptr ? job.out_row[r + i] : job.first + r + i;
      const float scale = job.row_scale != nullptr ? job.row_scale[r + i] : 1;
      for (int p = 0; p < panels; ++p) {
        const int64_t col = (panel_begin + p) * kPanelRows;
        const int n = static_cast<int>(std::min<int64_t>(kPanelRows, shape.rows - col));
        StoreTile(c + Bf16ResultAt(panels, i, p), job.bias != nullptr ? job.bias + col : nullptr,
                  scale, job.accumulate, n, job.out + row * job.stride + col);
      }
    }
  }
}

void LinearEngine::Linear(const LinearInput& input, int cols, RowCount rows,
                          absl::Span<const LinearOutput> outputs) {
  Impl& m = *impl_;
  SHOAL_CHECK(rows.total() <= m.limits.rows && cols <= m.limits.cols,
              "Reserve() for larger batches");
  if (rows.total() == 0) return;
  m.jobs.clear();
  Needs decode_needs, prefill_needs;
  for (const LinearOutput& o : outputs) {
    SHOAL_CHECK(o.weight->shape.cols == cols, "the weight's columns must match the input's");
    const Path decode = m.PathOf(*o.weight, false);
    const Path prefill = m.PathOf(*o.weight, true);
    if (rows.decode > 0) m.Add(&decode_needs, decode);
    if (rows.prefill > 0) m.Add(&prefill_needs, prefill);
    Job job{.weight = o.weight,
            .out = o.out,
            .stride = o.stride,
            .bias = o.bias,
            .accumulate = o.accumulate};
    job.path = decode;
    job.count = decode == prefill ? rows.total() : rows.decode;
    if (job.count > 0) m.jobs.push_back(job);
    if (decode == prefill || rows.prefill == 0) continue;
    job.path = prefill;
    job.first = rows.decode;
    job.count = rows.prefill;
    m.jobs.push_back(job);
  }
  int64_t tasks = 0;
  m.PlanTasks(&m.jobs, &tasks);
  m.next[0].store(0, std::memory_order_relaxed);
  m.pool->Run([&](int thread) {
    m.Prepare(input, cols, 0, rows.decode, nullptr, thread, decode_needs, m.input);
    m.Prepare(input, cols, rows.decode, rows.total(), nullptr, thread, prefill_needs, m.input);
    m.pool->Barrier();
    for (int64_t t; (t = m.next[0].fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      m.RunTask(m.jobs, m.input, t, thread);
    }
  });
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
    slot_weight[at] = weights[i];
  }
  return end;
}

// One gate, one up and one down product for each expert among slots [slot_begin, slot_end).
void LinearEngine::Impl::AddExpertJobs(const ExpertWeights& experts, bool prefill, int slot_begin,
                                       int slot_end, Needs* in, Needs* hidden_needs, float* out,
                                       int64_t out_stride) {
  for (int begin = slot_begin, end; begin < slot_end; begin = end) {
    const int expert = slot_expert[begin];
    end = begin + 1;
    while (end < slot_end && slot_expert[end] == expert) ++end;
    Job job{.first = begin, .count = end - begin, .stride = layout.hidden_cols};
    for (int part = 0; part < 2; ++part) {
      job.weight = part == 0 ? &experts.gate[expert] : &experts.up[expert];
      job.out = part == 0 ? gate : up;
      job.path = PathOf(*job.weight, prefill);
      job.operand_row = job.path == Path::kBf16 ? nullptr : &slot_row[begin];
      Add(in, job.path);
      jobs.push_back(job);
    }
    Job down{.weight = &experts.down[expert], .first = begin, .count = end - begin};
    down.path = PathOf(*down.weight, prefill);
    down.out_row = &slot_row[begin];
    down.row_scale = &slot_weight[begin];
    down.out = out;
    down.stride = out_stride;
    down.accumulate = true;
    Add(hidden_needs, down.path);
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
  m.jobs.clear();
  m.down_jobs.clear();
  Needs decode_in, prefill_in, decode_hidden, prefill_hidden;
  m.AddExpertJobs(experts, false, 0, decode_slots, &decode_in, &decode_hidden, out, out_stride);
  m.AddExpertJobs(experts, true, decode_slots, slots, &prefill_in, &prefill_hidden, out,
                  out_stride);
  int64_t tasks = 0;
  m.PlanTasks(&m.jobs, &tasks);
  // A down task is a range of output columns for all experts one after another: their sums meet in
  // `out` in one order without locks or a buffer of partial results.
  const int64_t down_panels =
      std::clamp<int64_t>(out_panels / (4 * m.pool->threads()), 1, kBf16Panels);
  const int64_t down_tasks = (out_panels + down_panels - 1) / down_panels;
  const LinearInput hidden = LinearInput::SwiGlu(m.gate, m.up, m.layout.hidden_cols);
  // Tiles read their rows by slot, the other paths by token.
  const Needs prefill_tokens{prefill_in.int8, prefill_in.f32, false};
  const Needs prefill_slots{false, false, prefill_in.bf16};
  for (auto& counter : m.next) counter.store(0, std::memory_order_relaxed);
  m.pool->Run([&](int thread) {
    m.Prepare(input, cols, 0, rows.decode, nullptr, thread, decode_in, m.input);
    m.Prepare(input, cols, rows.decode, rows.total(), nullptr, thread, prefill_tokens, m.input);
    if (prefill_slots.bf16) {
      m.Prepare(input, cols, decode_slots, slots, m.slot_row.data(), thread, prefill_slots,
                m.input);
    }
    m.pool->Barrier();
    for (int64_t t; (t = m.next[0].fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      m.RunTask(m.jobs, m.input, t, thread);
    }
    m.pool->Barrier();
    m.Prepare(hidden, ffn, 0, decode_slots, nullptr, thread, decode_hidden, m.hidden);
    m.Prepare(hidden, ffn, decode_slots, slots, nullptr, thread, prefill_hidden, m.hidden);
    m.pool->Barrier();
    for (int64_t t; (t = m.next[1].fetch_add(1, std::memory_order_relaxed)) < down_tasks;) {
      const int64_t begin = t * down_panels, end = std::min(begin + down_panels, out_panels);
      const int64_t col_end = std::min(end * kPanelRows, out_cols);
      for (int r = 0; r < rows.total(); ++r) {
        std::fill(out + r * out_stride + begin * kPanelRows, out + r * out_stride + col_end, 0.0f);
      }
      for (const Job& job : m.down_jobs) m.Multiply(job, m.hidden, begin, end, thread);
    }
  });
}

}  // namespace shoal
