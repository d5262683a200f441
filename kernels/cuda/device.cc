#include "kernels/cuda/device.h"

#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/status_macros.h"

namespace shoal::cuda {

absl::Status ToStatus(cudaError_t error, const char* tried) {
  if (error == cudaSuccess) return absl::OkStatus();
  const std::string text = absl::StrCat("CUDA: ", tried, ": ", cudaGetErrorString(error), " (",
                                        cudaGetErrorName(error), ")");
  if (error == cudaErrorMemoryAllocation) return absl::ResourceExhaustedError(text);
  return absl::UnavailableError(text);
}

namespace {

std::string CudaVersion(int version) {
  return absl::StrCat(version / 1000, ".", version % 1000 / 10);
}

// What cudaGetDeviceCount calls an insufficient driver may be none at all.
std::string WhyNoGpu(cudaError_t error) {
  if (error == cudaSuccess) return "the driver knows of no GPU";
  int driver = 0, runtime = 0;
  if (error != cudaErrorInsufficientDriver || cudaDriverGetVersion(&driver) != cudaSuccess ||
      cudaRuntimeGetVersion(&runtime) != cudaSuccess) {
    return cudaGetErrorString(error);
  }
  if (driver == 0) return "no NVIDIA driver is installed (libcuda.so.1 was not found)";
  return absl::StrCat("the NVIDIA driver is made for CUDA ", CudaVersion(driver),
                      ", this shoal needs ", CudaVersion(runtime), ": install a newer driver");
}

}  // namespace

absl::StatusOr<std::vector<GpuInfo>> ListGpus() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    const std::string why = WhyNoGpu(error);
    cudaGetLastError();  // a machine without a GPU is no error of later calls
    return absl::UnavailableError(why);
  }
  std::vector<GpuInfo> gpus;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp p;
    SHOAL_RETURN_IF_ERROR(ToStatus(cudaGetDeviceProperties(&p, i), "reading a GPU's properties"));
    gpus.push_back({i, p.name, p.major, p.minor, static_cast<int64_t>(p.totalGlobalMem),
                    absl::StrFormat("%04x:%02x:%02x", p.pciDomainID, p.pciBusID, p.pciDeviceID)});
  }
  return gpus;
}

uint64_t ThisProcess() {
  static const uint64_t token = [] {
    std::random_device random;
    return uint64_t{random()} << 32 | random();
  }();
  return token;
}

absl::StatusOr<DeviceMemory> AllocateDevice(int64_t bytes) {
  if (bytes == 0) return DeviceMemory();
  void* p = nullptr;
  SHOAL_RETURN_IF_ERROR(
      ToStatus(cudaMalloc(&p, bytes), absl::StrCat("allocating ", bytes, " bytes").c_str()));
  DeviceMemory memory(static_cast<uint8_t*>(p), bytes, [](uint8_t* data) { cudaFree(data); });
  SHOAL_RETURN_IF_ERROR(ToStatus(cudaMemset(p, 0, bytes), "clearing memory"));
  // cudaMemset may return before it is done, and other streams do not wait for it.
  SHOAL_RETURN_IF_ERROR(ToStatus(cudaDeviceSynchronize(), "clearing memory"));
  return memory;
}

absl::StatusOr<DeviceMemory> AllocatePinned(int64_t bytes) {
  if (bytes == 0) return DeviceMemory();
  void* p = nullptr;
  SHOAL_RETURN_IF_ERROR(ToStatus(cudaHostAlloc(&p, bytes, cudaHostAllocPortable),
                                 absl::StrCat("pinning ", bytes, " bytes").c_str()));
  return DeviceMemory(static_cast<uint8_t*>(p), bytes, [](uint8_t* data) { cudaFreeHost(data); });
}

absl::StatusOr<OwnedStream> OwnedStream::Create() {
  OwnedStream s;
  SHOAL_RETURN_IF_ERROR(
      ToStatus(cudaStreamCreateWithFlags(&s.stream_, cudaStreamNonBlocking), "creating a stream"));
  return s;
}
OwnedStream::OwnedStream(OwnedStream&& other) noexcept
    : stream_(std::exchange(other.stream_, nullptr)) {}
OwnedStream& OwnedStream::operator=(OwnedStream&& other) noexcept {
  std::swap(stream_, other.stream_);
  return *this;
}
OwnedStream::~OwnedStream() {
  if (stream_ != nullptr) cudaStreamDestroy(stream_);
}

bool CudaQueue::recording_lost() const {
  if (!recording_) return false;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  return cudaStreamIsCapturing(stream_.get(), &status) != cudaSuccess ||
         status != cudaStreamCaptureStatusActive;
}

absl::Status CudaQueue::Wait() const {
  if (watches_.empty()) {
    return ToStatus(cudaStreamSynchronize(stream_.get()), "waiting for the GPU");
  }
  while (true) {
    const cudaError_t state = cudaStreamQuery(stream_.get());
    if (state != cudaErrorNotReady) SHOAL_RETURN_IF_ERROR(ToStatus(state, "waiting for the GPU"));
    for (const auto& watch : watches_) SHOAL_RETURN_IF_ERROR(watch());
    if (state == cudaSuccess) return absl::OkStatus();
  }
}

absl::StatusOr<OwnedEvent> OwnedEvent::Create() {
  OwnedEvent e;
  SHOAL_RETURN_IF_ERROR(
      ToStatus(cudaEventCreateWithFlags(&e.event_, cudaEventDisableTiming), "creating an event"));
  return e;
}
absl::StatusOr<OwnedEvent> OwnedEvent::CreateShared() {
  OwnedEvent e;
  SHOAL_RETURN_IF_ERROR(
      ToStatus(cudaEventCreateWithFlags(&e.event_, cudaEventDisableTiming | cudaEventInterprocess),
               "creating an event"));
  return e;
}
OwnedEvent::OwnedEvent(OwnedEvent&& other) noexcept
    : event_(std::exchange(other.event_, nullptr)) {}
OwnedEvent& OwnedEvent::operator=(OwnedEvent&& other) noexcept {
  std::swap(event_, other.event_);
  return *this;
}
OwnedEvent::~OwnedEvent() {
  if (event_ != nullptr) cudaEventDestroy(event_);
}

absl::StatusOr<Upload> Upload::Create(int64_t bytes) {
  Upload u;
  SHOAL_ASSIGN_OR_RETURN(u.host_, AllocatePinned(bytes));
  SHOAL_ASSIGN_OR_RETURN(u.device_, AllocateDevice(bytes));
  SHOAL_ASSIGN_OR_RETURN(u.read_, OwnedEvent::Create());
  return u;
}

absl::StatusOr<uint8_t*> Upload::Begin() {
  // An event that was never recorded is over.
  SHOAL_RETURN_IF_ERROR(
      ToStatus(cudaEventSynchronize(read_.get()), "waiting for the upload of a batch"));
  return host_.data();
}

absl::Status Upload::Commit(int64_t bytes, cudaStream_t stream) {
  SHOAL_RETURN_IF_ERROR(
      ToStatus(cudaMemcpyAsync(device_.data(), host_.data(), bytes, cudaMemcpyHostToDevice, stream),
               "uploading a batch"));
  return ToStatus(cudaEventRecord(read_.get(), stream), "uploading a batch");
}

}  // namespace shoal::cuda
