#include "kernels/cuda/backend.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "kernels/cuda/mailbox.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/peer_sums.h"
#include "kernels/cuda/workspace.h"
#include "kernels/status_macros.h"

namespace shoal::cuda {
namespace {

int64_t AttentionBytes(const Backend::Limits& l) {
  return AttentionWorkspaceBytes(l.heads, l.head_dim, static_cast<int>(PartialItems(l)));
}

}  // namespace

absl::StatusOr<std::unique_ptr<CudaBackend>> CudaBackend::Create(int device) {
  SHOAL_ASSIGN_OR_RETURN(const std::vector<GpuInfo> gpus, ListGpus());
  if (device < 0 || device >= static_cast<int>(gpus.size())) {
    return absl::UnavailableError(absl::StrCat("there is no GPU ", device, ": this process sees ",
                                               gpus.size(), ", counted from 0"));
  }
  SHOAL_RETURN_IF_ERROR(ToStatus(cudaSetDevice(device), "choosing a GPU"));
  int shared = 0;
  AttentionChip chip;
  SHOAL_RETURN_IF_ERROR(
      ToStatus(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
               "asking for shared memory"));
  SHOAL_RETURN_IF_ERROR(ToStatus(
      cudaDeviceGetAttribute(&chip.multiprocessors, cudaDevAttrMultiProcessorCount, device),
      "asking for multiprocessors"));
  chip.max_shared_bytes = shared;
  SHOAL_ASSIGN_OR_RETURN(OwnedStream stream, OwnedStream::Create());
  SHOAL_ASSIGN_OR_RETURN(CudaCopies copies, CudaCopies::Create(stream.get()));
  // On chips with sm_90 and up own tiles, of mma.sync, reach half of what wgmma gives.
  std::unique_ptr<Cublas> cublas;
  if (gpus[device].major >= 9) {
    absl::StatusOr<std::unique_ptr<Cublas>> loaded = Cublas::Load(stream.get());
    if (loaded.ok()) cublas = *std::move(loaded);
  }
  return std::unique_ptr<CudaBackend>(
      new CudaBackend(gpus[device], chip, std::move(stream), std::move(copies), std::move(cublas)));
}

CudaBackend::CudaBackend(const GpuInfo& info, const AttentionChip& chip, OwnedStream stream,
                         CudaCopies copies, std::unique_ptr<Cublas> cublas)
    : info_(info),
      chip_(chip),
      queue_(std::move(stream), info.pci),
      copies_(std::move(copies)),
      cublas_(std::move(cublas)),
      linear_(info.major >= 8, cublas_.get()),
      graphs_(queue_) {}

CudaBackend::~CudaBackend() { cudaStreamSynchronize(stream()); }

std::string CudaBackend::Describe() const {
  return absl::StrCat("cuda:", info_.index, " ", info_.name, " (sm_", info_.major, info_.minor,
                      cublas_ != nullptr ? ", cuBLAS" : "",
                      graphs_.on() ? "" : absl::StrCat(", no graphs: ", graphs_.why_off()), ")");
}

absl::Status CudaBackend::Reserve(const Limits& limits) {
  SHOAL_CHECK(limits.rows > 0 && limits.cols > 0 && limits.out_rows > 0 && limits.heads > 0 &&
                  limits.head_dim > 0 && limits.context > 0,
              "Limits must be positive");
  SHOAL_CHECK(limits_.rows == 0, "Reserve is called once");
  SHOAL_ASSIGN_OR_RETURN(linear_workspace_, Allocate(linear_.WorkspaceBytes(limits)));
  SHOAL_ASSIGN_OR_RETURN(attention_workspace_, Allocate(AttentionBytes(limits)));
  planner_.emplace(limits);
  SHOAL_ASSIGN_OR_RETURN(plan_upload_, Upload::Create(planner_->MaxBytes()));
  SHOAL_ASSIGN_OR_RETURN(ids_upload_,
                         Upload::Create(limits.rows * static_cast<int64_t>(sizeof(int32_t))));
  SHOAL_ASSIGN_OR_RETURN(reduced_, Allocate(MostReducedLogitBytes(limits)));
  SHOAL_ASSIGN_OR_RETURN(
      requests_upload_,
      Upload::Create(limits.logit_rows * static_cast<int64_t>(sizeof(LogitRequest))));
  linear_.SetWorkspace(limits, linear_workspace_.data());
  limits_ = limits;
  return absl::OkStatus();
}

int64_t CudaBackend::WorkspaceBytes(const Limits& limits) const {
  return cuda::WorkspaceBytes(limits, cublas_ != nullptr);
}

int64_t CudaBackend::FreeBytes() const {
  size_t free = 0, total = 0;
  return cudaMemGetInfo(&free, &total) == cudaSuccess ? static_cast<int64_t>(free) : 0;
}

void CudaBackend::Copy(void* to, const void* from, int64_t bytes) {
  if (bytes == 0 || to == from) return;
  Keep(ToStatus(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream()), "copying"));
  Keep(queue_.Wait());
}

void CudaBackend::Download(void* to, const void* from, int64_t bytes) {
  if (bytes == 0) return;
  Keep(ToStatus(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream()), "copying"));
}

absl::Status CudaBackend::Step(const DecodeStep& step, absl::FunctionRef<absl::Status(int)> ops) {
  const int rows = static_cast<int>(step.segments.size());
  std::optional<StepShape> shape;
  if (graphs_.on()) {
    shape = planner_->ShapeOf(step.segments, static_cast<int>(PartialItems(limits_)));
  }
  if (!shape.has_value() || shape->rows > step.rows_max) return ops(rows);
  SHOAL_CHECK(step.ids.empty() || step.ids.size() == step.segments.size(), "an id for each row");
  SHOAL_ASSIGN_OR_RETURN(uint8_t* const host, plan_upload_.Begin());
  plan_ = planner_->BuildStep(step.segments, step.ids, *shape, host, plan_upload_.device());
  SHOAL_RETURN_IF_ERROR(plan_upload_.Commit(planner_->UsedBytes(), stream()));
  in_step_ = true;
  const absl::Status status = graphs_.Run(
      *shape, [&] { return ops(shape->rows); }, step.agree);
  in_step_ = false;
  return status;
}

uint8_t* CudaBackend::Grow(DeviceMemory& memory, int64_t bytes, bool pinned) {
  if (bytes <= memory.size()) return memory.data();
  // What is enqueued may still use the old one.
  Keep(queue_.Wait());
  memory = DeviceMemory();
  absl::StatusOr<DeviceMemory> grown = pinned ? AllocatePinned(bytes) : AllocateDevice(bytes);
  Keep(grown.status());
  if (!grown.ok()) return nullptr;
  memory = *std::move(grown);
  return memory.data();
}

const void* CudaBackend::OnHost(const void* data, int64_t bytes) {
  uint8_t* const host = Grow(on_host_, bytes, true);
  SHOAL_CHECK(host != nullptr, "no pinned memory is left");
  Copy(host, data, bytes);
  // A caller who looks before Check() sees zeros, not what an earlier call left.
  if (!status_.ok()) std::memset(host, 0, bytes);
  return host;
}

const void* CudaBackend::OnDevice(const void* data, int64_t bytes) {
  uint8_t* const device = Grow(on_device_, bytes, false);
  SHOAL_CHECK(device != nullptr, "no device memory is left");
  Copy(device, data, bytes);
  return device;
}

absl::StatusOr<std::unique_ptr<PeerMailbox>> CudaBackend::MakeMailbox(int64_t slot_bytes) {
  return CudaMailbox::Create(slot_bytes, stream());
}

absl::StatusOr<std::unique_ptr<PeerSums>> CudaBackend::MakePeerSums(PeerMemory memory, int rank,
                                                                    int ranks) {
  auto sums = CudaPeerSums::Create(memory, rank, ranks, info_.pci, stream());
  if (!sums.ok()) cudaGetLastError();  // said here
  return sums;
}

absl::StatusOr<std::unique_ptr<CopyEngine>> CudaBackend::MakeCopies() {
  SHOAL_ASSIGN_OR_RETURN(CudaCopies copies, CudaCopies::Create(stream()));
  return std::make_unique<CudaCopies>(std::move(copies));
}

absl::Status CudaBackend::Check() {
  Keep(ToStatus(cudaGetLastError(), "running a kernel"));
  if (cublas_ != nullptr) Keep(cublas_->status());
  return status_;
}

void CudaBackend::Embed(const PackedMatrix& table, absl::Span<const int32_t> ids, float scale,
                        float* out) {
  if (in_step_) return cuda::Embed(table, plan_->ids, plan_->row_count, scale, out, stream());
  const absl::StatusOr<uint8_t*> host = ids_upload_.Begin();
  Keep(host.status());
  if (!host.ok()) return;
  const int64_t bytes = static_cast<int64_t>(ids.size() * sizeof(int32_t));
  SHOAL_CHECK(bytes <= ids_upload_.size(), "more rows than Limits");
  std::memcpy(*host, ids.data(), bytes);
  Keep(ids_upload_.Commit(bytes, stream()));
  cuda::Embed(table, reinterpret_cast<const int32_t*>(ids_upload_.device()),
              static_cast<int>(ids.size()), scale, out, stream());
}

void CudaBackend::Norm(const LinearInput& input, int rows, int cols, float* out,
                       int64_t out_stride) {
  cuda::Norm(input, rows, cols, out, out_stride, stream());
}

void CudaBackend::SumSquares(const float* x, int64_t stride, const ColumnRun (&runs)[2], int rows,
                             float* sums) {
  cuda::SumSquares(x, stride, runs, rows, sums, stream());
}

void CudaBackend::Linear(const LinearInput& input, int cols, RowCount rows,
                         absl::Span<const LinearOutput> outputs) {
  SHOAL_CHECK(rows.decode >= 0 && rows.prefill >= 0 && rows.total() <= limits_.rows,
              "more rows than Limits");
  SHOAL_CHECK(cols > 0 && cols <= limits_.cols, "more columns than Limits");
  linear_.Linear(input, cols, rows, outputs, stream());
}

const BatchPlan* CudaBackend::Plan(absl::Span<const Segment> segments, const AttentionShape& shape,
                                   const KvLayer& kv) {
  if (plan_.has_value()) return &*plan_;
  const absl::StatusOr<uint8_t*> host = plan_upload_.Begin();
  Keep(host.status());
  if (!host.ok()) return nullptr;
  const PlanOptions options =
      PlanOptionsFor(shape, kv.shape, chip_, static_cast<int>(PartialItems(limits_)));
  plan_ = planner_->Build(segments, shape, options, *host, plan_upload_.device());
  Keep(plan_upload_.Commit(planner_->UsedBytes(), stream()));
  return &*plan_;
}

void CudaBackend::QkvToCache(const QkvArgs& args, const AttentionShape& shape, const KvLayer& kv,
                             absl::Span<const Segment> segments) {
  if (const BatchPlan* plan = Plan(segments, shape, kv)) {
    cuda::QkvToCache(args, shape, kv, *plan, stream());
  }
}

void CudaBackend::Attention(const float* q, int64_t q_stride, const AttentionShape& shape,
                            const KvLayer& kv, absl::Span<const Segment> segments, float* out,
                            int64_t out_stride) {
  if (const BatchPlan* plan = Plan(segments, shape, kv)) {
    cuda::Attention(q, q_stride, shape, kv, *plan, attention_workspace_.data(), out, out_stride,
                    stream());
  }
}

void CudaBackend::Route(const RouterArgs& args, int rows, int32_t* ids, float* weights) {
  SHOAL_CHECK(rows <= limits_.rows && args.used <= limits_.experts_used,
              "more rows or experts than Limits");
  cuda::Route(args, rows, in_step_ ? plan_->rows : nullptr, ids, weights, stream());
}

void CudaBackend::Experts(const LinearInput& input, int cols, RowCount rows, const int32_t* ids,
                          const float* weights, int used, const ExpertWeights& experts, float* out,
                          int64_t out_stride) {
  SHOAL_CHECK(rows.total() <= limits_.rows && used <= limits_.experts_used,
              "more rows or experts than Limits");
  linear_.Experts(input, cols, rows, ids, weights, used, experts, out, out_stride, stream());
}

bool CudaBackend::ReduceLogits(const float* logits, int vocab, int32_t first_token,
                               absl::Span<const LogitRequest> requests, int candidates,
                               LogitSummary* summaries, LogitCandidate* best) {
  const int rows = static_cast<int>(requests.size());
  if (rows == 0 || rows > limits_.logit_rows || vocab > limits_.vocab ||
      candidates > std::min(limits_.vocab, kMaxLogitCandidates)) {
    return false;
  }
  const absl::StatusOr<uint8_t*> host = requests_upload_.Begin();
  Keep(host.status());
  if (!host.ok()) return false;
  const auto request_bytes = static_cast<int64_t>(rows * sizeof(LogitRequest));
  std::memcpy(*host, requests.data(), request_bytes);
  Keep(requests_upload_.Commit(request_bytes, stream()));
  const int64_t bytes = ReducedLogitBytes(rows, candidates);  // a multiple of 8
  const int64_t summary_bytes = rows * static_cast<int64_t>(sizeof(LogitSummary));
  LogitArgs args;
  args.logits = logits;
  args.stride = vocab;
  args.rows = rows;
  args.vocab = vocab;
  args.first_token = first_token;
  args.requests = reinterpret_cast<const LogitRequest*>(requests_upload_.device());
  args.candidates = candidates;
  args.workspace = reduced_.data() + (bytes + 15) / 16 * 16;
  cuda::ReduceLogits(args, reduced_.as<LogitSummary>(),
                     reinterpret_cast<LogitCandidate*>(reduced_.data() + summary_bytes), stream());
  const auto* reduced = static_cast<const uint8_t*>(OnHost(reduced_.data(), bytes));
  std::memcpy(summaries, reduced, summary_bytes);
  std::memcpy(best, reduced + summary_bytes, bytes - summary_bytes);
  return status_.ok();
}

void CudaBackend::Add(float* x, int64_t x_stride, const float* y, int64_t y_stride, int rows,
                      int cols) {
  cuda::Add(x, x_stride, y, y_stride, rows, cols, stream());
}

}  // namespace shoal::cuda
