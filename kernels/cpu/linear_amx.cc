// Prefill products with AMX bf16 tiles.
//
// A group of up to 16 panels is unpacked, 256 columns at a time, to tiles of 16 rows x 32 columns
// in L2; 32 activation rows of those columns (16 KiB, in L1) then meet all of the panels, so that
// per 4 tile products one pair of tiles comes from L1 and one from L2. Blocks of 512 columns fill
// L1 and are a fifth slower.
#include <immintrin.h>

#include "kernels/cpu/linear_kernels.h"
#include "kernels/row_planes.h"

namespace shoal {
namespace {

#include "kernels/cpu/linear_isa_avx512.h"

#include "kernels/cpu/linear_formats.h"

#include "kernels/cpu/linear_activation.h"

constexpr int kTileBytes = 1024;
constexpr int kBlockSubs = kBf16BlockCols / 32;

// Codes become floats without a conversion: byte c above the mantissa bits of 2^15 reads 32768 + c.
// Taking the 32768 away inside the multiply-add costs an error of 2^-9 of a quantization step.
constexpr float kMagic = 32768;
// bf16 by truncation, after a stretch that centres the error: a truncated mantissa loses half a
// unit on average, 2^-8 of a value with mantissa 1, 2^-9 of one just under 2.
constexpr float kStretch = 1 + 0x1.7p-9f;

// Two lines of a B tile from one line of codes: columns (0, 1) and (2, 3) of a group of four.
inline __attribute__((always_inline)) void StoreGroup(I codes, F scale, F bias, uint8_t* out) {
  const I mask = _mm512_set1_epi32(0xff00), magic = _mm512_set1_epi32(0x47000000);
  const auto value = [&](I x) {
    // (x & mask) | magic
    return _mm512_fmadd_ps(Isa::AsFloat(_mm512_ternarylogic_epi32(x, mask, magic, 0xea)), scale,
                           bias);
  };
  const F v0 = value(_mm512_slli_epi32(codes, 8)), v1 = value(codes);
  const F v2 = value(_mm512_srli_epi32(codes, 8)), v3 = value(_mm512_srli_epi32(codes, 16));
  const I high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const auto pair = [&](F even, F odd) {
    // (odd & high) | (even >> 16)
    return _mm512_ternarylogic_epi32(_mm512_castps_si512(odd), high,
                                     _mm512_srli_epi32(_mm512_castps_si512(even), 16), 0xea);
  };
  _mm512_store_si512(out, pair(v0, v1));
  _mm512_store_si512(out + 64, pair(v2, v3));
}

// Sub-blocks [begin, begin + count) of a panel become `count` tiles.
template <class Fmt>
void Unpack(const PackedShape& shape, const uint8_t* panel, int64_t begin, int count,
            uint8_t* out) {
  constexpr float kOffset = Fmt::kShift > 0 ? static_cast<float>(1 << Fmt::kShift) : 0.0f;
  const int lead = Fmt::kSubs > 1 ? shape.lead : 0;
  int64_t block = (lead + begin) / Fmt::kSubs;
  int s = static_cast<int>((lead + begin) % Fmt::kSubs);
  // Where the block's header stands: behind all earlier headers and sub-blocks.
  const int64_t earlier = block * Fmt::kSubs > lead ? block * Fmt::kSubs - lead : 0;
  const uint8_t* header = panel + block * Fmt::kHeaderBytes + earlier * Fmt::kSubBytes;
  const uint8_t* p = panel + (block + 1) * Fmt::kHeaderBytes + begin * Fmt::kSubBytes;
  typename Fmt::Head head;
  Fmt::Header(header, &head);
  for (int i = 0; i < count; ++i, ++s) {
    if (s == Fmt::kSubs) {
      Fmt::Header(p, &head);
      p += Fmt::kHeaderBytes;
      s = 0;
    }
    for (int line = 0; line < Fmt::kSubBytes; line += 64) __builtin_prefetch(p + 2048 + line);
    Sub sub;
    LoadSub<Fmt>(head, p, s, 0, &sub);
    p += Fmt::kSubBytes;
    for (int half = 0; half < 2; ++half) {
      const int from = Fmt::kScales == 2 ? half : 0;
      const F scale = _mm512_mul_ps(sub.scale[from], _mm512_set1_ps(kStretch));
      F bias = _mm512_mul_ps(scale, _mm512_set1_ps(-(kMagic + kOffset)));
      if constexpr (Fmt::kBias)
        bias = _mm512_fmadd_ps(sub.bias[from], _mm512_set1_ps(kStretch), bias);
      for (int g = 4 * half; g < 4 * half + 4; ++g)
        StoreGroup(sub.line[g], scale, bias, out + 128 * g);
    }
    out += kTileBytes;
  }
}

// A bf16 panel is made of tiles already; only the columns past the end need zeros.
void CopyBf16(const PackedShape& shape, const uint8_t* panel, int64_t begin, int count,
              uint8_t* out) {
  const int64_t lines = (shape.cols + 1) / 2;
  for (int64_t line = 16 * begin; line < 16 * (begin + count); ++line, out += 64) {
    _mm512_store_si512(
        out, line < lines ? _mm512_loadu_si512(panel + 64 * line) : _mm512_setzero_si512());
  }
}

using UnpackFn = void (*)(const PackedShape&, const uint8_t*, int64_t, int, uint8_t*);

UnpackFn UnpackerOf(DType type) {
  switch (type) {
    case DType::kQ4_0:
      return Unpack<FmtQ4_0>;
    case DType::kQ4_1:
      return Unpack<FmtQ4_1>;
    case DType::kQ5_0:
      return Unpack<FmtQ5_0>;
    case DType::kQ5_1:
      return Unpack<FmtQ5_1>;
    case DType::kQ8_0:
      return Unpack<FmtQ8_0>;
    case DType::kQ2_K:
      return Unpack<FmtQ2_K>;
    case DType::kQ3_K:
      return Unpack<FmtQ3_K>;
    case DType::kQ4_K:
      return Unpack<FmtQ4_K>;
    case DType::kQ5_K:
      return Unpack<FmtQ5_K>;
    case DType::kQ6_K:
      return Unpack<FmtQ6_K>;
    case DType::kIQ4_NL:
      return Unpack<FmtIQ4_NL>;
    case DType::kIQ4_XS:
      return Unpack<FmtIQ4_XS>;
    case DType::kMXFP4:
      return Unpack<FmtMXFP4>;
    default:
      return CopyBf16;
  }
}

// Tiles 0..3: sums [2 x 16 rows][2 panels]; 4, 5: activations; 6, 7: weights. All are 16 rows of 64
// bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);
// Static, as the intrinsic tells the compiler of its first bytes only.
constexpr TileConfig kConfig;

// The tile intrinsics do not tell the compiler which memory they touch.
inline __attribute__((always_inline)) void Fence() { __asm__ volatile("" : : : "memory"); }

// Where a pair of tile rows and a pair of panels stand.
struct Operands {
  const uint16_t* a;  // [steps][.., 32 rows][32]
  int64_t a_step;     // bf16 elements between column blocks
  const uint8_t* b;   // tiles of the first panel; the second panel's follow kBlockSubs tiles later
  int steps;          // column blocks
  bool first;         // start at zero instead of at c
  float* c;           // 4 tiles: rows 0 to 15 of the two panels, then rows 16 to 31
  float* store;       // where the sums in the tiles, those of the call before, go; null: nowhere
  const uint8_t* ahead;  // what to fetch meanwhile: so many lines per step, a_step apart
  int ahead_lines;
};

// A macro, as the intrinsics want the tile's number as a literal.
#define SHOAL_NEXT_SUMS(tile)                                           \
  if (o.store != nullptr) _tile_stored(tile, o.store + 256 * tile, 64); \
  if (o.first) {                                                        \
    _tile_zero(tile);                                                   \
  } else {                                                              \
    _tile_loadd(tile, o.c + 256 * tile, 64);                            \
  }

// 32 rows x 2 panels; the sums stay in the tiles. Those of the call before are stored between the
// first products of this one: all at once the unit would stand still meanwhile. Weight tiles go
// past L1 (the stream load), where the activations live.
inline __attribute__((always_inline)) void Tiles2x2(const Operands& o) {
  const uint16_t* a = o.a;
  const uint8_t* b = o.b;
  const uint8_t* ahead = o.ahead;
  Fence();
  for (int s = 0; s < o.steps; ++s) {
    _tile_stream_loadd(6, b, 64);
    _tile_loadd(4, a, 64);
    if (s == 0) {
      SHOAL_NEXT_SUMS(0)
    }
    _tile_dpbf16ps(0, 4, 6);
    _tile_stream_loadd(7, b + kBlockSubs * kTileBytes, 64);
    if (s == 0) {
      SHOAL_NEXT_SUMS(1)
    }
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + 16 * 32, 64);
    if (s == 0) {
      SHOAL_NEXT_SUMS(2)
    }
    _tile_dpbf16ps(2, 5, 6);
    if (s == 0) {
      SHOAL_NEXT_SUMS(3)
    }
    _tile_dpbf16ps(3, 5, 7);
    for (int i = 0; i < o.ahead_lines; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(ahead + 64 * i), _MM_HINT_T1);
    }
    // The sums of the next pair of panels, which follow these.
    for (int i = 0; i < 64; i += kBlockSubs) {
      _mm_prefetch(reinterpret_cast<const char*>(o.c + 1024 + 16 * (i + s)), _MM_HINT_T0);
    }
    ahead += 2 * o.a_step;
    a += o.a_step;
    b += kTileBytes;
  }
  Fence();
}
#undef SHOAL_NEXT_SUMS

void StoreSums(float* c) {
  Fence();
  _tile_stored(0, c, 64);
  _tile_stored(1, c + 256, 64);
  _tile_stored(2, c + 512, 64);
  _tile_stored(3, c + 768, 64);
  Fence();
}

// Rows [row, row + 32) of two panels from column `col` on, out of 2 x 2 tiles.
void StoreRows(const float* c, int64_t row, int64_t rows, int64_t col, const Bf16Result& r) {
  const auto lanes = [&](int64_t begin) {
    const int64_t n = r.cols - begin;
    return static_cast<__mmask16>(n >= 16 ? 0xffff : n <= 0 ? 0 : (1 << n) - 1);
  };
  const __mmask16 mask[2] = {lanes(col), lanes(col + 16)};
  F bias[2] = {};
  if (r.bias != nullptr) {
    for (int p = 0; p < 2; ++p) bias[p] = _mm512_maskz_loadu_ps(mask[p], r.bias + col + 16 * p);
  }
  const int64_t held = rows - row < 32 ? rows - row : 32;
  for (int64_t i = 0; i < held; ++i) {
    float* out = r.out + (r.row != nullptr ? r.row[row + i] : row + i) * r.stride + col;
    const F scale = _mm512_set1_ps(r.scale != nullptr ? r.scale[row + i] : 1.0f);
    for (int p = 0; p < 2; ++p) {
      F v = _mm512_load_ps(c + i / 16 * 512 + 256 * p + i % 16 * 16);
      if (r.bias != nullptr) v = _mm512_add_ps(v, bias[p]);
      if (r.scale != nullptr) v = _mm512_mul_ps(v, scale);
      if (r.accumulate) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask[p], out + 16 * p));
      _mm512_mask_storeu_ps(out + 16 * p, mask[p], v);
    }
  }
}

// Rows [row, row + 32) of a panel of gate and one of up, out of 2 x 2 tiles, become the 16 columns
// from `col` on of the operand.
template <Activation kActivation>
void StoreGated(const float* c, int64_t row, int64_t rows, int64_t col, const Bf16Gated& r) {
  const int64_t left = r.cols - col;
  const __mmask16 mask = left >= 16 ? 0xffff : static_cast<__mmask16>((1 << left) - 1);
  F bias[2] = {};
  if (r.gate_bias != nullptr) bias[0] = _mm512_maskz_loadu_ps(mask, r.gate_bias + col);
  if (r.up_bias != nullptr) bias[1] = _mm512_maskz_loadu_ps(mask, r.up_bias + col);
  uint16_t* out = r.out + (col / 32 * r.row_stride + row) * 32 + col % 32;
  const bool ends_in_block = left <= 16 && col % 32 == 0;
  const int64_t held = rows - row < 32 ? rows - row : 32;
  for (int64_t i = 0; i < held; ++i, out += 32) {
    const float* tiles = c + i / 16 * 512 + i % 16 * 16;
    const F gate = _mm512_add_ps(_mm512_load_ps(tiles), bias[0]);
    const F up = _mm512_add_ps(_mm512_load_ps(tiles + 256), bias[1]);
    const F v = _mm512_maskz_mov_ps(mask, GatedOf<kActivation>(gate, up));
    _mm256_store_si256(reinterpret_cast<__m256i*>(out), (__m256i)_mm512_cvtneps_pbh(v));
    if (ends_in_block) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(out + 16), _mm256_setzero_si256());
    }
  }
}

// `panels` panels of subs column blocks times m rows. unpack(panel, begin, steps, out) makes tiles,
// store(c, row, pair) takes the sums of rows [row, row + 32) and the pair of panels.
template <class UnpackPanel, class Store>
inline __attribute__((always_inline)) void Products(int64_t subs, int panels, const Bf16Operand& a,
                                                    int m, uint8_t* scratch, float* sums,
                                                    const UnpackPanel& unpack, const Store& store) {
  _tile_loadconfig(&kConfig);
  const int64_t a_step = a.row_stride * 32;
  const int pairs = (panels + 1) / 2;
  const int ahead_lines = (32 + pairs - 1) / pairs;  // 32 rows of a column block are 32 lines
  // A panel of zeros beside the last of an odd number.
  for (int i = panels; i < 2 * pairs; ++i) {
    for (int line = 0; line < kBlockSubs * kTileBytes; line += 64) {
      _mm512_store_si512(scratch + i * kBlockSubs * kTileBytes + line, _mm512_setzero_si512());
    }
  }
  for (int64_t begin = 0; begin < subs; begin += kBlockSubs) {
    const int steps = static_cast<int>(subs - begin < kBlockSubs ? subs - begin : kBlockSubs);
    const bool last = begin + steps == subs;
    for (int p = 0; p < panels; ++p) {
      unpack(p, begin, steps, scratch + p * kBlockSubs * kTileBytes);
    }
    float* c = sums;
    float* held = nullptr;  // the sums that are still in the tiles
    int held_row = 0, held_pair = 0;
    for (int row = 0; row < m; row += 32) {
      const uint16_t* rows = a.data + begin * a_step + row * 32;
      for (int pair = 0; pair < pairs; ++pair, c += 1024) {
        // The pairs of panels share the next 32 rows among them.
        const uint8_t* ahead =
            reinterpret_cast<const uint8_t*>(rows + 32 * 32) + pair * 64 * ahead_lines;
        const uint8_t* b = scratch + 2 * pair * kBlockSubs * kTileBytes;
        Tiles2x2({rows, a_step, b, steps, begin == 0, c, held, ahead, ahead_lines});
        if (last && held != nullptr) store(held, held_row, held_pair);
        held = c;
        held_row = row;
        held_pair = pair;
      }
    }
    StoreSums(held);
    if (last) store(held, held_row, held_pair);
  }
  _tile_release();
}

void Bf16Panels(const PackedShape& shape, const uint8_t* panels_data, int panels,
                const Bf16Operand& a, int m, uint8_t* scratch, float* sums,
                const Bf16Result& result) {
  const UnpackFn unpack = UnpackerOf(shape.type);
  const int64_t bytes = shape.panel_bytes();
  Products((shape.cols + 31) / 32, panels, a, m, scratch, sums,
           [&](int p, int64_t begin, int steps, uint8_t* out) {
             unpack(shape, panels_data + p * bytes, begin, steps, out);
           },
           [&](const float* c, int row, int pair) { StoreRows(c, row, m, 32 * pair, result); });
}

void Bf16GatedPanels(const Bf16Matrix& gate, const Bf16Matrix& up, int panels, const Bf16Operand& a,
                     int m, uint8_t* scratch, float* sums, const Bf16Gated& result) {
  const UnpackFn unpack[2] = {UnpackerOf(gate.shape.type), UnpackerOf(up.shape.type)};
  const Bf16Matrix* matrix[2] = {&gate, &up};
  const int64_t bytes[2] = {gate.shape.panel_bytes(), up.shape.panel_bytes()};
  constexpr decltype(&StoreGated<Activation::kSwiGlu>) kStores[kNumActivations] = {
      StoreGated<Activation::kSwiGlu>, StoreGated<Activation::kClampedSwiGlu>,
      StoreGated<Activation::kGeGlu>};
  const auto store = kStores[static_cast<int>(result.activation)];
  Products((gate.shape.cols + 31) / 32, 2 * panels, a, m, scratch, sums,
           [&](int p, int64_t begin, int steps, uint8_t* out) {
             const int which = p % 2;
             unpack[which](matrix[which]->shape, matrix[which]->panels + p / 2 * bytes[which],
                           begin, steps, out);
           },
           [&](const float* c, int row, int pair) {
             store(c, row, m, result.begin + 16 * pair, result);
           });
}

int64_t Bf16Peak(int64_t loops) {
  _tile_loadconfig(&kConfig);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(6);
  for (int64_t i = 0; i < loops; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 6);
    _tile_dpbf16ps(2, 4, 6);
    _tile_dpbf16ps(3, 4, 6);
  }
  _tile_release();
  return loops * 4 * 16 * 16 * 32 * 2;
}

void ToBf16(const float* x, int64_t n, uint16_t* out) {
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m512bh v = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + i + 16), _mm512_loadu_ps(x + i));
    _mm512_storeu_si512(out + i, (__m512i)v);
  }
  if (i == n) return;
  alignas(64) float rest[32] = {};
  alignas(64) uint16_t converted[32];
  for (int64_t j = i; j < n; ++j) rest[j - i] = x[j];
  _mm512_store_si512(converted,
                     (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(rest + 16), _mm512_load_ps(rest)));
  for (int64_t j = i; j < n; ++j) out[j] = converted[j - i];
}

}  // namespace

void AddAmx(LinearKernels* table) {
  table->bf16 = Bf16Panels;
  table->bf16_gated = Bf16GatedPanels;
  table->to_bf16 = ToBf16;
  table->bf16_peak = Bf16Peak;
}

}  // namespace shoal
