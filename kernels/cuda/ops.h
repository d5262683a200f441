// What the CUDA backend calls: each function enqueues kernels on a stream and returns. Plain C++,
// so the backend needs no CUDA compiler. Every pointer is device memory unless said otherwise;
// matrices are row-major with the stride given in elements.
//
// Errors of a launch are left for cudaGetLastError().
#pragma once

#include <cstdint>

#include "kernels/cuda/attention_ops.h"
#include "kernels/cuda/linear_ops.h"
#include "kernels/cuda/row_ops.h"

struct CUstream_st;

namespace shoal::cuda {

using Stream = CUstream_st*;

}  // namespace shoal::cuda
