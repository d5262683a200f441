// The CUDA implementation of Backend: memory and order of one GPU around the kernels of ops.h. No
// device code.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cuda/attention_ops.h"
#include "kernels/cuda/copies.h"
#include "kernels/cuda/cublas.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/graphs.h"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/planner.h"

namespace shoal::cuda {

// Everything is ordered on one stream. Created and used by one thread, as the current device is a
// thread's. A failed call is kept and said by the next Check(): results after it are garbage.
class CudaBackend final : public Backend {
 public:
  // device: as GpuInfo::index. kUnavailable when it cannot be used.
  static absl::StatusOr<std::unique_ptr<CudaBackend>> Create(int device);
  ~CudaBackend() override;

  std::string Describe() const override;
  absl::Status Reserve(const Limits& limits) override;
  int64_t WorkspaceBytes(const Limits& limits) const override;

  bool shares_host_memory() const override { return false; }
  int64_t FreeBytes() const override;
  absl::StatusOr<DeviceMemory> Allocate(int64_t bytes) override { return AllocateDevice(bytes); }
  absl::StatusOr<DeviceMemory> AllocateStaging(int64_t bytes) override {
    return AllocatePinned(bytes);
  }
  void Copy(void* to, const void* from, int64_t bytes) override;
  void Download(void* to, const void* from, int64_t bytes) override;
  void Wait() override { Keep(queue_.Wait()); }
  const void* OnHost(const void* data, int64_t bytes) override;
  const void* OnDevice(const void* data, int64_t bytes) override;
  CopyEngine* copies() override { return &copies_; }
  absl::StatusOr<std::unique_ptr<CopyEngine>> MakeCopies() override;
  absl::StatusOr<std::unique_ptr<PeerMailbox>> MakeMailbox(int64_t slot_bytes) override;
  absl::StatusOr<std::unique_ptr<PeerSums>> MakePeerSums(PeerMemory memory, int rank,
                                                         int ranks) override;
  DeviceQueue* queue() override { return &queue_; }
  absl::Status Check() override;

  void BeginBatch() override { plan_.reset(); }
  absl::Status Step(const DecodeStep& step, absl::FunctionRef<absl::Status(int)> ops) override;
  bool replays_steps() const override { return graphs_.on(); }
  const StepGraphs& graphs() const { return graphs_; }
  void Embed(const PackedMatrix& table, absl::Span<const int32_t> ids, float scale,
             float* out) override;
  void Norm(const LinearInput& input, int rows, int cols, float* out, int64_t out_stride) override;
  void SumSquares(const float* x, int64_t stride, const ColumnRun (&runs)[2], int rows,
                  float* sums) override;
  void Linear(const LinearInput& input, int cols, RowCount rows,
              absl::Span<const LinearOutput> outputs) override;
  void QkvToCache(const QkvArgs& args, const AttentionShape& shape, const KvLayer& kv,
                  absl::Span<const Segment> segments) override;
  void Attention(const float* q, int64_t q_stride, const AttentionShape& shape, const KvLayer& kv,
                 absl::Span<const Segment> segments, float* out, int64_t out_stride) override;
  void Route(const RouterArgs& args, int rows, int32_t* ids, float* weights) override;
  void Experts(const LinearInput& input, int cols, RowCount rows, const int32_t* ids,
               const float* weights, int used, const ExpertWeights& experts, float* out,
               int64_t out_stride) override;
  bool ReduceLogits(const float* logits, int vocab, int32_t first_token,
                    absl::Span<const LogitRequest> requests, int candidates,
                    LogitSummary* summaries, LogitCandidate* best) override;
  void Add(float* x, int64_t x_stride, const float* y, int64_t y_stride, int rows,
           int cols) override;

 private:
  CudaBackend(const GpuInfo& info, const AttentionChip& chip, OwnedStream stream, CudaCopies copies,
              std::unique_ptr<Cublas> cublas);
  cudaStream_t stream() const { return queue_.stream(); }
  // The plan of the batch at hand, made and uploaded by the first op that needs it.
  const BatchPlan* Plan(absl::Span<const Segment> segments, const AttentionShape& shape,
                        const KvLayer& kv);
  // At least `bytes` of a scratch memory, which grows to what is asked of it.
  uint8_t* Grow(DeviceMemory& memory, int64_t bytes, bool pinned);
  void Keep(const absl::Status& status) { status_.Update(status); }

  const GpuInfo info_;
  const AttentionChip chip_;
  CudaQueue queue_;
  CudaCopies copies_;
  const std::unique_ptr<Cublas> cublas_;  // null where it is not installed
  LinearEngine linear_;
  Limits limits_;
  DeviceMemory linear_workspace_, attention_workspace_;
  DeviceMemory on_host_, on_device_;  // of OnHost and OnDevice
  std::optional<Planner> planner_;
  Upload plan_upload_, ids_upload_, requests_upload_;
  DeviceMemory reduced_;  // what ReduceLogits gives the host, and its workspace behind
  std::optional<BatchPlan> plan_;
  bool in_step_ = false;  // the ops have their ids in the plan
  StepGraphs graphs_;
  absl::Status status_;
};

}  // namespace shoal::cuda
