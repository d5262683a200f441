#include "kernels/cuda/copies.h"

#include <utility>

#include "kernels/status_macros.h"

namespace shoal::cuda {

absl::StatusOr<CudaCopies> CudaCopies::Create(cudaStream_t ops) {
  int device = 0;
  SHOAL_RETURN_IF_ERROR(ToStatus(cudaGetDevice(&device), "asking for the current GPU"));
  SHOAL_ASSIGN_OR_RETURN(OwnedStream stream, OwnedStream::Create());
  return CudaCopies(device, ops, std::move(stream));
}

CudaCopies::~CudaCopies() {
  if (stream_.get() != nullptr) cudaStreamSynchronize(stream_.get());
  for (void* p : pinned_) cudaHostUnregister(p);
}

absl::StatusOr<int> CudaCopies::NewFence() {
  SHOAL_ASSIGN_OR_RETURN(OwnedEvent event, OwnedEvent::Create());
  fences_.push_back(std::move(event));
  return static_cast<int>(fences_.size()) - 1;
}

absl::Status CudaCopies::Copy(uint8_t* to, const uint8_t* from, int64_t bytes) {
  return ToStatus(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_.get()),
                  "copying to the GPU");
}

absl::Status CudaCopies::CopyBack(uint8_t* to, const uint8_t* from, int64_t bytes) {
  return ToStatus(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_.get()),
                  "copying from the GPU");
}

bool CudaCopies::Pin(const uint8_t* from, int64_t bytes) {
  void* const p = const_cast<uint8_t*>(from);
  if (cudaHostRegister(p, bytes, cudaHostRegisterDefault) != cudaSuccess) {
    cudaGetLastError();  // a limit on locked memory is no error of later calls
    return false;
  }
  pinned_.push_back(p);
  return true;
}

absl::Status CudaCopies::MarkCopies(int fence) {
  return ToStatus(cudaEventRecord(fences_[fence].get(), stream_.get()), "marking copies");
}
absl::Status CudaCopies::MarkOps(int fence) {
  return ToStatus(cudaEventRecord(fences_[fence].get(), ops_), "marking ops");
}
absl::Status CudaCopies::OpsWaitFor(int fence) {
  return ToStatus(cudaStreamWaitEvent(ops_, fences_[fence].get(), 0), "ordering ops");
}
absl::Status CudaCopies::CopiesWaitFor(int fence) {
  return ToStatus(cudaStreamWaitEvent(stream_.get(), fences_[fence].get(), 0), "ordering copies");
}
absl::Status CudaCopies::Await(int fence) {
  return ToStatus(cudaEventSynchronize(fences_[fence].get()), "waiting for copies");
}
absl::Status CudaCopies::EnterThread() {
  return ToStatus(cudaSetDevice(device_), "choosing a GPU");
}

}  // namespace shoal::cuda
