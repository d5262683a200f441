// Wire formats of partial sums: float arrays encoded to f32, f16 or q8 and back.
//
//   f32  count * 4 bytes, little endian
//   f16  count * 2 bytes; magnitudes above 65504 become 65504, NaN stays
//   q8   blocks of 32 elements: f16 scale d (rounded up), then one int8 q for each element; x = d *
//   q.
//        The last block holds only the elements that are left. A block with an infinity or NaN
//        decodes to NaN.
//
// Error of one element: f16 |x| * 2^-11 + 2^-25; q8 d / 2 with d <= max|block| / 127 * (1 + 2^-10)
// + 2^-24. Decoding gives the same bits on every machine.
#pragma once

#include <cstdint>

#include "comm/communicator.h"

namespace shoal {

inline constexpr int64_t kWireBlock =
    32;  // encoded arrays may be cut at multiples of this many elements
inline constexpr int64_t kQ8BlockBytes = 2 + kWireBlock;

int64_t EncodedBytes(Wire wire, int64_t count);
void Encode(Wire wire, const float* in, int64_t count, uint8_t* out);
void Decode(Wire wire, const uint8_t* in, int64_t count, float* out);
// sum[i] += decoded in[i]
void DecodeAdd(Wire wire, const uint8_t* in, int64_t count, float* sum);
const char* WireName(Wire wire);

namespace wire_internal {

// One instruction set's conversions. Counts of the q8 functions are whole blocks.
struct Ops {
  void (*encode_f16)(const float* in, int64_t count, uint8_t* out);
  void (*decode_f16)(const uint8_t* in, int64_t count, float* out);
  void (*decode_add_f16)(const uint8_t* in, int64_t count, float* sum);
  void (*encode_q8)(const float* in, int64_t blocks, uint8_t* out);
  void (*decode_q8)(const uint8_t* in, int64_t blocks, float* out);
  void (*decode_add_q8)(const uint8_t* in, int64_t blocks, float* sum);
};
const Ops& ScalarOps();
const Ops* Avx2Ops();  // null where the build has no AVX2; the caller checks the CPU
const Ops& BestOps();  // the fastest that this CPU runs

}  // namespace wire_internal
}  // namespace shoal
