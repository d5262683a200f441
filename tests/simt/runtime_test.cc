// Streams of the stand-in: a missing wait must be able to show, a wait must help.
#include <gtest/gtest.h>

#include <functional>
#include <vector>

#include "kernels/cuda/launch.cuh"

namespace shoal::cuda {
namespace {

constexpr int kRounds = 40;
constexpr int kInts = 64;

__global__ void AddOne(const int* in, int* out) { out[threadIdx.x] = in[threadIdx.x] + 1; }

struct Streams {
  cudaStream_t copy, compute;
  cudaEvent_t copied, used;
  int *host, *device, *result;
  Streams() {
    cudaStreamCreateWithFlags(&copy, cudaStreamNonBlocking);
    cudaStreamCreateWithFlags(&compute, cudaStreamNonBlocking);
    cudaEventCreateWithFlags(&copied, cudaEventDisableTiming);
    cudaEventCreateWithFlags(&used, cudaEventDisableTiming);
    cudaMallocHost(&host, kInts * sizeof(int));
    cudaMalloc(&device, kInts * sizeof(int));
    cudaMalloc(&result, kInts * sizeof(int));
  }
  ~Streams() {
    cudaStreamDestroy(copy);
    cudaStreamDestroy(compute);
    cudaEventDestroy(copied);
    cudaEventDestroy(used);
    cudaFreeHost(host);
    cudaFree(device);
    cudaFree(result);
  }
};

// Copies round after round to the same memory and multiplies on another stream; returns wrong
// results.
int WrongRounds(bool wait_for_copy) {
  Streams s;
  int wrong = 0;
  for (int round = 0; round < kRounds; ++round) {
    for (int i = 0; i < kInts; ++i) s.host[i] = round;
    cudaStreamWaitEvent(s.copy, s.used);
    cudaMemcpyAsync(s.device, s.host, kInts * sizeof(int), cudaMemcpyHostToDevice, s.copy);
    cudaEventRecord(s.copied, s.copy);
    if (wait_for_copy) cudaStreamWaitEvent(s.compute, s.copied);
    Launch(AddOne, 1, kInts, 0, s.compute, s.device, s.result);
    cudaEventRecord(s.used, s.compute);
    std::vector<int> out(kInts);
    cudaMemcpyAsync(out.data(), s.result, kInts * sizeof(int), cudaMemcpyDeviceToHost, s.compute);
    for (const int v : out) wrong += v != round + 1;
    cudaEventSynchronize(s.copied);
  }
  return wrong;
}

TEST(Runtime, AMissingWaitShows) {
  EXPECT_EQ(WrongRounds(true), 0);
  EXPECT_GT(WrongRounds(false), 0);
}

TEST(Runtime, PinnedMemoryIsReadWhenTheCopyHappens) {
  int* host = nullptr;
  int* device = nullptr;
  cudaMallocHost(&host, sizeof(int));
  cudaMalloc(&device, sizeof(int));
  cudaStream_t stream;
  cudaStreamCreate(&stream);
  for (const bool wait : {true, false}) {
    int wrong = 0;
    for (int round = 0; round < kRounds; ++round) {
      *host = round;
      cudaMemcpyAsync(device, host, sizeof(int), cudaMemcpyHostToDevice, stream);
      if (wait) cudaStreamSynchronize(stream);
      *host = -1;
      int out = 0;
      cudaMemcpyAsync(&out, device, sizeof(int), cudaMemcpyDeviceToHost, stream);
      wrong += out != round;
    }
    EXPECT_EQ(wrong == 0, wait) << wrong;
  }
  cudaStreamDestroy(stream);
  cudaFree(device);
  cudaFreeHost(host);
}

TEST(Runtime, WorkIsDoneInOrderAndWhoPollsSeesTheEnd) {
  Streams s;
  for (int i = 0; i < kInts; ++i) s.host[i] = i;
  cudaMemcpyAsync(s.device, s.host, kInts * sizeof(int), cudaMemcpyHostToDevice, s.compute);
  for (int i = 0; i < 10; ++i) Launch(AddOne, 1, kInts, 0, s.compute, s.device, s.device);
  cudaMemcpyAsync(s.host, s.device, kInts * sizeof(int), cudaMemcpyDeviceToHost, s.compute);
  cudaEventRecord(s.used, s.compute);
  while (cudaEventQuery(s.used) == cudaErrorNotReady) {
  }
  for (int i = 0; i < kInts; ++i) ASSERT_EQ(s.host[i], i + 10);
}

// out = value + *in, both as they are when the launch happens, but for the value.
__global__ void AddTo(const int* in, int value, int* out) {
  if (threadIdx.x == 0) *out = value + *in;
}

TEST(Runtime, AGraphKeepsArgumentsAndReadsMemoryAnew) {
  Streams s;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  *s.device = 1;
  *s.result = 0;
  int value = 10;
  ASSERT_EQ(cudaStreamBeginCapture(s.compute, cudaStreamCaptureModeThreadLocal), cudaSuccess);
  cudaMemcpyAsync(s.device, s.host, sizeof(int), cudaMemcpyHostToDevice, s.compute);
  Launch(AddTo, 1, 32, 0, s.compute, s.device, value, s.result);
  ASSERT_EQ(cudaStreamEndCapture(s.compute, &graph), cudaSuccess);
  ASSERT_EQ(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
  cudaGraphDestroy(graph);
  cudaStreamSynchronize(s.compute);
  EXPECT_EQ(*s.result, 0) << "what is captured is not done";
  value = 20;
  for (int round = 0; round < 3; ++round) {
    *s.host = round;
    ASSERT_EQ(cudaGraphLaunch(exec, s.compute), cudaSuccess);
    cudaStreamSynchronize(s.compute);
    EXPECT_EQ(*s.result, 10 + round);
  }
  cudaGraphExecDestroy(exec);
}

TEST(Runtime, ACaptureRefusesWhatWaitsOrAllocates) {
  Streams s;
  int pageable = 0;
  void* p = nullptr;
  const std::vector<std::function<cudaError_t()>> forbidden = {
      [&] { return cudaStreamSynchronize(s.compute); },
      [&] { return cudaStreamQuery(s.compute); },
      [&] { return cudaDeviceSynchronize(); },
      [&] { return cudaMalloc(&p, 16); },
      [&] { return cudaMallocHost(&p, 16); },
      [&] { return cudaEventSynchronize(s.used); },
      [&] { return cudaEventRecord(s.used, s.compute); },
      [&] { return cudaStreamWaitEvent(s.compute, s.used); },
      [&] { return cudaMemcpyAsync(&pageable, s.device, 4, cudaMemcpyDeviceToHost, s.compute); },
      [&] { return cudaMemcpyAsync(s.device, &pageable, 4, cudaMemcpyHostToDevice, s.compute); },
  };
  for (size_t i = 0; i < forbidden.size(); ++i) {
    SCOPED_TRACE(i);
    cudaGraph_t graph = nullptr;
    ASSERT_EQ(cudaStreamBeginCapture(s.compute, cudaStreamCaptureModeThreadLocal), cudaSuccess);
    EXPECT_EQ(forbidden[i](), cudaErrorStreamCaptureUnsupported);
    EXPECT_EQ(cudaStreamEndCapture(s.compute, &graph), cudaErrorStreamCaptureInvalidated);
    EXPECT_EQ(graph, nullptr);
    EXPECT_EQ(cudaGetLastError(), cudaErrorStreamCaptureInvalidated);
    EXPECT_EQ(cudaStreamSynchronize(s.compute), cudaSuccess);
  }
}

TEST(Runtime, DeviceMemoryEnds) {
  size_t free = 0, total = 0;
  cudaMemGetInfo(&free, &total);
  void* p = nullptr;
  EXPECT_EQ(cudaMalloc(&p, free + 1), cudaErrorMemoryAllocation);
  EXPECT_EQ(p, nullptr);
  EXPECT_EQ(cudaGetLastError(), cudaErrorMemoryAllocation);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
}

}  // namespace
}  // namespace shoal::cuda
