// The stand-in must fail where a GPU would, or the kernels' tests mean nothing.
#include "simt/runner.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "kernels/cuda/launch.cuh"

namespace shoal::cuda {
namespace {

using testing::HasSubstr;

constexpr int kSeeds = 20;
constexpr unsigned kAll = 0xFFFFFFFFu;

// What the launch says, or "" when all is well.
template <typename... Args>
std::string ErrorOf(const Args&... args) {
  try {
    Launch(args...);
  } catch (const simt::Error& e) {
    return e.what();
  }
  return "";
}

__global__ void Reverse(const int* in, int* out, bool barrier) {
  auto* shared = reinterpret_cast<int*>(DynamicShared());
  const int i = threadIdx.x, n = blockDim.x, base = blockIdx.x * blockDim.x;
  shared[i] = in[base + i];
  if (barrier) __syncthreads();
  out[base + i] = shared[n - 1 - i];
}

int WrongSeeds(bool barrier) {
  std::vector<int> in(3 * 96);
  std::iota(in.begin(), in.end(), 0);
  int wrong = 0;
  for (int seed = 0; seed < kSeeds; ++seed) {
    simt::SetSeed(seed);
    std::vector<int> out(in.size()), expected(in.size());
    for (int i = 0; i < 3 * 96; ++i) expected[i] = i / 96 * 96 + 95 - i % 96;
    Launch(Reverse, 3, 96, 96 * sizeof(int), nullptr, in.data(), out.data(), barrier);
    wrong += out != expected;
  }
  return wrong;
}

TEST(Runner, AMissingBarrierShows) {
  EXPECT_EQ(WrongSeeds(true), 0);
  EXPECT_GT(WrongSeeds(false), 0);
}

__global__ void WarpReverse(int* out, bool barrier) {
  int* shared = StaticShared<int[64]>();
  const int i = threadIdx.x;
  shared[i] = i;
  if (barrier) __syncwarp();
  out[i] = shared[i ^ 31];
}

TEST(Runner, AMissingWarpBarrierShows) {
  for (const bool barrier : {true, false}) {
    int wrong = 0;
    for (int seed = 0; seed < kSeeds; ++seed) {
      simt::SetSeed(seed);
      std::vector<int> out(64);
      Launch(WarpReverse, 1, 64, 0, nullptr, out.data(), barrier);
      for (int i = 0; i < 64; ++i) wrong += out[i] != (i ^ 31);
    }
    EXPECT_EQ(wrong == 0, barrier) << wrong;
  }
}

__global__ void HalfAtTheBarrier() {
  if (threadIdx.x < 32) __syncthreads();
}
__global__ void TwoBarriers() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void LaneMissing() {
  if (threadIdx.x != 5) __shfl_xor_sync(kAll, 1, 1);
}
__global__ void NotInMask() { __shfl_sync(0xFFFF0000u, 1, 16); }
__global__ void ReadsOutsideOfMask(int* out) {
  if (threadIdx.x < 16) *out = __shfl_sync(0xFFFFu, 1, 20);
}

TEST(Runner, WhatWouldHangIsAnErrorThatNamesThreadsAndLines) {
  EXPECT_THAT(ErrorOf(HalfAtTheBarrier, 1, 64, 0, nullptr),
              testing::AllOf(HasSubstr("threads wait"), HasSubstr("runner_test.cc:"),
                             HasSubstr("from thread 32 on: returned")));
  EXPECT_THAT(ErrorOf(TwoBarriers, 1, 64, 0, nullptr), HasSubstr("different barriers"));
  EXPECT_THAT(ErrorOf(LaneMissing, 1, 32, 0, nullptr), HasSubstr("warp operation at"));
  EXPECT_THAT(ErrorOf(LaneMissing, 1, 16, 0, nullptr), testing::Not(""));
  EXPECT_THAT(ErrorOf(NotInMask, 1, 32, 0, nullptr), HasSubstr("leaves it out"));
  int out;
  EXPECT_THAT(ErrorOf(ReadsOutsideOfMask, 1, 32, 0, nullptr, &out), HasSubstr("leaves out"));
  EXPECT_THAT(ErrorOf(HalfAtTheBarrier, 1, 2048, 0, nullptr), HasSubstr("no GPU accepts"));
  EXPECT_EQ(ErrorOf(HalfAtTheBarrier, 1, 32, 0, nullptr), "") << "an error must not stick";
}

__global__ void ReadUninitialised(float* out) {
  out[0] = StaticShared<float>();
  out[1] = reinterpret_cast<float*>(DynamicShared())[3];
  StaticShared<float>() = 1;
  reinterpret_cast<float*>(DynamicShared())[3] = 1;
}

TEST(Runner, UninitialisedSharedMemoryShows) {
  float out[2] = {};
  Launch(ReadUninitialised, 4, 1, 16, nullptr, &out[0]);
  EXPECT_TRUE(std::isnan(out[0]));
  EXPECT_TRUE(std::isnan(out[1]));
}

__global__ void CopyThrough(const uint4* in, uint4* out, bool wait) {
  auto* shared = StaticShared<uint4[32]>();
  CpAsync16(&shared[threadIdx.x], &in[threadIdx.x], threadIdx.x < 30);
  CpAsyncCommit();
  if (wait) CpAsyncWait<0>();
  __syncwarp();
  out[threadIdx.x] = shared[threadIdx.x ^ 1];
}

TEST(Runner, ACopyIsThereOnlyAfterTheWait) {
  std::vector<uint4> in(32), out(32);
  for (unsigned i = 0; i < 32; ++i) in[i] = {i, i, i, 7};
  Launch(CopyThrough, 1, 32, 0, nullptr, in.data(), out.data(), true);
  EXPECT_EQ(out[4].x, 5u);
  EXPECT_EQ(out[28].w, 7u);
  EXPECT_EQ(out[31].w, 0u) << "not valid: zeros";
  Launch(CopyThrough, 1, 32, 0, nullptr, in.data(), out.data(), false);
  EXPECT_EQ(out[4].x, 0xFFFFFFFFu);
}

__global__ void WarpOperations(int* out) {
  const int lane = threadIdx.x % 32;
  int* o = out + 8 * threadIdx.x;
  o[0] = __shfl_sync(kAll, lane, 3);
  o[1] = __shfl_xor_sync(kAll, lane, 16);
  o[2] = __shfl_down_sync(kAll, lane, 2);
  o[3] = __shfl_up_sync(kAll, lane, 1, 8);
  o[4] = static_cast<int>(__ballot_sync(kAll, lane % 2));
  o[5] = __shfl_sync(kAll, lane, 1, 4);
  o[6] = __any_sync(kAll, lane == 9) + 2 * __all_sync(kAll, lane < 31);
  if (lane < 16) o[7] = __shfl_xor_sync(0xFFFFu, lane, 1);
}

TEST(Runner, WarpOperations) {
  for (int seed = 0; seed < kSeeds; ++seed) {
    simt::SetSeed(seed);
    std::vector<int> out(8 * 64);
    Launch(WarpOperations, 1, 64, 0, nullptr, out.data());
    for (int i = 0; i < 64; ++i) {
      const int lane = i % 32, *o = &out[8 * i];
      ASSERT_EQ(o[0], 3);
      ASSERT_EQ(o[1], lane ^ 16);
      ASSERT_EQ(o[2], lane < 30 ? lane + 2 : lane);
      ASSERT_EQ(o[3], lane % 8 == 0 ? lane : lane - 1);
      ASSERT_EQ(o[4], static_cast<int>(0xAAAAAAAAu));
      ASSERT_EQ(o[5], lane / 4 * 4 + 1);
      ASSERT_EQ(o[6], 1);
      ASSERT_EQ(o[7], lane < 16 ? lane ^ 1 : 0);
    }
  }
}

// a [16, depth], b [8, depth] and c [16, 8] in memory; fragments by the PTX manual's formulas.
template <typename T>
uint32_t Pack(const T* p, int n) {
  uint32_t v = 0;
  std::memcpy(&v, p, n * sizeof(T));
  return v;
}

__global__ void MmaHalf(const uint16_t* a, const uint16_t* b, float* c, bool bf16) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const uint32_t fa[4] = {Pack(&a[g * 16 + 2 * t], 2), Pack(&a[(g + 8) * 16 + 2 * t], 2),
                          Pack(&a[g * 16 + 2 * t + 8], 2), Pack(&a[(g + 8) * 16 + 2 * t + 8], 2)};
  const uint32_t fb[2] = {Pack(&b[g * 16 + 2 * t], 2), Pack(&b[g * 16 + 2 * t + 8], 2)};
  float fc[4];
  for (int i = 0; i < 4; ++i) fc[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  if (bf16) {
    MmaBf16(fc, fa, fb);
  } else {
    MmaF16(fc, fa, fb);
  }
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = fc[i];
}

TEST(Runner, MmaOfHalvesIsThePlainProduct) {
  std::mt19937 rng(1);
  for (const bool bf16 : {false, true}) {
    uint16_t a[16][16], b[8][16];
    float c[16][8], expected[16][8], fa[16][16], fb[8][16];
    const auto fill = [&](uint16_t& bits, float& value) {
      value = static_cast<float>(static_cast<int>(rng() % 17) - 8);
      bits = bf16 ? FloatToBFloat16(value) : FloatToHalf(value);
    };
    for (int k = 0; k < 16; ++k) {
      for (int i = 0; i < 16; ++i) fill(a[i][k], fa[i][k]);
      for (int i = 0; i < 8; ++i) fill(b[i][k], fb[i][k]);
    }
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 8; ++j) {
        expected[i][j] = c[i][j] = static_cast<float>(rng() % 100);
        for (int k = 0; k < 16; ++k) expected[i][j] += fa[i][k] * fb[j][k];
      }
    }
    Launch(MmaHalf, 1, 32, 0, nullptr, &a[0][0], &b[0][0], &c[0][0], bf16);
    for (int i = 0; i < 128; ++i) ASSERT_EQ(c[i / 8][i % 8], expected[i / 8][i % 8]);
  }
}

__global__ void MmaBytes(const int8_t* a, const int8_t* b, int* c, int depth) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  int fc[4] = {};
  if (depth == 32) {
    const uint32_t fa[4] = {Pack(&a[g * 32 + 4 * t], 4), Pack(&a[(g + 8) * 32 + 4 * t], 4),
                            Pack(&a[g * 32 + 4 * t + 16], 4),
                            Pack(&a[(g + 8) * 32 + 4 * t + 16], 4)};
    const uint32_t fb[2] = {Pack(&b[g * 32 + 4 * t], 4), Pack(&b[g * 32 + 4 * t + 16], 4)};
    MmaS8K32(fc, fa, fb);
  } else {
    const uint32_t fa[2] = {Pack(&a[g * 32 + 4 * t], 4), Pack(&a[(g + 8) * 32 + 4 * t], 4)};
    MmaS8K16(fc, fa, Pack(&b[g * 32 + 4 * t], 4));
  }
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = fc[i];
}

TEST(Runner, MmaOfBytesIsThePlainProduct) {
  std::mt19937 rng(1);
  int8_t a[16][32], b[8][32];
  for (int k = 0; k < 32; ++k) {
    for (int i = 0; i < 16; ++i) a[i][k] = static_cast<int8_t>(rng());
    for (int i = 0; i < 8; ++i) b[i][k] = static_cast<int8_t>(rng());
  }
  for (const int depth : {16, 32}) {
    int c[16][8];
    Launch(MmaBytes, 1, 32, 0, nullptr, &a[0][0], &b[0][0], &c[0][0], depth);
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 8; ++j) {
        int expected = 0;
        for (int k = 0; k < depth; ++k) expected += a[i][k] * b[j][k];
        ASSERT_EQ(c[i][j], expected) << depth;
      }
    }
  }
}

__global__ void LoadTiles(const uint16_t* in, uint32_t* out, bool trans) {
  uint32_t r[4];
  if (trans) {
    LdMatrixX4Trans(r, in + 8 * threadIdx.x);
  } else {
    LdMatrixX4(r, in + 8 * threadIdx.x);
  }
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = r[i];
}

TEST(Runner, LdMatrixGivesTheFragmentsOfFourTiles) {
  alignas(16) uint16_t in[4][8][8];
  for (int i = 0; i < 256; ++i) in[i / 64][i / 8 % 8][i % 8] = static_cast<uint16_t>(i);
  uint32_t out[32][4];
  for (const bool trans : {false, true}) {
    Launch(LoadTiles, 1, 32, 0, nullptr, &in[0][0][0], &out[0][0], trans);
    for (int lane = 0; lane < 32; ++lane) {
      for (int m = 0; m < 4; ++m) {
        const int g = lane / 4, t = lane % 4 * 2;
        ASSERT_EQ(out[lane][m] & 0xFFFF, trans ? in[m][t][g] : in[m][g][t]);
        ASSERT_EQ(out[lane][m] >> 16, trans ? in[m][t + 1][g] : in[m][g][t + 1]);
      }
    }
  }
}

__global__ void Where(int* out) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  atomicAdd(&out[block * blockDim.x * blockDim.y * blockDim.z + thread], 1);
}

TEST(Runner, EveryThreadOfTheGridRunsOnce) {
  for (int seed = 0; seed < kSeeds; ++seed) {
    simt::SetSeed(seed);
    std::vector<int> out(3 * 4 * 2 * 5 * 2 * 3);
    Launch(Where, dim3(3, 4, 2), dim3(5, 2, 3), 0, nullptr, out.data());
    ASSERT_THAT(out, testing::Each(1));
  }
}

TEST(Runner, ThreadsLaunchAtTheSameTime) {
  std::vector<std::thread> threads;
  std::vector<int> wrong(3);
  for (int i = 0; i < 3; ++i) threads.emplace_back([&, i] { wrong[i] = WrongSeeds(true); });
  for (std::thread& t : threads) t.join();
  EXPECT_THAT(wrong, testing::Each(0));
}

}  // namespace
}  // namespace shoal::cuda
