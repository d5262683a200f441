// The memory that the kernels of a GPU work in, counted without one: `shoal plan` asks for GPUs
// that are elsewhere. Part of every build, no CUDA here or in workspace.cc.
#pragma once

#include <cstdint>

#include "kernels/backend.h"

namespace shoal::cuda {

// Device bytes that CudaBackend::Reserve takes. gemm: cuBLAS multiplies long prompts, as on sm_90
// and up where it is found. Pure.
int64_t WorkspaceBytes(const Backend::Limits& limits, bool gemm);

// Its parts.

// Rows from which unpacking the weights costs less than a library's product gains. Its rows share
// one scale: a row keeps the precision of f16 while it is not 2^20 smaller than the largest.
inline constexpr int kGemmRows = 256;
// Weights that are unpacked at once for it: what a large L2 cache holds.
inline constexpr int64_t kUnpackedBytes = int64_t{64} << 20;
inline constexpr int kExpertRows = 1024;  // rows whose experts run together
inline constexpr int kExpertsMax = 4096;

inline int64_t AlignWorkspace(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// Where things of linear layers and experts lie, in bytes; strides in elements.
struct LinearWorkspace {
  // unpacked_bytes: 0 without a library's product.
  LinearWorkspace(const Backend::Limits& limits, int64_t unpacked_bytes);
  int64_t slots, groups, expert_stride, out_stride;
  int64_t operand, grouping, group_count, sorted, pointers, gate, up, down, unpacked, bytes;
};

// Splits of decode rows whose partial results are held at once; more run in several passes.
int64_t PartialItems(const Backend::Limits& limits);
// Partial results of `items` splits of decode rows, aligned to 16; those of prompts share it.
int64_t AttentionWorkspaceBytes(int q_heads, int head_dim, int items);
// Floats between them.
inline int PartialStride(int head_dim) { return (head_dim + 3) / 4 * 4; }

inline constexpr int kLogitChunk = 4096;  // logits that one block reduces
inline constexpr int kMaxLogitCandidates = 1024;
inline int LogitChunks(int vocab) { return (vocab + kLogitChunk - 1) / kLogitChunk; }
// Candidates that a chunk keeps: a power of 2, as the sorting network has it.
int LogitsKept(int candidates);
struct LogitChunkSum {
  float largest;  // of scale * logit
  float sum;      // of exp(scale * logit - largest)
};
int64_t LogitWorkspaceBytes(int rows, int vocab, int candidates);
// What Backend::ReduceLogits brings back: summaries, candidates.
int64_t ReducedLogitBytes(int rows, int candidates);
// That of a whole batch, and the workspace behind it.
int64_t MostReducedLogitBytes(const Backend::Limits& limits);

}  // namespace shoal::cuda
