// LoadUnit and LoadAll: reads, cuts and packs weights, a run of panels at a time.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/mutex.h"
#include "kernels/status_macros.h"
#include "shard/byte_reader.h"
#include "shard/weight_layout.h"

namespace shoal {
namespace {

// Source bytes of a piece: large enough for a disk's sequential speed, small enough that the
// staging buffer stays in L2 between reading and packing. A single panel may be larger.
constexpr int64_t kPieceBytes = 1 << 20;
// Slices of neighbouring rows that lie closer than this are read with what is between them: disks
// and the page cache are faster at one long read than at many short ones.
constexpr int64_t kReadThroughBytes = 64 << 10;

// A run of panels of an extent (or a whole vector).
struct Piece {
  const WeightExtent* extent = nullptr;
  const TensorInfo* tensor = nullptr;
  int64_t panel_begin = 0;
  int64_t panel_end = 0;
  uint8_t* out = nullptr;  // where panel_begin goes
  int64_t out_bytes = 0;
};

// Where an extent's rows lie in the tensor.
struct RowGeometry {
  RowGeometry(const WeightExtent& e, const TensorInfo& t)
      : stride(RowBytes(t.type, t.cols())), slice(SourceSlice(e.shape, e.col_begin)) {
    first = (e.matrix * t.rows() + e.row_begin) * stride + slice.offset;
  }
  bool read_through() const { return stride - slice.bytes < kReadThroughBytes; }
  int64_t staged_stride() const { return read_through() ? stride : slice.bytes; }

  int64_t stride;
  RowSlice slice;
  int64_t first;  // of the extent's first row's slice
};

// The part of the tensor that a piece's rows span.
Extent SourceSpan(const Piece& p) {
  const RowGeometry g(*p.extent, *p.tensor);
  const int64_t row_begin = p.panel_begin * kPanelRows;
  const int64_t row_end = std::min(p.extent->shape.rows, p.panel_end * kPanelRows);
  return {g.first + row_begin * g.stride, g.first + (row_end - 1) * g.stride + g.slice.bytes};
}

// What a loading thread owns.
using Staging = std::vector<uint8_t>;

absl::Status LoadVector(const Checkpoint& checkpoint, const Piece& p, Staging& staging) {
  const TensorInfo& t = *p.tensor;
  const int64_t elem_bytes = Info(t.type).block_bytes;
  const int64_t n = p.extent->shape.cols;
  const int64_t first = p.extent->row_begin * t.cols() + p.extent->col_begin;
  staging.resize(n * elem_bytes);
  SHOAL_RETURN_IF_ERROR(checkpoint.Read(t, first * elem_bytes, n * elem_bytes, staging.data()));
  DequantizeRow(t.type, staging.data(), reinterpret_cast<float*>(p.out), n);
  return absl::OkStatus();
}

absl::Status LoadPanels(const Checkpoint& checkpoint, const Piece& p, Staging& staging) {
  const PackedShape& shape = p.extent->shape;
  const RowGeometry g(*p.extent, *p.tensor);
  const int64_t row_begin = p.panel_begin * kPanelRows;
  const int64_t rows = std::min(shape.rows, p.panel_end * kPanelRows) - row_begin;
  const Extent span = SourceSpan(p);
  const int64_t staged = g.staged_stride();
  if (g.read_through()) {
    staging.resize(span.size());
    SHOAL_RETURN_IF_ERROR(checkpoint.Read(*p.tensor, span.begin, span.size(), staging.data()));
  } else {
    staging.resize(rows * staged);
    for (int64_t r = 0; r < rows; ++r) {
      SHOAL_RETURN_IF_ERROR(checkpoint.Read(*p.tensor, span.begin + r * g.stride, g.slice.bytes,
                                            staging.data() + r * staged));
    }
  }
  uint8_t* out = p.out;
  for (int64_t panel_row = 0; panel_row < rows; panel_row += kPanelRows) {
    const uint8_t* src[kPanelRows];
    for (int64_t i = 0; i < kPanelRows; ++i) {
      const int64_t r = panel_row + i;
      src[i] = r < rows ? staging.data() + r * staged : nullptr;
    }
    PackPanel(shape, src, out);
    out += shape.panel_bytes();
  }
  return absl::OkStatus();
}

absl::Status LoadPiece(const Checkpoint& checkpoint, const Piece& p, Staging& staging) {
  return p.extent->is_vector() ? LoadVector(checkpoint, p, staging)
                               : LoadPanels(checkpoint, p, staging);
}

absl::Status AppendPieces(const Checkpoint& checkpoint, const WeightUnit& unit, uint8_t* out,
                          std::vector<Piece>& pieces) {
  int64_t end = 0;
  for (const WeightExtent& e : unit.extents) {
    const TensorInfo* t = checkpoint.FindTensor(e.tensor);
    if (t == nullptr) {
      return absl::InternalError(absl::StrCat("the layout names tensor '", e.tensor,
                                              "', which the checkpoint does not have"));
    }
    std::memset(out + end, 0, e.offset - end);
    end = e.offset + e.bytes;
    if (e.is_vector()) {
      pieces.push_back({&e, t, 0, 0, out + e.offset, e.bytes});
      continue;
    }
    const int64_t panel_source = RowGeometry(e, *t).staged_stride() * kPanelRows;
    const int64_t step = std::max<int64_t>(1, kPieceBytes / panel_source);
    const int64_t panel_bytes = e.shape.panel_bytes();
    for (int64_t panel = 0; panel < e.shape.panels(); panel += step) {
      const int64_t panel_end = std::min(e.shape.panels(), panel + step);
      pieces.push_back({&e, t, panel, panel_end, out + e.offset + panel * panel_bytes,
                        (panel_end - panel) * panel_bytes});
    }
  }
  return absl::OkStatus();
}

void HintPiece(const Checkpoint& checkpoint, const Piece& p) {
  if (p.extent->is_vector() || !RowGeometry(*p.extent, *p.tensor).read_through()) return;
  const Extent span = SourceSpan(p);
  checkpoint.WillNeed(*p.tensor, span.begin, span.size());
}

// Threads take pieces in order; the disk is told of pieces that come soon.
class ParallelLoad {
 public:
  ParallelLoad(const Checkpoint& checkpoint, std::vector<Piece> pieces,
               const std::function<void(int64_t, int64_t)>& progress)
      : checkpoint_(checkpoint), pieces_(std::move(pieces)), progress_(progress) {
    for (const Piece& p : pieces_) total_ += p.out_bytes;
  }

  absl::Status Run(int threads) {
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back([this] { Work(); });
    Work();
    for (std::thread& t : others) t.join();
    MutexLock lock(&mutex_);
    return status_;
  }

 private:
  void Work() {
    Staging staging;
    for (size_t i = next_.fetch_add(1); i < pieces_.size(); i = next_.fetch_add(1)) {
      if (i + kAhead < pieces_.size()) HintPiece(checkpoint_, pieces_[i + kAhead]);
      const absl::Status s = LoadPiece(checkpoint_, pieces_[i], staging);
      MutexLock lock(&mutex_);
      if (!s.ok()) {
        status_.Update(s);
        next_.store(pieces_.size());
        return;
      }
      done_ += pieces_[i].out_bytes;
      if (progress_) progress_(done_, total_);
    }
  }

  static constexpr size_t kAhead = 8;  // pieces whose reading has been asked for

  const Checkpoint& checkpoint_;
  const std::vector<Piece> pieces_;
  const std::function<void(int64_t, int64_t)>& progress_;
  std::atomic<size_t> next_ = 0;
  int64_t total_ = 0;
  Mutex mutex_;
  int64_t done_ ABSL_GUARDED_BY(mutex_) = 0;
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace

absl::Status LoadUnit(const Checkpoint& checkpoint, const WeightUnit& unit, uint8_t* out) {
  std::vector<Piece> pieces;
  SHOAL_RETURN_IF_ERROR(AppendPieces(checkpoint, unit, out, pieces));
  return ParallelLoad(checkpoint, std::move(pieces), nullptr).Run(1);
}

absl::Status LoadAll(const Checkpoint& checkpoint, const WeightLayout& layout, int threads,
                     uint8_t* out, const std::function<void(int64_t, int64_t)>& progress) {
  std::vector<Piece> pieces;
  int64_t end = 0;
  for (const WeightUnit& unit : layout.units) {
    std::memset(out + end, 0, unit.offset - end);
    end = unit.offset + unit.bytes;
    SHOAL_RETURN_IF_ERROR(AppendPieces(checkpoint, unit, out + unit.offset, pieces));
  }
  std::memset(out + end, 0, layout.bytes - end);
  return ParallelLoad(checkpoint, std::move(pieces), progress).Run(threads);
}

}  // namespace shoal
