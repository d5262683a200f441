// The operations a model is made of, on one device. kernels/cpu and kernels/cuda implement them.
//
// All activations are f32, row-major, one row per token. A Backend belongs to one rank and is
// called by one thread at a time; it spreads each call over its own threads. Calls return when the
// result is in memory (CPU) or is ordered on the rank's stream (GPU). Nothing here allocates after
// Reserve(). The arrays that ops read and write, KV blocks and weights included, are memory of the
// device (Allocate); spans, segments and their block tables are host memory.
//
// Numerics: the first `decode` rows of a batch take the decode path, whose result for a row never
// depends on how many rows stand beside it; the rest take the prefill path (AMX where there is
// one).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/activation.h"
#include "kernels/copy_engine.h"
#include "kernels/device_memory.h"
#include "kernels/device_queue.h"
#include "kernels/norm.h"
#include "kernels/packed_matrix.h"
#include "kernels/peer_mailbox.h"
#include "kernels/peer_sums.h"

namespace shoal {

struct RowCount {
  int decode = 0;   // rows [0, decode)
  int prefill = 0;  // rows [decode, decode + prefill)
  int total() const { return decode + prefill; }
};

// What a linear layer multiplies: rows of x, or a cheap function of them that is fused into the
// quantization of the activations.
struct LinearInput {
  enum class Kind { kPlain, kRmsNorm, kLayerNorm, kGated };
  Kind kind = Kind::kPlain;
  const float* x = nullptr;          // [rows, cols]; kGated: the gate
  int64_t stride = 0;                // floats between rows
  const float* weight = nullptr;     // of the norms, see NormKind: [cols]
  float eps = 0;                     // of the norms
  const float* up = nullptr;         // kGated: [rows, cols], same stride
  float scale = 1;                   // of the norms: multiplies what comes out,
  const float* row_scale = nullptr;  // as this does, which is of each row: [rows] or null
  Activation activation = Activation::kSwiGlu;  // kGated: what joins gate and up

  static LinearInput Plain(const float* x, int64_t stride) { return {Kind::kPlain, x, stride}; }
  static LinearInput RmsNorm(const float* x, int64_t stride, const float* weight, float eps) {
    return {Kind::kRmsNorm, x, stride, weight, eps};
  }
  static LinearInput Norm(NormKind kind, const float* x, int64_t stride, const float* weight,
                          float eps) {
    return {kind == NormKind::kRms ? Kind::kRmsNorm : Kind::kLayerNorm, x, stride, weight, eps};
  }
  static LinearInput Gated(Activation activation, const float* gate, const float* up,
                           int64_t stride) {
    return {Kind::kGated, gate, stride, nullptr, 0, up, 1, nullptr, activation};
  }
};

// out[row, 0..weight.rows) (+)= weight * input[row] + bias
struct LinearOutput {
  const PackedMatrix* weight = nullptr;
  const float* bias = nullptr;  // [weight.rows] or null
  float* out = nullptr;
  int64_t stride = 0;       // floats between rows of out
  bool accumulate = false;  // add to out (the residual) instead of overwriting it
};

// Rotary embedding. NORM rotates (2i, 2i+1), NEOX (i, i + rotary_dim/2). Tables are [positions,
// rotary_dim/2].
struct RopeTable {
  const float* cos = nullptr;
  const float* sin = nullptr;
  int rotary_dim = 0;
  int positions = 0;
  bool neox = false;
};

enum class KvType : uint8_t { kF32, kF16, kQ8_0 };
inline constexpr int kKvBlockTokens = 16;

// Shape of one KV block of one layer on one rank: kKvBlockTokens tokens, K then V.
// K is [kv_head][dim][token] (so 16 tokens are one vector), V is [kv_head][token][dim]; see
// kernels/README.md.
struct KvShape {
  KvType type = KvType::kF16;
  int kv_heads = 0;
  int head_dim = 0;
  int64_t k_bytes() const;
  int64_t v_bytes() const;
  int64_t block_bytes() const { return k_bytes() + v_bytes(); }  // a multiple of 64
};

// One layer's KV pool: block b lies at base + b * block_stride.
struct KvLayer {
  KvShape shape;
  uint8_t* base = nullptr;
  int64_t block_stride = 0;
};

// A run of rows of one sequence in a batch. positions are pos .. pos + rows - 1.
struct Segment {
  int row = 0;
  int rows = 0;
  int pos = 0;
  const int32_t* blocks =
      nullptr;          // block table of the sequence: block of position p is blocks[p / 16]
  bool decode = false;  // rows lie in the decode part of the batch
};

struct AttentionShape {
  int q_heads = 0;  // heads held here
  int head_dim = 0;
  // Query head i (0..q_heads) reads local KV head (q_head_begin + i) / group - kv_head_begin.
  int q_head_begin = 0;
  int kv_head_begin = 0;
  int group = 1;
  int window = 0;   // sliding window in tokens, 0 = all
  float scale = 0;  // usually 1 / sqrt(head_dim)
  // [q_heads], or null: a score that joins the softmax of each row of a head, without a value.
  const float* sinks = nullptr;
  bool chunked = false;  // the window of a row is the chunk of so many tokens that it lies in

  int FirstVisible(int pos) const {
    if (window <= 0) return 0;
    if (chunked) return pos / window * window;
    return pos < window ? 0 : pos - window + 1;
  }
};

// Rotates q and k in place (after an optional norm) and writes k and v into the KV blocks.
struct QkvArgs {
  float* q = nullptr;  // [rows, q_heads * head_dim]
  float* k = nullptr;  // [rows, kv_heads * head_dim]
  const float* v = nullptr;
  int64_t stride = 0;  // floats between rows, of all three
  QkNorm norm = QkNorm::kHeadRms;
  const float* q_norm = nullptr;  // its weights for the heads here, or null: none
  const float* k_norm = nullptr;
  float eps = 0;
  // kRowRms: [rows, 2], what SumSquares says of all heads of q and k, elsewhere too; and how many
  // columns those have.
  const float* squares = nullptr;
  int q_cols = 0, k_cols = 0;
  const float* q_scale = nullptr;   // [positions] or null: multiplies q, behind norm and rotation
  const RopeTable* rope = nullptr;  // null: no rotation
};

// A token's experts. logits [rows, experts] -> ids and weights [rows, used].
struct RouterArgs {
  const float* logits = nullptr;
  int experts = 0;  // at most kMaxRoutedExperts
  int used = 0;
  bool softmax_all = true;  // softmax over all experts, then top-k (else softmax over the chosen)
  bool renormalize = true;  // chosen weights sum to 1
  float scale = 1;
  bool sigmoid = false;                // weights are sigmoid(logit), in place of the softmax
  const float* choice_bias = nullptr;  // [experts] or null; sigmoid: experts are chosen by
                                       // sigmoid(logit) + this
  // sigmoid: of so many groups of equally many experts, in order, those take part whose two best
  // have the largest sums (DeepSeek-V3, arXiv 2412.19437, section 2.1.2). At most
  // kMaxExpertGroups; groups_used groups have at least `used` experts, a group at least 2.
  int groups = 1;
  int groups_used = 1;
};
inline constexpr int kMaxRoutedExperts = 1024;
inline constexpr int kMaxExpertGroups = 32;

struct FfnWeights {
  const PackedMatrix* gate = nullptr;  // [ffn, cols]
  const PackedMatrix* up = nullptr;
  Activation activation = Activation::kSwiGlu;
};

struct ExpertWeights {
  absl::Span<const PackedMatrix> gate, up, down;  // one per expert
  // Of each expert, [rows of its matrix]; empty: none. down's is weighted as its product is.
  absl::Span<const float*const> gate_bias = {}, up_bias = {}, down_bias = {};
  Activation activation = Activation::kSwiGlu;
};

// What sampling needs of a row of logits.
struct LogitRequest {
  float scale = 1;      // 1 / temperature
  int32_t target = -1;  // a column, or -1
};
struct LogitSummary {
  double log_sum_exp = 0;  // of scale * logit; 0 when scale is 0
  float target_logit = 0;  // -infinity without a target
};
struct LogitCandidate {
  int32_t token = -1;  // -1: the row has fewer
  float logit = 0;
};

// A decode step: rows 0 .. segments.size() - 1, a segment of one row each.
struct DecodeStep {
  absl::Span<const Segment> segments;
  absl::Span<const int32_t> ids;  // what Embed is called with; empty: it is not
  int rows_max = 0;               // for which the ops may be called
  // Null: this rank decides alone. Else the ops hold sums with other ranks, which record and replay
  // the same steps or none: called when this rank has recorded one, or failed to, by all of them
  // alike. Answers whether all have.
  std::function<absl::StatusOr<bool>(bool recorded)> agree = nullptr;
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::string Describe() const = 0;  // "avx512+amx, 2 threads"

  // Sizes every internal workspace for batches of at most this. Call once, before the ops.
  struct Limits {
    int rows = 0;      // rows per batch
    int cols = 0;      // widest input of a linear layer
    int out_rows = 0;  // most rows of one weight matrix
    int heads = 0;
    int head_dim = 0;
    int context = 0;
    int experts_used = 0;
    int expert_cols = 0;  // FFN columns of an expert here
    // Of ReduceLogits; 0: it is not called.
    int logit_rows = 0;
    int vocab = 0;
  };
  virtual absl::Status Reserve(const Limits& limits) = 0;
  // Bytes that Reserve() would take, for the plan.
  virtual int64_t WorkspaceBytes(const Limits& limits) const = 0;

  // ---- Memory. The defaults are those of a device that works in host memory.

  virtual bool shares_host_memory() const { return true; }
  // What a device with memory of its own has left, for budgets.
  virtual int64_t FreeBytes() const { return 0; }
  // kResourceExhausted with the sizes when there is too little.
  virtual absl::StatusOr<DeviceMemory> Allocate(int64_t bytes);
  // Host memory that is fast to copy to and from the device.
  virtual absl::StatusOr<DeviceMemory> AllocateStaging(int64_t bytes);
  // Between host and device in any direction, behind the ops before it; the host may use both sides
  // when it returns.
  virtual void Copy(void* to, const void* from, int64_t bytes);
  // From the device to memory of AllocateStaging, behind the ops before it; it is there after
  // Wait(), or after any call that gives the host something else.
  virtual void Download(void* to, const void* from, int64_t bytes) { Copy(to, from, bytes); }
  virtual void Wait() {}
  // Where the host can read what the ops before have written: `data` itself, or a copy that lives
  // until the next call.
  virtual const void* OnHost(const void* data, int64_t bytes);
  // Where ops can read host data: `data` itself, or a copy that lives until the next call.
  virtual const void* OnDevice(const void* data, int64_t bytes);
  // What moves weights to a device's own memory beside the ops; null where there is nothing to
  // move.
  virtual CopyEngine* copies() { return nullptr; }
  // Another order of copies beside that one, for a device that has it. Goes before the backend
  // does.
  virtual absl::StatusOr<std::unique_ptr<CopyEngine>> MakeCopies();
  // Memory of the device that another rank of the host may write to. Goes before the backend does.
  virtual absl::StatusOr<std::unique_ptr<PeerMailbox>> MakeMailbox(int64_t slot_bytes);
  // This rank's part of sums among `ranks` of the host with a device each. A watch of the queue may
  // own it.
  virtual absl::StatusOr<std::unique_ptr<PeerSums>> MakePeerSums(PeerMemory memory, int rank,
                                                                 int ranks);
  // The device's queue, for libraries that enqueue on it; null for CPUs.
  virtual DeviceQueue* queue() { return nullptr; }
  // kUnavailable when the device failed in one of the ops before: their results are garbage.
  virtual absl::Status Check() { return absl::OkStatus(); }

  // ---- Ops

  // The segments that the ops are given from now on are those of another batch. Between two calls
  // they are all the same, so that a device is told of them once.
  virtual void BeginBatch() {}
  // Runs a decode step, which `ops` enqueues over the rows that it is called with: the step's, or
  // more, whose values mean nothing. A device that has seen steps of the same size may replay what
  // they enqueued instead; then ops is not called. REQUIRES: from step to step, ops differs in
  // nothing but the step and the rows; it neither waits for the device nor copies.
  virtual absl::Status Step(const DecodeStep& step, absl::FunctionRef<absl::Status(int rows)> ops) {
    return ops(static_cast<int>(step.segments.size()));
  }
  // Whether steps are replayed, as far as is known before the first.
  virtual bool replays_steps() const { return false; }

  // out[i] = row ids[i] of table times scale, zeros where ids[i] < 0 (another rank's row). out is
  // [n, table.cols].
  virtual void Embed(const PackedMatrix& table, absl::Span<const int32_t> ids, float scale,
                     float* out) = 0;
  // out [rows, cols] = what a linear layer would be given; it may be the input's x. REQUIRES: a
  // norm.
  virtual void Norm(const LinearInput& input, int rows, int cols, float* out,
                    int64_t out_stride) = 0;
  // Every output of one input in one pass over the threads (q, k, v; gate, up).
  virtual void Linear(const LinearInput& input, int cols, RowCount rows,
                      absl::Span<const LinearOutput> outputs) = 0;
  // out (+)= out.weight * activation(gate(n), up(n)) + out.bias, n = input[row]. What two calls of
  // Linear say, with gate and up [rows, ffn] between them: these are scratch, of which a device may
  // use what it wants.
  virtual void Ffn(const LinearInput& input, int cols, RowCount rows, const FfnWeights& ffn,
                   float* gate, float* up, const LinearOutput& out);
  // sums[row, i] = of the squares of columns runs[i] of x; a run may be empty.
  virtual void SumSquares(const float* x, int64_t stride, const ColumnRun (&runs)[2], int rows,
                          float* sums) = 0;
  virtual void QkvToCache(const QkvArgs& args, const AttentionShape& shape, const KvLayer& kv,
                          absl::Span<const Segment> segments) = 0;
  // out [rows, q_heads * head_dim], causal, over the KV blocks (which already hold this batch's
  // rows).
  virtual void Attention(const float* q, int64_t q_stride, const AttentionShape& shape,
                         const KvLayer& kv, absl::Span<const Segment> segments, float* out,
                         int64_t out_stride) = 0;
  virtual void Route(const RouterArgs& args, int rows, int32_t* ids, float* weights) = 0;
  // out[row] = sum over its experts e of weight * down_e(activation(gate_e(n), up_e(n))), n =
  // input[row].
  // weights null: all 1.
  virtual void Experts(const LinearInput& input, int cols, RowCount rows, const int32_t* ids,
                       const float* weights, int used, const ExpertWeights& experts, float* out,
                       int64_t out_stride) = 0;
  // For each of requests.size() rows of logits [rows, vocab]: a summary, and in `best` [rows,
  // candidates] (host memory, both) the best of it, among equals the lower token, tokens counted
  // from first_token; NaNs are left out. False when this device leaves that to whoever reads the
  // rows.
  virtual bool ReduceLogits(const float* /*logits*/, int /*vocab*/, int32_t /*first_token*/,
                            absl::Span<const LogitRequest> /*requests*/, int /*candidates*/,
                            LogitSummary* /*summaries*/, LogitCandidate* /*best*/) {
    return false;
  }
  // x += y over [rows, cols]
  virtual void Add(float* x, int64_t x_stride, const float* y, int64_t y_stride, int rows,
                   int cols) = 0;
};

struct CpuOptions {
  int threads = 0;    // 0: all cores this process may use
  std::string level;  // a CpuLevel's name (cpu/features.h); "" = SHOAL_CPU or the best there is
  bool pin = true;
  int first_core = 0;  // index into the cores this process may use: ranks of one host take turns
};
// kInvalidArgument for an unknown level or one this machine lacks (names what it has).
absl::StatusOr<std::unique_ptr<Backend>> MakeCpuBackend(const CpuOptions& options);

}  // namespace shoal
