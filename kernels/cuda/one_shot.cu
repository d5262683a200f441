#include "kernels/cuda/one_shot.cuh"

#include "kernels/check.h"

namespace shoal::cuda {

void OneShotSum(const OneShotParams& params, CUstream_st* stream) {
  SHOAL_CHECK(params.count > 0 && params.count <= PeerSums::kMostNumbers, "a sum fits its slot");
  constexpr int kFloatsAtOnce = 4 * kOneShotThreads;
  const int passes = (params.count + kFloatsAtOnce - 1) / kFloatsAtOnce;
  const int blocks = passes < kOneShotBlocks ? passes : kOneShotBlocks;
  LaunchWaiting(OneShotKernel<kOneShotSlots>, dim3(blocks), dim3(kOneShotThreads), stream, params);
}

}  // namespace shoal::cuda
