#include "launcher/speed_probe.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/buffer.h"
#include "kernels/kv_layout.h"
#include "kernels/packed_matrix.h"
#include "kernels/status_macros.h"
#include "offload/async_file.h"

namespace shoal {
namespace {

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Seconds of one call, over as many as fill `seconds`; the first does not count.
double SecondsOf(double seconds, const std::function<void()>& call) {
  call();
  const double start = Now();
  int calls = 0;
  do {
    call();
    ++calls;
  } while (Now() - start < seconds);
  return (Now() - start) / calls;
}

// A matrix larger than caches, and products with it.
class Product {
 public:
  static absl::StatusOr<std::unique_ptr<Product>> Create(DType type, const CpuOptions& cpu,
                                                         int64_t memory) {
    auto p = std::make_unique<Product>();
    // A server's last cache holds hundreds of MB, and weights of a model are not in it.
    const int64_t cache = std::max<int64_t>(0, sysconf(_SC_LEVEL3_CACHE_SIZE));
    const int64_t bytes = std::max(kLeastBytes, std::min(cache / 4 * 5, memory / 3));
    p->out_rows_ = bytes / RowBytes(type, kCols) / kPanelRows * kPanelRows;
    p->matrix_.shape = MakePackedShape(type, p->out_rows_, 0, kCols);
    SHOAL_ASSIGN_OR_RETURN(p->weights_, Buffer::Allocate(p->matrix_.shape.bytes()));
    // Scales that are small normal numbers.
    std::memset(p->weights_.data(), 0x11, p->weights_.size());
    p->matrix_.data = p->weights_.data();
    SHOAL_ASSIGN_OR_RETURN(p->backend_, MakeCpuBackend(cpu));
    Backend::Limits limits;
    limits.rows = kBatch;
    limits.cols = kCols;
    limits.out_rows = static_cast<int>(p->out_rows_);
    limits.heads = limits.head_dim = limits.context = kKvBlockTokens;  // no attention here
    SHOAL_RETURN_IF_ERROR(p->backend_->Reserve(limits));
    p->x_.assign(int64_t{kBatch} * kCols, 0.5f);
    p->y_.resize(kBatch * p->out_rows_);
    return p;
  }
  void Decode() { Multiply({1, 0}); }
  void Prefill() { Multiply({0, kBatch}); }
  double bytes() const { return static_cast<double>(matrix_.shape.bytes()); }

  static constexpr int kBatch = 128;

 private:
  static constexpr int kCols = 4096;
  static constexpr int64_t kLeastBytes = 96 << 20;
  void Multiply(RowCount rows) {
    backend_->Linear(LinearInput::Plain(x_.data(), kCols), kCols, rows,
                     {{&matrix_, nullptr, y_.data(), out_rows_, false}});
  }
  int64_t out_rows_ = 0;
  PackedMatrix matrix_;
  Buffer weights_;
  std::unique_ptr<Backend> backend_;
  std::vector<float> x_, y_;
};

// Reads a file from its beginning to its end, again and again as a streamed model is, as many
// pieces in flight as the streamer would have, until it is destroyed.
class Reader {
 public:
  static absl::StatusOr<std::unique_ptr<Reader>> Start(const std::string& path) {
    auto r = std::make_unique<Reader>();
    SHOAL_ASSIGN_OR_RETURN(r->file_, AsyncFile::Open(path, {}));
    SHOAL_ASSIGN_OR_RETURN(r->buffer_, Buffer::Allocate(kSlots * kIoPieceBytes));
    r->file_->Register(r->buffer_.data(), static_cast<int64_t>(r->buffer_.size()));
    r->thread_ = std::thread([reader = r.get()] { reader->Loop(); });
    return r;
  }
  ~Reader() {
    stop_ = true;
    if (thread_.joinable()) thread_.join();
  }
  // Bytes per second while `work` runs.
  double RateDuring(const std::function<void()>& work) const {
    const double start = Now();
    const int64_t before = bytes_;
    work();
    return static_cast<double>(bytes_ - before) / (Now() - start);
  }
  bool failed() const { return failed_; }

 private:
  static constexpr int kSlots = 32;
  void Loop() {
    const int64_t pieces = file_->size() / kIoPieceBytes;
    std::vector<int> free;
    for (int i = 0; i < kSlots; ++i) free.push_back(i);
    std::vector<IoDone> done;
    DepthTuner tuner;
    for (int64_t next = 0; !stop_ && !failed_;) {
      while (file_->in_flight() < tuner.depth()) {
        const int64_t piece = next++ % pieces;
        const int slot = free.back();
        free.pop_back();
        file_->Submit({false, piece * kIoPieceBytes, buffer_.data() + slot * kIoPieceBytes,
                       kIoPieceBytes, static_cast<uint64_t>(slot)});
      }
      done.clear();
      file_->Wait(&done);
      const double now = Now();
      for (const IoDone& d : done) {
        failed_ = failed_ || !d.status.ok();
        bytes_ += d.bytes;
        tuner.OnBytes(d.bytes, true, now);
        free.push_back(static_cast<int>(d.tag));
      }
    }
  }

  std::unique_ptr<AsyncFile> file_;
  Buffer buffer_;
  std::atomic<int64_t> bytes_{0};
  std::atomic<bool> stop_{false}, failed_{false};
  std::thread thread_;
};

}  // namespace

absl::StatusOr<MultiplySpeed> MeasureMultiplying(DType type, const CpuOptions& cpu,
                                                 int64_t memory) {
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<Product> product,
                         Product::Create(type, cpu, memory));
  MultiplySpeed m;
  m.decode = product->bytes() / SecondsOf(0.3, [&] { product->Decode(); });
  m.prefill = product->bytes() * Product::kBatch / SecondsOf(0.3, [&] { product->Prefill(); });
  return m;
}

absl::StatusOr<AttentionSpeed> MeasureAttention(const AttentionShape& shape, KvType type,
                                                const CpuOptions& cpu) {
  constexpr int kTokens = 2048;
  constexpr int kChunk = 256;  // rows of a prompt, in the middle of the context
  const KvShape kv_shape{type, std::max(1, shape.q_heads / shape.group), shape.head_dim};
  const int64_t bytes = kTokens / kKvBlockTokens * kv_shape.block_bytes();
  SHOAL_ASSIGN_OR_RETURN(Buffer pool, Buffer::Allocate(bytes));
  std::memset(pool.data(), 0, pool.size());
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<Backend> backend, MakeCpuBackend(cpu));
  Backend::Limits limits;
  limits.rows = kChunk;
  limits.cols = limits.out_rows = shape.q_heads * shape.head_dim;
  limits.heads = shape.q_heads;
  limits.head_dim = shape.head_dim;
  limits.context = kTokens;
  SHOAL_RETURN_IF_ERROR(backend->Reserve(limits));
  std::vector<int32_t> blocks(kTokens / kKvBlockTokens);
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = static_cast<int32_t>(i);
  const int64_t width = limits.cols;
  const std::vector<float> q(kChunk * width, 0.1f);
  std::vector<float> out(kChunk * width);
  const auto seconds_of = [&](const Segment& segment) {
    return SecondsOf(0.1, [&] {
      backend->Attention(q.data(), width, shape, {kv_shape, pool.data(), kv_shape.block_bytes()},
                         {segment}, out.data(), width);
    });
  };
  const double token_bytes = static_cast<double>(bytes) / kTokens;
  constexpr int kPos = kTokens / 2, kSeen = kPos + kChunk / 2;  // by a row of the chunk, on average
  AttentionSpeed speed;
  speed.decode = token_bytes * kTokens / seconds_of({0, 1, kTokens - 1, blocks.data(), true});
  speed.prefill =
      token_bytes * kChunk * kSeen / seconds_of({0, kChunk, kPos, blocks.data(), false});
  return speed;
}

absl::StatusOr<ReadSpeed> MeasureReading(const std::string& path, DType type, const CpuOptions& cpu,
                                         int64_t memory) {
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<Product> product,
                         Product::Create(type, cpu, memory));
  const auto decode = [&product] { product->Decode(); };
  const auto prefill = [&product] { product->Prefill(); };
  const auto sleep = [](double seconds) {
    std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
  };
  const double decode_s = SecondsOf(0.2, decode), prefill_s = SecondsOf(0.2, prefill);
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<Reader> reader, Reader::Start(path));
  sleep(0.5);  // the depth is being found
  // In turns, so that a disk whose speed comes and goes is not taken for one that is held up.
  constexpr int kTurns = 6;
  double alone = 0, beside = 0, decode_beside_s = 0, prefill_beside_s = 0;
  for (int i = 0; i < kTurns; ++i) {
    alone += reader->RateDuring([&] { sleep(0.4); }) / kTurns;
    beside +=
        reader->RateDuring([&] { decode_beside_s += SecondsOf(0.15, decode) / kTurns; }) / kTurns;
    prefill_beside_s += SecondsOf(0.15, prefill) / kTurns;
  }
  if (reader->failed()) return absl::UnavailableError(path + " cannot be read");
  ReadSpeed speed;
  speed.bytes_per_s = alone;
  speed.read_slowdown = std::max(1.0, alone / std::max(1.0, beside));
  speed.decode_slowdown = std::max(1.0, decode_beside_s / decode_s);
  speed.prefill_slowdown = std::max(1.0, prefill_beside_s / prefill_s);
  return speed;
}

absl::StatusOr<double> MeasurePacking(const Checkpoint& checkpoint, const WeightLayout& layout,
                                      int threads) {
  WeightLayout some;  // large units from the middle of the model, one for each thread
  const auto largest =
      std::max_element(layout.units.begin(), layout.units.end(),
                       [](const WeightUnit& a, const WeightUnit& b) { return a.bytes < b.bytes; });
  for (size_t i = layout.units.size() / 2;
       i < layout.units.size() && static_cast<int>(some.units.size()) < 2 * threads; ++i) {
    WeightUnit unit = layout.units[i];
    if (unit.bytes * 4 < largest->bytes) continue;
    unit.offset = some.bytes;
    some.bytes += (unit.bytes + 4095) / 4096 * 4096;
    some.units.push_back(std::move(unit));
  }
  if (some.units.empty()) return 0.0;
  SHOAL_ASSIGN_OR_RETURN(Buffer memory, Buffer::Allocate(some.bytes));
  const double start = Now();
  SHOAL_RETURN_IF_ERROR(LoadAll(checkpoint, some, threads, memory.data(), nullptr));
  return static_cast<double>(some.bytes) / (Now() - start);
}

}  // namespace shoal
