#include "kernels/cuda/kernel_bench.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "fmt/format.h"
#include "kernels/cuda/attention_ops.h"
#include "kernels/cuda/cublas.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/limits_ops.h"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/planner.h"
#include "kernels/status_macros.h"

namespace shoal::cuda {
namespace {

using Fn = std::function<void()>;

// What one layer of a dense model multiplies with.
struct LayerShape {
  const char* name;
  int dim, q_heads, kv_heads, head_dim, ffn;
  int q_rows() const { return q_heads * head_dim; }
  int kv_rows() const { return kv_heads * head_dim; }
};
constexpr LayerShape kLayers[] = {{"8B", 4096, 32, 8, 128, 14336},
                                  {"70B", 8192, 64, 8, 128, 28672}};

int64_t RoundUp(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A stream and what is timed on it.
class Timer {
 public:
  static absl::StatusOr<Timer> Create() {
    Timer t;
    SHOAL_ASSIGN_OR_RETURN(t.stream_, OwnedStream::Create());
    SHOAL_RETURN_IF_ERROR(ToStatus(cudaEventCreate(&t.begin_), "creating an event"));
    SHOAL_RETURN_IF_ERROR(ToStatus(cudaEventCreate(&t.end_), "creating an event"));
    return t;
  }
  Timer() = default;
  Timer(Timer&& o) noexcept
      : stream_(std::move(o.stream_)),
        begin_(std::exchange(o.begin_, nullptr)),
        end_(std::exchange(o.end_, nullptr)) {}
  Timer& operator=(Timer&& o) noexcept {
    std::swap(stream_, o.stream_);
    std::swap(begin_, o.begin_);
    std::swap(end_, o.end_);
    return *this;
  }
  ~Timer() {
    if (begin_ != nullptr) cudaEventDestroy(begin_);
    if (end_ != nullptr) cudaEventDestroy(end_);
  }
  cudaStream_t stream() const { return stream_.get(); }

  // The least of three averages over about `seconds` of calls, one after the
  // other.
  absl::StatusOr<double> Seconds(double seconds, const Fn& fn) const {
    fn();
    SHOAL_ASSIGN_OR_RETURN(const double once, Once(1, fn));
    const int calls = std::clamp(static_cast<int>(seconds / 3 / std::max(once, 1e-7)), 1, 100000);
    double best = once;
    for (int i = 0; i < 3; ++i) {
      SHOAL_ASSIGN_OR_RETURN(const double s, Once(calls, fn));
      best = std::min(best, s);
    }
    return best;
  }

  // The same of what `fn` enqueues, as a graph: without the host's share of a
  // launch.
  absl::StatusOr<double> SecondsAsGraph(double seconds, const Fn& fn) const {
    SHOAL_RETURN_IF_ERROR(ToStatus(
        cudaStreamBeginCapture(stream(), cudaStreamCaptureModeThreadLocal), "beginning a graph"));
    fn();
    cudaGraph_t graph = nullptr;
    SHOAL_RETURN_IF_ERROR(ToStatus(cudaStreamEndCapture(stream(), &graph), "ending a graph"));
    cudaGraphExec_t ready = nullptr;
    const absl::Status made =
        ToStatus(cudaGraphInstantiate(&ready, graph, 0), "instantiating a graph");
    cudaGraphDestroy(graph);
    SHOAL_RETURN_IF_ERROR(made);
    const absl::StatusOr<double> s = Seconds(seconds, [&] { cudaGraphLaunch(ready, stream()); });
    cudaGraphExecDestroy(ready);
    return s;
  }

 private:
  absl::StatusOr<double> Once(int calls, const Fn& fn) const {
    cudaEventRecord(begin_, stream());
    for (int i = 0; i < calls; ++i) fn();
    cudaEventRecord(end_, stream());
    SHOAL_RETURN_IF_ERROR(ToStatus(cudaEventSynchronize(end_), "running a kernel"));
    SHOAL_RETURN_IF_ERROR(ToStatus(cudaGetLastError(), "launching a kernel"));
    float ms = 0;
    SHOAL_RETURN_IF_ERROR(ToStatus(cudaEventElapsedTime(&ms, begin_, end_), "reading a clock"));
    return ms * 1e-3 / calls;
  }

  OwnedStream stream_;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

// Bytes whose f16 and f32 readings are small normal numbers, as the CPU's bench
// has them.
absl::Status FillWeights(uint8_t* device, int64_t bytes) {
  constexpr int64_t kPattern = int64_t{8} << 20;
  std::vector<uint32_t> pattern(kPattern / 4);
  uint32_t state = 1;
  for (uint32_t& v : pattern) {
    v = ((state = state * 1664525u + 1013904223u) & 0x1f1f1f1fu) | 0x20202020u;
  }
  for (int64_t at = 0; at < bytes; at += kPattern) {
    SHOAL_RETURN_IF_ERROR(
        ToStatus(cudaMemcpy(device + at, pattern.data(), std::min(kPattern, bytes - at),
                            cudaMemcpyHostToDevice),
                 "filling memory"));
  }
  return absl::OkStatus();
}

absl::StatusOr<double> ReadGbps(const Timer& timer, const uint8_t* data, int64_t bytes,
                                int multiprocessors, uint8_t* sink) {
  SHOAL_ASSIGN_OR_RETURN(const double s, timer.Seconds(0.02, [&] {
    ReadOnly(data, bytes, multiprocessors, reinterpret_cast<uint32_t*>(sink), timer.stream());
  }));
  return static_cast<double>(bytes) / s / 1e9;
}

constexpr int kShortChunk = 64;  // rows of a prompt that are too few blocks over a long context

absl::StatusOr<int> Multiprocessors() {
  int device = 0, n = 0;
  SHOAL_RETURN_IF_ERROR(ToStatus(cudaGetDevice(&device), "asking for the GPU"));
  SHOAL_RETURN_IF_ERROR(ToStatus(cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device),
                                 "asking for multiprocessors"));
  return n;
}

class Bench {
 public:
  Bench(const KernelBenchOptions& options, const std::function<void(const KernelResult&)>& progress)
      : options_(options), progress_(progress) {}

  absl::StatusOr<ChipLimits> Limits() {
    SHOAL_RETURN_IF_ERROR(Prepare());
    SHOAL_RETURN_IF_ERROR(MeasureLimits());
    return report_.limits;
  }

  absl::StatusOr<KernelReport> Run() {
    SHOAL_RETURN_IF_ERROR(Prepare());
    SHOAL_RETURN_IF_ERROR(MeasureLimits());
    for (const LayerShape& layer : kLayers) {
      for (const DType type : types_) {
        SHOAL_RETURN_IF_ERROR(MeasureDecode(layer, type));
        SHOAL_RETURN_IF_ERROR(MeasurePrefill(layer, type));
      }
    }
    for (const LayerShape& layer : kLayers) SHOAL_RETURN_IF_ERROR(MeasureAttention(layer));
    return std::move(report_);
  }

 private:
  absl::Status Prepare();
  absl::Status MeasureLimits();
  absl::Status MeasureGemm();
  absl::Status MeasureDecode(const LayerShape& layer, DType type);
  absl::Status MeasurePrefill(const LayerShape& layer, DType type);
  absl::Status MeasureAttention(const LayerShape& layer);
  absl::Status MeasureAttention(const LayerShape& layer, KvType kv, int sequences, int pos,
                                int rows);

  // A matrix of the pool; each call takes the bytes behind those of the one
  // before.
  PackedMatrix Next(DType type, int rows, int cols) {
    PackedMatrix w;
    w.shape = MakePackedShape(type, rows, 0, cols);
    const int64_t bytes = RoundUp(w.shape.bytes(), 256);
    if (at_ + bytes > weights_.size()) at_ = 0;
    w.data = weights_.data() + at_;
    at_ += bytes;
    return w;
  }
  // out [rows of w, batch] = w * in [cols, batch]; how often it takes to leave
  // the cache.
  void Multiply(const LinearInput& in, RowCount rows, absl::Span<const PackedMatrix> weights,
                float* out) {
    std::vector<LinearOutput> outputs;
    int64_t width = 0;
    for (const PackedMatrix& w : weights) width += w.shape.rows;
    for (const PackedMatrix& w : weights) {
      outputs.push_back({&w, nullptr, out, width, false});
      out += w.shape.rows;
    }
    linear_.Linear(in, static_cast<int>(weights[0].shape.cols), rows, outputs, timer_.stream());
  }
  // The products of a layer and the steps before them, without attention.
  void Layer(const LayerShape& l, DType type, RowCount rows) {
    const auto* norm = x_.as<float>();
    const PackedMatrix qkv[3] = {Next(type, l.q_rows(), l.dim), Next(type, l.kv_rows(), l.dim),
                                 Next(type, l.kv_rows(), l.dim)};
    Multiply(LinearInput::RmsNorm(x_.as<float>(), l.dim, norm, 1e-5f), rows, qkv, a_.as<float>());
    const PackedMatrix o = Next(type, l.dim, l.q_rows());
    Multiply(LinearInput::Plain(a_.as<float>(), l.q_rows() + 2 * l.kv_rows()), rows, {&o, 1},
             b_.as<float>());
    const PackedMatrix gate_up[2] = {Next(type, l.ffn, l.dim), Next(type, l.ffn, l.dim)};
    Multiply(LinearInput::RmsNorm(b_.as<float>(), l.dim, norm, 1e-5f), rows, gate_up,
             a_.as<float>());
    const PackedMatrix down = Next(type, l.dim, l.ffn);
    Multiply(LinearInput::Gated(Activation::kSwiGlu, a_.as<float>(), a_.as<float>() + l.ffn,
                                int64_t{2} * l.ffn),
             rows, {&down, 1}, b_.as<float>());
  }
  static double Weights(const LayerShape& l) {
    return static_cast<double>(l.dim) * (2.0 * l.q_rows() + 2.0 * l.kv_rows() + 3.0 * l.ffn);
  }
  static int64_t LayerBytes(const LayerShape& l, DType type) {
    return MakePackedShape(type, l.q_rows() + 2 * l.kv_rows(), 0, l.dim).bytes() +
           MakePackedShape(type, l.dim, 0, l.q_rows()).bytes() +
           2 * MakePackedShape(type, l.ffn, 0, l.dim).bytes() +
           MakePackedShape(type, l.dim, 0, l.ffn).bytes();
  }
  void Add(KernelResult r) {
    report_.results.push_back(std::move(r));
    if (progress_) progress_(report_.results.back());
  }
  void AddReads(std::string what, int rows, double seconds, double bytes) {
    const double gbps = bytes / seconds / 1e9;
    Add({std::move(what), rows, seconds, gbps, 0, gbps / report_.limits.read_gbps});
  }
  void AddProduct(std::string what, int rows, double seconds, double operations) {
    const double tflops = operations / seconds / 1e12;
    Add({std::move(what), rows, seconds, 0, tflops, tflops / report_.limits.matrix_tflops()});
  }

  const KernelBenchOptions options_;
  const std::function<void(const KernelResult&)>& progress_;
  std::vector<DType> types_;
  Timer timer_;
  int multiprocessors_ = 0, major_ = 0, max_rows_ = 0;
  int64_t shared_bytes_ = 0;
  Backend::Limits limits_;
  DeviceMemory weights_, x_, a_, b_, workspace_;
  std::unique_ptr<Cublas> cublas_;  // null where it is not installed
  LinearEngine linear_{true};
  int64_t at_ = 0;
  KernelReport report_;
};

absl::Status Bench::Prepare() {
  SHOAL_ASSIGN_OR_RETURN(const std::vector<GpuInfo> gpus, ListGpus());
  if (options_.device < 0 || options_.device >= static_cast<int>(gpus.size())) {
    return absl::UnavailableError(absl::StrCat("there is no GPU ", options_.device));
  }
  SHOAL_RETURN_IF_ERROR(ToStatus(cudaSetDevice(options_.device), "choosing a GPU"));
  SHOAL_ASSIGN_OR_RETURN(multiprocessors_, Multiprocessors());
  int shared = 0;
  SHOAL_RETURN_IF_ERROR(ToStatus(
      cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, options_.device),
      "asking for shared memory"));
  shared_bytes_ = shared;
  report_.limits.name = gpus[options_.device].name;
  report_.limits.multiprocessors = multiprocessors_;
  major_ = gpus[options_.device].major;
  types_ = options_.types;
  if (types_.empty()) types_ = {DType::kQ4_0, DType::kQ4_K, DType::kQ8_0};
  max_rows_ = std::max(options_.prefill_rows, kShortChunk);
  for (const int rows : options_.decode_rows) max_rows_ = std::max(max_rows_, rows);
  int64_t widest = 0;
  Backend::Limits& limits = limits_;
  limits.rows = max_rows_;
  for (const LayerShape& l : kLayers) {
    limits.cols = std::max({limits.cols, l.dim, l.q_rows(), l.ffn});
    widest = std::max<int64_t>({widest, l.q_rows() + 2 * l.kv_rows(), 2 * l.ffn});
  }
  int64_t bytes = options_.memory_bytes;
  for (const DType type : types_) bytes = std::max(bytes, LayerBytes(kLayers[1], type) + 4096);
  SHOAL_ASSIGN_OR_RETURN(timer_, Timer::Create());
  absl::StatusOr<std::unique_ptr<Cublas>> cublas = Cublas::Load(timer_.stream());
  if (cublas.ok()) cublas_ = *std::move(cublas);
  linear_ = LinearEngine(major_ >= 8, cublas_.get());
  SHOAL_ASSIGN_OR_RETURN(weights_, AllocateDevice(bytes));
  SHOAL_RETURN_IF_ERROR(FillWeights(weights_.data(), bytes));
  SHOAL_ASSIGN_OR_RETURN(x_, AllocateDevice(int64_t{4} * max_rows_ * limits.cols));
  SHOAL_ASSIGN_OR_RETURN(a_, AllocateDevice(int64_t{4} * max_rows_ * widest));
  SHOAL_ASSIGN_OR_RETURN(b_, AllocateDevice(int64_t{4} * max_rows_ * widest));
  SHOAL_ASSIGN_OR_RETURN(workspace_, AllocateDevice(linear_.WorkspaceBytes(limits)));
  std::vector<float> x(x_.size() / 4);
  uint32_t state = 7;
  for (float& v : x) {
    state = state * 1664525u + 1013904223u;
    v = static_cast<float>(static_cast<int32_t>(state)) * 0x1p-31f;
  }
  SHOAL_RETURN_IF_ERROR(
      ToStatus(cudaMemcpy(x_.data(), x.data(), x_.size(), cudaMemcpyHostToDevice), "filling rows"));
  linear_.SetWorkspace(limits, workspace_.data());
  return absl::OkStatus();
}

absl::Status Bench::MeasureLimits() {
  ChipLimits& l = report_.limits;
  SHOAL_ASSIGN_OR_RETURN(l.read_gbps, ReadGbps(timer_, weights_.data(), weights_.size(),
                                               multiprocessors_, workspace_.data()));
  double operations = 0;
  SHOAL_ASSIGN_OR_RETURN(const double mma, timer_.Seconds(0.05, [&] {
    operations =
        MultiplyOnly(multiprocessors_ * 4, 2000, workspace_.as<uint32_t>(), timer_.stream());
  }));
  l.mma_tflops = operations / mma / 1e12;
  SHOAL_ASSIGN_OR_RETURN(const double nothing,
                         timer_.Seconds(0.01, [&] { Nothing(timer_.stream()); }));
  l.launch_us = nothing * 1e6;
  constexpr int64_t kCopy = int64_t{256} << 20;
  SHOAL_ASSIGN_OR_RETURN(const DeviceMemory pinned, AllocatePinned(kCopy));
  SHOAL_ASSIGN_OR_RETURN(const double copy, timer_.Seconds(0.05, [&] {
    cudaMemcpyAsync(a_.data(), pinned.data(), std::min(kCopy, a_.size()), cudaMemcpyHostToDevice,
                    timer_.stream());
  }));
  l.pinned_gbps = static_cast<double>(std::min(kCopy, a_.size())) / copy / 1e9;
  return MeasureGemm();
}

absl::Status Bench::MeasureGemm() {
  constexpr int kSize = 8192;
  constexpr int64_t kCount = int64_t{kSize} * kSize;
  if (cublas_ == nullptr) return absl::OkStatus();  // the table says that it is missing
  SHOAL_ASSIGN_OR_RETURN(const DeviceMemory memory, AllocateDevice(kCount * (2 + 2 + 4) + 4));
  auto* a = memory.as<uint16_t>();
  auto* c = reinterpret_cast<float*>(a + 2 * kCount);
  FillHalves(a, 2 * kCount, 1, timer_.stream());
  SHOAL_ASSIGN_OR_RETURN(const double s, timer_.Seconds(0.1, [&] {
    cublas_->Multiply(kSize, kSize, kSize, a, a + kCount, c + kCount, false, c, kSize);
  }));
  SHOAL_RETURN_IF_ERROR(cublas_->status());
  report_.limits.gemm_tflops = 2.0 * kSize * kSize * kSize / s / 1e12;
  return absl::OkStatus();
}

absl::Status Bench::MeasureDecode(const LayerShape& l, DType type) {
  const std::string name = Info(type).name;
  struct Matrix {
    int out, cols;
  };
  const Matrix matrices[] = {{l.q_rows() + 2 * l.kv_rows(), l.dim},
                             {l.dim, l.q_rows()},
                             {2 * l.ffn, l.dim},
                             {l.dim, l.ffn}};
  for (const int rows : options_.decode_rows) {
    for (const Matrix& m : matrices) {
      const int64_t bytes = MakePackedShape(type, m.out, 0, m.cols).bytes();
      const int copies = static_cast<int>(std::clamp<int64_t>(weights_.size() / bytes, 1, 200));
      SHOAL_ASSIGN_OR_RETURN(const double s, timer_.SecondsAsGraph(options_.seconds, [&] {
        for (int i = 0; i < copies; ++i) {
          const PackedMatrix w = Next(type, m.out, m.cols);
          Multiply(LinearInput::Plain(x_.as<float>(), m.cols), {rows, 0}, {&w, 1}, a_.as<float>());
        }
      }));
      AddReads(absl::StrCat("decode ", m.out, "x", m.cols, " ", name), rows, s / copies,
               static_cast<double>(bytes));
    }
    const int64_t bytes = LayerBytes(l, type);
    const int copies = static_cast<int>(std::clamp<int64_t>(weights_.size() / bytes, 1, 32));
    SHOAL_ASSIGN_OR_RETURN(const double s, timer_.SecondsAsGraph(options_.seconds, [&] {
      for (int i = 0; i < copies; ++i) Layer(l, type, {rows, 0});
    }));
    AddReads(absl::StrCat("decode, a layer of ", l.name, " ", name), rows, s / copies,
             static_cast<double>(bytes));
  }
  return absl::OkStatus();
}

absl::Status Bench::MeasurePrefill(const LayerShape& l, DType type) {
  const int rows = options_.prefill_rows;
  const auto layer = [&] { Layer(l, type, {0, rows}); };
  const std::string name = absl::StrCat("prefill, a layer of ", l.name, " ", Info(type).name);
  const double operations = 2 * Weights(l) * rows;
  if (cublas_ != nullptr) {
    SHOAL_ASSIGN_OR_RETURN(const double s, timer_.Seconds(options_.seconds, layer));
    SHOAL_RETURN_IF_ERROR(cublas_->status());
    AddProduct(name + ", cuBLAS", rows, s, operations);
  }
  LinearEngine own(major_ >= 8);
  own.SetWorkspace(limits_, workspace_.data());
  std::swap(own, linear_);
  const absl::StatusOr<double> tiles = timer_.Seconds(options_.seconds, layer);
  std::swap(own, linear_);
  SHOAL_RETURN_IF_ERROR(tiles.status());
  AddProduct(name + ", own tiles", rows, *tiles, operations);
  return absl::OkStatus();
}

absl::Status Bench::MeasureAttention(const LayerShape& l) {
  for (const KvType kv : {KvType::kF16, KvType::kQ8_0}) {
    SHOAL_RETURN_IF_ERROR(MeasureAttention(l, kv, 1, 32767, 1));
    SHOAL_RETURN_IF_ERROR(MeasureAttention(l, kv, 32, 4095, 1));
    SHOAL_RETURN_IF_ERROR(MeasureAttention(l, kv, 1, 0, options_.prefill_rows));
    SHOAL_RETURN_IF_ERROR(MeasureAttention(l, kv, 1, 8192, options_.prefill_rows));
    SHOAL_RETURN_IF_ERROR(MeasureAttention(l, kv, 1, 32768, kShortChunk));
  }
  return absl::OkStatus();
}

// Rows [pos, pos + rows) of each sequence; one row: decode.
absl::Status Bench::MeasureAttention(const LayerShape& l, KvType type, int sequences, int pos,
                                     int rows) {
  const bool decode = rows == 1;
  const AttentionShape shape{.q_heads = l.q_heads,
                             .head_dim = l.head_dim,
                             .group = l.q_heads / l.kv_heads,
                             .scale = 0.088f};
  KvLayer kv;
  kv.shape = {type, l.kv_heads, l.head_dim};
  kv.block_stride = kv.shape.block_bytes();
  const int blocks = (pos + rows + kKvBlockTokens - 1) / kKvBlockTokens;
  // Several caches, so that no step finds the one before in the L2 cache.
  const int64_t bytes = int64_t{blocks} * sequences * kv.block_stride;
  const int copies = static_cast<int>(std::clamp<int64_t>((int64_t{512} << 20) / bytes, 1, 8));
  SHOAL_ASSIGN_OR_RETURN(const DeviceMemory pool, AllocateDevice(bytes * copies));
  SHOAL_RETURN_IF_ERROR(FillWeights(pool.data(), pool.size()));
  std::vector<int32_t> table(int64_t{blocks} * sequences);
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i);
  std::vector<Segment> segments;
  for (int s = 0; s < sequences; ++s) {
    segments.push_back({s * rows, rows, pos, table.data() + int64_t{s} * blocks, decode});
  }
  Backend::Limits limits;
  limits.rows = sequences * rows;
  limits.heads = l.q_heads;
  limits.head_dim = l.head_dim;
  limits.context = pos + rows;
  Planner planner(limits);
  const int items = std::max(limits.context / kSplitTokens + 1, 2048);
  std::vector<uint8_t> host(planner.MaxBytes());
  SHOAL_ASSIGN_OR_RETURN(const DeviceMemory device, AllocateDevice(planner.MaxBytes()));
  const PlanOptions plan_options =
      PlanOptionsFor(shape, kv.shape, {shared_bytes_, multiprocessors_}, items);
  const BatchPlan plan = planner.Build(segments, shape, plan_options, host.data(), device.data());
  SHOAL_RETURN_IF_ERROR(
      ToStatus(cudaMemcpy(device.data(), host.data(), planner.UsedBytes(), cudaMemcpyHostToDevice),
               "copying a plan"));
  SHOAL_ASSIGN_OR_RETURN(const DeviceMemory workspace,
                         AllocateDevice(AttentionWorkspaceBytes(l.q_heads, l.head_dim, items)));
  SHOAL_ASSIGN_OR_RETURN(const double s, timer_.SecondsAsGraph(options_.seconds, [&] {
    for (int i = 0; i < copies; ++i) {
      kv.base = pool.data() + i * bytes;
      Attention(x_.as<float>(), l.q_rows(), shape, kv, plan, workspace.data(), b_.as<float>(),
                l.q_rows(), timer_.stream());
    }
  }));
  const std::string name =
      absl::StrCat("attention ", l.name, " ", type == KvType::kF16 ? "f16" : "q8_0");
  if (decode) {
    AddReads(absl::StrCat(name, " decode at ", pos + 1), sequences, s / copies,
             static_cast<double>(bytes));
  } else {
    const double seen = static_cast<double>(rows) * (pos + (rows + 1) / 2.0);
    AddProduct(absl::StrCat(name, " prompt at ", pos), rows, s / copies,
               4.0 * l.head_dim * l.q_heads * seen);
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<KernelReport> BenchKernels(
    const KernelBenchOptions& options, const std::function<void(const KernelResult&)>& progress) {
  return Bench(options, progress).Run();
}

absl::StatusOr<ChipLimits> MeasureChip(int device) {
  KernelBenchOptions options;
  options.device = device;
  options.types = {DType::kQ4_0};
  options.decode_rows = {1};
  options.memory_bytes = int64_t{512} << 20;
  return Bench(options, {}).Limits();
}

absl::StatusOr<double> MeasureReadBandwidth(int64_t bytes) {
  SHOAL_ASSIGN_OR_RETURN(const Timer timer, Timer::Create());
  SHOAL_ASSIGN_OR_RETURN(const int multiprocessors, Multiprocessors());
  SHOAL_ASSIGN_OR_RETURN(const DeviceMemory memory, AllocateDevice(RoundUp(bytes, 16) + 16));
  return ReadGbps(timer, memory.data(), RoundUp(bytes, 16), multiprocessors,
                  memory.data() + RoundUp(bytes, 16));
}

std::string FormatKernelReport(const KernelReport& report) {
  const ChipLimits& l = report.limits;
  std::string s = fmt::format(
      "{}, {} multiprocessors: reads {:.0f} GB/s; f16 products {:.0f} TFLOP/s "
      "by mma.sync, {}; "
      "pinned memory to the GPU {:.1f} GB/s; a launch {:.2f} us\n\n",
      l.name, l.multiprocessors, l.read_gbps, l.mma_tflops,
      l.gemm_tflops > 0 ? fmt::format("{:.0f} by cuBLAS", l.gemm_tflops)
                        : std::string("cuBLAS is not installed"),
      l.pinned_gbps, l.launch_us);
  s += "| what | rows | us | GB/s | TFLOP/s | share of limit "
       "|\n|---|---|---|---|---|---|\n";
  for (const KernelResult& r : report.results) {
    s += fmt::format("| {} | {} | {:.1f} | {} | {} | {:.0f} % |\n", r.what, r.rows, r.seconds * 1e6,
                     r.gbps > 0 ? fmt::format("{:.0f}", r.gbps) : "",
                     r.tflops > 0 ? fmt::format("{:.0f}", r.tflops) : "", r.share * 100);
  }
  return s;
}

}  // namespace shoal::cuda
