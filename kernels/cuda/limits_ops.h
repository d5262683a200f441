// Kernels that measure the chip (limits.cu).
#pragma once

#include <cstdint>

struct CUstream_st;

namespace shoal::cuda {

using Stream = CUstream_st*;

// Reads [data, data + bytes), bytes a multiple of 16; writes to `sink` if all of it is one value.
void ReadOnly(const uint8_t* data, int64_t bytes, int multiprocessors, uint32_t* sink,
              Stream stream);
// mma.sync of f16 with f32 sums from registers, in `blocks` blocks. Returns the operations.
double MultiplyOnly(int blocks, int loops, uint32_t* sink, Stream stream);
void Nothing(Stream stream);
// Random f16 numbers in (-1, 1).
void FillHalves(uint16_t* data, int64_t count, uint32_t seed, Stream stream);

}  // namespace shoal::cuda
