#include "kernels/cuda/logits.cuh"

namespace shoal::cuda {
void ReduceLogits(const LogitArgs& args, LogitSummary* summaries, LogitCandidate* best,
                  Stream stream) {
  if (args.rows == 0) return;
  const int chunks = LogitChunks(args.vocab), keep = LogitsKept(args.candidates);
  LogitsParams params = {};
  params.logits = args.logits;
  params.stride = args.stride;
  params.vocab = args.vocab;
  params.first_token = args.first_token;
  params.requests = args.requests;
  params.keep = keep;
  params.candidates = args.candidates;
  params.chunk_keys = reinterpret_cast<uint64_t*>(args.workspace);
  params.chunk_sums = reinterpret_cast<LogitChunkSum*>(
      params.chunk_keys + static_cast<int64_t>(args.rows) * chunks * keep);
  params.summaries = summaries;
  params.out = best;
  Launch(ReduceChunk, dim3(chunks, args.rows), dim3(kChunkThreads),
         keep == 0 ? 0 : sizeof(uint64_t) * kLogitChunk, stream, params);
  Launch(MergeChunks, dim3(args.rows), dim3(kChunkThreads), sizeof(uint64_t) * keep, stream, params,
         chunks);
}

}  // namespace shoal::cuda
