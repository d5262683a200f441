#include "kernels/cpu/kv_store.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "kernels/check.h"
#include "kernels/cpu/segments.h"
#include "kernels/dtype.h"
#include "kernels/kv_layout.h"

namespace shoal {
namespace {

constexpr int64_t kSerialFloats = 32768;  // less work than this costs less than waking the team

// The norm of one head in place; `weights` are those of head 0. row_factor: of kRowRms.
void NormHead(float* x, const QkvArgs& args, const float* weights, int head, float row_factor,
              int dims) {
  if (!NormsHeadsAlike(args.norm)) weights += int64_t{head} * dims;
  double mean = 0, squares = 0;
  if (args.norm == QkNorm::kHeadLayer) {
    for (int d = 0; d < dims; ++d) mean += x[d];
    mean /= dims;
  }
  float factor = row_factor;
  if (args.norm != QkNorm::kRowRms) {
    for (int d = 0; d < dims; ++d) squares += (x[d] - mean) * (x[d] - mean);
    factor = static_cast<float>(1 / std::sqrt(squares / dims + args.eps));
  }
  const float middle = static_cast<float>(mean);
  for (int d = 0; d < dims; ++d) x[d] = (x[d] - middle) * factor * weights[d];
}

// x / rms(x), over one head.
void PlainNorm(float* x, float eps, int dims) {
  double squares = 0;
  for (int d = 0; d < dims; ++d) squares += static_cast<double>(x[d]) * x[d];
  const float factor = static_cast<float>(1 / std::sqrt(squares / dims + eps));
  for (int d = 0; d < dims; ++d) x[d] *= factor;
}

// Of q (part 0) or k (part 1) of a row.
float RowFactor(const QkvArgs& args, int64_t row, int part, int cols) {
  if (args.norm != QkNorm::kRowRms) return 0;
  return 1 / std::sqrt(args.squares[2 * row + part] / static_cast<float>(cols) + args.eps);
}

// Rotates one head in place for a position; dims beyond rotary_dim stay.
void RotateHead(float* x, const RopeTable& rope, int pos) {
  const int half = rope.rotary_dim / 2;
  const float* cos = rope.cos + static_cast<int64_t>(pos) * half;
  const float* sin = rope.sin + static_cast<int64_t>(pos) * half;
  if (rope.neox) {
    for (int i = 0; i < half; ++i) {
      const float a = x[i], b = x[i + half];
      x[i] = a * cos[i] - b * sin[i];
      x[i + half] = b * cos[i] + a * sin[i];
    }
  } else {
    for (int i = 0; i < half; ++i) {
      const float a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = a * cos[i] - b * sin[i];
      x[2 * i + 1] = b * cos[i] + a * sin[i];
    }
  }
}

// As QuantizeRow for Q8_0, for one part: the scale is the largest magnitude / 127, stored as half.
uint16_t QuantizePart(const float* x, int8_t* out, int n) {
  float largest = 0;
  for (int i = 0; i < n; ++i) largest = std::max(largest, std::fabs(x[i]));
  const float d = largest / 127;
  const float inverse = d > 0 ? 1 / d : 0;
  for (int i = 0; i < n; ++i) out[i] = static_cast<int8_t>(std::lrint(x[i] * inverse));
  return FloatToHalf(d);
}

// One token of one head goes to lane `token` of K (stride 16) or to row `token` of V (contiguous).
template <typename T>
void Place(const T* x, int dims, int token, bool is_k, uint8_t* base) {
  T* out = reinterpret_cast<T*>(base);
  if (is_k) {
    for (int d = 0; d < dims; ++d) out[d * kKvBlockTokens + token] = x[d];
  } else {
    std::memcpy(out + token * dims, x, dims * sizeof(T));
  }
}

}  // namespace

struct KvStore::Token {
  int64_t row;  // in the batch
  int pos;
  int block;
};

void KvStore::WriteHead(const Token& token, const float* x, int head, bool is_k,
                        const KvLayer& kv) const {
  const int dims = kv.shape.head_dim;
  const int lane = token.pos % kKvBlockTokens;
  uint8_t* out = is_k ? KvBlockK(kv, token.block, head) : KvBlockV(kv, token.block, head);
  switch (kv.shape.type) {
    case KvType::kF32:
      Place(x, dims, lane, is_k, out);
      return;
    case KvType::kF16: {
      uint16_t half[kMaxHeadDim];
      to_half_(x, half, dims);
      Place(half, dims, lane, is_k, out);
      return;
    }
    case KvType::kQ8_0: {
      int8_t ints[kMaxHeadDim];
      uint16_t* scales = reinterpret_cast<uint16_t*>(out);
      const int parts = KvParts(dims);
      for (int p = 0; p < parts; ++p) {
        const int begin = p * kKvPartDims;
        const int n = std::min(kKvPartDims, dims - begin);
        scales[p * kKvBlockTokens + lane] = QuantizePart(x + begin, ints + begin, n);
      }
      Place(ints, dims, lane, is_k, out + 2 * kKvBlockTokens * parts);
      return;
    }
  }
}

void KvStore::WriteToken(const QkvArgs& args, const AttentionShape& shape, const KvLayer& kv,
                         const Token& token) const {
  const int dims = shape.head_dim;
  const int64_t offset = token.row * args.stride;
  const bool behind = args.norm == QkNorm::kHeadRmsBehind;
  const float q_factor = RowFactor(args, token.row, 0, args.q_cols);
  const float k_factor = RowFactor(args, token.row, 1, args.k_cols);
  for (int head = 0; head < shape.q_heads; ++head) {
    float* q = args.q + offset + int64_t{head} * dims;
    if (args.q_norm != nullptr && !behind) NormHead(q, args, args.q_norm, head, q_factor, dims);
    if (args.rope != nullptr) RotateHead(q, *args.rope, token.pos);
    if (args.q_norm != nullptr && behind) NormHead(q, args, args.q_norm, head, q_factor, dims);
    if (args.norm == QkNorm::kPlain) PlainNorm(q, args.eps, dims);
    if (args.q_scale != nullptr) {
      for (int d = 0; d < dims; ++d) q[d] *= args.q_scale[token.pos];
    }
  }
  for (int head = 0; head < kv.shape.kv_heads; ++head) {
    float* k = args.k + offset + int64_t{head} * dims;
    if (args.k_norm != nullptr && !behind) NormHead(k, args, args.k_norm, head, k_factor, dims);
    if (args.rope != nullptr) RotateHead(k, *args.rope, token.pos);
    if (args.k_norm != nullptr && behind) NormHead(k, args, args.k_norm, head, k_factor, dims);
    if (args.norm == QkNorm::kPlain) PlainNorm(k, args.eps, dims);
    WriteHead(token, k, head, /*is_k=*/true, kv);
    WriteHead(token, args.v + offset + int64_t{head} * dims, head, /*is_k=*/false, kv);
  }
}

void KvStore::Write(const QkvArgs& args, const AttentionShape& shape, const KvLayer& kv,
                    absl::Span<const Segment> segments) {
  int64_t rows = 0;
  for (const Segment& s : segments) {
    rows += s.rows;
    if (args.rope == nullptr) continue;
    SHOAL_CHECK(s.pos + s.rows <= args.rope->positions, "a position is beyond the rope table");
    SHOAL_CHECK(args.rope->rotary_dim >= 0 && args.rope->rotary_dim <= shape.head_dim &&
                    args.rope->rotary_dim % 2 == 0,
                "rotary_dim is odd or larger than head_dim");
  }
  // Work goes by KV block of a sequence, so that no two threads write one block.
  const auto write_blocks = [&](int thread, int threads) {
    int64_t index = 0;
    for (const Segment& s : segments) {
      for (int begin = s.pos; begin < s.pos + s.rows;) {
        const int end = std::min(s.pos + s.rows, (begin / kKvBlockTokens + 1) * kKvBlockTokens);
        const int32_t block = s.blocks[begin / kKvBlockTokens];
        SHOAL_CHECK(block >= 0, "a position to write has no KV block");
        if (index++ % threads == thread) {
          for (int pos = begin; pos < end; ++pos) {
            WriteToken(args, shape, kv, Token{s.row + pos - s.pos, pos, block});
          }
        }
        begin = end;
      }
    }
  };
  if (rows * (shape.q_heads + 2 * kv.shape.kv_heads) * shape.head_dim < kSerialFloats) {
    write_blocks(0, 1);
  } else {
    pool_->Run([&](int thread) { write_blocks(thread, pool_->threads()); });
  }
}

}  // namespace shoal
