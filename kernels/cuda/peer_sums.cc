#include "kernels/cuda/peer_sums.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "kernels/status_macros.h"

namespace shoal::cuda {
namespace {

constexpr int64_t kTokenBytes = 4096;  // a page before the parts tells the memory from others

absl::Status SystemError(const char* tried) {
  return absl::UnavailableError(absl::StrCat(tried, ": ", std::strerror(errno)));
}

// What a kernel writes too.
std::atomic_ref<uint32_t> Word(uint32_t& word) { return std::atomic_ref<uint32_t>(word); }

}  // namespace

absl::StatusOr<SharedPinned> SharedPinned::Create(int64_t bytes) {
  SharedPinned s;
  s.fd_ = memfd_create("shoal-sums", MFD_CLOEXEC);
  if (s.fd_ < 0) return SystemError("making memory that ranks share");
  if (ftruncate(s.fd_, kTokenBytes + bytes) != 0) return SystemError("sizing shared memory");
  SHOAL_RETURN_IF_ERROR(s.Map(bytes));
  std::random_device random;
  s.token_ = uint64_t{random()} << 32 | random();
  std::memcpy(s.mapped_, &s.token_, sizeof s.token_);
  SHOAL_RETURN_IF_ERROR(s.Pin());
  return s;
}

absl::StatusOr<SharedPinned> SharedPinned::Open(int64_t process, int fd, uint64_t token,
                                                int64_t bytes) {
  SharedPinned s;
  s.fd_ = open(absl::StrCat("/proc/", process, "/fd/", fd).c_str(), O_RDWR | O_CLOEXEC);
  if (s.fd_ < 0) return SystemError("opening memory that ranks share");
  // Where processes are numbered anew, as in a container, this may be anything.
  struct stat of = {};
  uint64_t found = 0;
  if (fstat(s.fd_, &of) != 0 || !S_ISREG(of.st_mode) || of.st_size != kTokenBytes + bytes ||
      pread(s.fd_, &found, sizeof found, 0) != sizeof found || found != token) {
    return absl::UnavailableError("memory of another rank cannot be opened from this process");
  }
  s.token_ = token;
  SHOAL_RETURN_IF_ERROR(s.Map(bytes));
  SHOAL_RETURN_IF_ERROR(s.Pin());
  return s;
}

absl::Status SharedPinned::Map(int64_t bytes) {
  void* const p =
      mmap(nullptr, kTokenBytes + bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd_, 0);
  if (p == MAP_FAILED) return SystemError("mapping memory that ranks share");
  mapped_ = static_cast<uint8_t*>(p);
  mapped_bytes_ = kTokenBytes + bytes;
  return absl::OkStatus();
}

absl::Status SharedPinned::Pin() {
  SHOAL_RETURN_IF_ERROR(ToStatus(
      cudaHostRegister(mapped_, mapped_bytes_, cudaHostRegisterPortable | cudaHostRegisterMapped),
      "pinning memory that ranks share"));
  pinned_ = true;
  void* at = nullptr;
  SHOAL_RETURN_IF_ERROR(
      ToStatus(cudaHostGetDevicePointer(&at, mapped_, 0), "mapping shared memory to the GPU"));
  on_device_ = static_cast<uint8_t*>(at) + kTokenBytes;
  return absl::OkStatus();
}

SharedPinned::SharedPinned(SharedPinned&& other) noexcept { *this = std::move(other); }
SharedPinned& SharedPinned::operator=(SharedPinned&& other) noexcept {
  std::swap(fd_, other.fd_);
  std::swap(token_, other.token_);
  std::swap(mapped_, other.mapped_);
  std::swap(mapped_bytes_, other.mapped_bytes_);
  std::swap(pinned_, other.pinned_);
  std::swap(on_device_, other.on_device_);
  return *this;
}
SharedPinned::~SharedPinned() {
  if (pinned_) cudaHostUnregister(mapped_);
  if (mapped_ != nullptr) munmap(mapped_, mapped_bytes_);
  if (fd_ >= 0) close(fd_);
}

struct CudaPeerSums::Address {
  uint64_t process = 0;                                  // ThisProcess()
  char pci[24] = {};                                     // of the GPU
  int64_t pid = 0;                                       // of the system
  const std::shared_ptr<DeviceMemory>* inbox = nullptr;  // kDevice, in this process
  int32_t shareable = 0;                                 // kDevice, between processes
  int32_t fd = -1;                                       // kHost, rank 0's
  uint64_t token = 0;
  cudaIpcMemHandle_t handle = {};
};

absl::StatusOr<std::unique_ptr<CudaPeerSums>> CudaPeerSums::Create(PeerMemory memory, int rank,
                                                                   int ranks,
                                                                   const std::string& pci,
                                                                   cudaStream_t stream) {
  SHOAL_CHECK(rank >= 0 && rank < ranks && ranks <= kMostRanks, "one of at most eight ranks");
  std::unique_ptr<CudaPeerSums> s(new CudaPeerSums(memory, pci, stream));
  SHOAL_RETURN_IF_ERROR(ToStatus(cudaGetDevice(&s->device_), "asking for the current GPU"));
  SHOAL_ASSIGN_OR_RETURN(s->control_, AllocatePinned(sizeof(OneShotControl)));
  std::memset(s->control_.data(), 0, sizeof(OneShotControl));
  s->params_.control = s->control_.as<OneShotControl>();
  SHOAL_ASSIGN_OR_RETURN(s->blocks_, AllocateDevice(kOneShotBlocks * sizeof(OneShotBlock)));
  if (memory == PeerMemory::kDevice) {
    // Of smaller allocations CUDA would share what lies beside them too.
    constexpr int64_t kSharedBytes = int64_t{2} << 20;
    const int64_t bytes = (ranks * kOneShotPartBytes + kSharedBytes - 1) / kSharedBytes;
    SHOAL_ASSIGN_OR_RETURN(DeviceMemory inbox, AllocateDevice(bytes * kSharedBytes));
    s->inbox_ = std::make_shared<DeviceMemory>(std::move(inbox));
  } else if (rank == 0) {
    SHOAL_ASSIGN_OR_RETURN(s->shared_, SharedPinned::Create(ranks * kOneShotPartBytes));
  }
  s->params_.rank = rank;
  s->params_.ranks = ranks;
  s->params_.blocks = s->blocks_.as<OneShotBlock>();
  return s;
}

CudaPeerSums::~CudaPeerSums() {
  if (params_.control != nullptr) Abort();  // what waits for a peer that is gone
  cudaStreamSynchronize(stream_);
  for (void* const p : opened_) cudaIpcCloseMemHandle(p);
  cudaGetLastError();  // the peer may have gone first
}

PeerSumsAddress CudaPeerSums::address() const {
  static_assert(sizeof(Address) <= sizeof(PeerSumsAddress));
  Address a;
  a.process = ThisProcess();
  std::snprintf(a.pci, sizeof a.pci, "%s", pci_.c_str());
  a.pid = getpid();
  if (inbox_ != nullptr) {
    a.inbox = &inbox_;
    a.shareable = cudaIpcGetMemHandle(&a.handle, inbox_->data()) == cudaSuccess ? 1 : 0;
    cudaGetLastError();  // what a system refuses (WSL, some containers) is no error of later calls
  }
  a.fd = shared_.fd();
  a.token = shared_.token();
  PeerSumsAddress out;
  std::memcpy(out.bytes, &a, sizeof a);
  return out;
}

absl::Status CudaPeerSums::Connect(absl::Span<const PeerSumsAddress> ranks) {
  SHOAL_CHECK(static_cast<int>(ranks.size()) == params_.ranks && params_.targets == 0,
              "connected once, with an address for each rank");
  std::vector<Address> all(ranks.size());
  for (size_t r = 0; r < ranks.size(); ++r) std::memcpy(&all[r], ranks[r].bytes, sizeof(Address));
  absl::Status s = memory_ == PeerMemory::kDevice ? ConnectDevices(all) : ConnectHost(all[0]);
  if (!s.ok()) cudaGetLastError();  // said here
  return s;
}

// Where this rank can write to a peer's inbox.
absl::StatusOr<uint8_t*> CudaPeerSums::Reach(const Address& peer) {
  SHOAL_ASSIGN_OR_RETURN(const std::vector<GpuInfo> gpus, ListGpus());
  const auto is_peer = [&peer](const GpuInfo& g) { return g.pci == peer.pci; };
  const auto gpu = std::find_if(gpus.begin(), gpus.end(), is_peer);
  if (gpu == gpus.end()) {
    return absl::UnavailableError(
        absl::StrCat("this process does not see the peer's GPU ", peer.pci));
  }
  int can = gpu->index == device_ ? 1 : 0;
  if (can == 0) {
    SHOAL_RETURN_IF_ERROR(ToStatus(cudaDeviceCanAccessPeer(&can, device_, gpu->index),
                                   "asking whether GPUs reach each other"));
  }
  if (can == 0) {
    return absl::UnavailableError(
        absl::StrCat("GPU ", pci_, " cannot reach the memory of GPU ", peer.pci));
  }
  if (peer.process == ThisProcess()) {
    if (gpu->index != device_) {
      const cudaError_t enabled = cudaDeviceEnablePeerAccess(gpu->index, 0);
      if (enabled != cudaErrorPeerAccessAlreadyEnabled) {
        SHOAL_RETURN_IF_ERROR(ToStatus(enabled, "reaching a peer's memory"));
      }
      cudaGetLastError();
    }
    of_peers_.push_back(*peer.inbox);
    return of_peers_.back()->data();
  }
  if (peer.shareable == 0) {
    return absl::UnavailableError("the system does not share GPU memory between processes");
  }
  void* memory = nullptr;
  SHOAL_RETURN_IF_ERROR(
      ToStatus(cudaIpcOpenMemHandle(&memory, peer.handle, cudaIpcMemLazyEnablePeerAccess),
               "opening a peer's memory"));
  opened_.push_back(memory);
  return static_cast<uint8_t*>(memory);
}

// Terms are written to each peer, since writes over a bus are posted, and read from own memory.
absl::Status CudaPeerSums::ConnectDevices(const std::vector<Address>& ranks) {
  OneShotParams p = params_;
  for (int r = 0; r < p.ranks; ++r) {
    if (r == p.rank) continue;
    SHOAL_ASSIGN_OR_RETURN(uint8_t* const inbox, Reach(ranks[r]));
    uint8_t* const mine = inbox + p.rank * kOneShotPartBytes;
    p.write_to[p.targets] = reinterpret_cast<float*>(mine);
    p.flag_to[p.targets++] = reinterpret_cast<uint32_t*>(mine + kOneShotTermBytes);
    uint8_t* const theirs = inbox_->data() + r * kOneShotPartBytes;
    p.read_from[r] = reinterpret_cast<const float*>(theirs);
    p.flag_from[r] = reinterpret_cast<const uint32_t*>(theirs + kOneShotTermBytes);
  }
  params_ = p;
  return absl::OkStatus();
}

// Terms are written once and read by all: each read crosses the bus wherever they lie.
absl::Status CudaPeerSums::ConnectHost(const Address& owner) {
  if (params_.rank != 0) {
    SHOAL_ASSIGN_OR_RETURN(shared_, SharedPinned::Open(owner.pid, owner.fd, owner.token,
                                                       params_.ranks * kOneShotPartBytes));
  }
  for (int r = 0; r < params_.ranks; ++r) {
    uint8_t* const part = shared_.on_device() + r * kOneShotPartBytes;
    auto* const terms = reinterpret_cast<float*>(part);
    auto* const flags = reinterpret_cast<uint32_t*>(part + kOneShotTermBytes);
    if (r == params_.rank) {
      params_.write_to[0] = terms;
      params_.flag_to[0] = flags;
    } else {
      params_.read_from[r] = terms;
      params_.flag_from[r] = flags;
    }
  }
  params_.targets = 1;
  return absl::OkStatus();
}

void CudaPeerSums::SetPatience(std::chrono::nanoseconds silence, std::chrono::nanoseconds stall) {
  params_.silence_ns = silence.count();
  params_.stall_ns = stall.count();
}

void CudaPeerSums::Enqueue(float* data, int64_t count) {
  SHOAL_CHECK(params_.targets > 0 && count > 0 && count <= kMostNumbers, "a sum among peers");
  OneShotParams p = params_;
  p.data = data;
  p.count = static_cast<int32_t>(count);
  OneShotSum(p, stream_);
}

std::optional<int> CudaPeerSums::Missing() const {
  const uint32_t missing = Word(params_.control->missing).load(std::memory_order_relaxed);
  if (missing == 0) return std::nullopt;
  return static_cast<int>(missing) - 1;
}

void CudaPeerSums::Vouch() {
  Word(params_.control->vouched).fetch_add(1, std::memory_order_relaxed);
}

void CudaPeerSums::Abort() { Word(params_.control->abort).store(1, std::memory_order_relaxed); }

}  // namespace shoal::cuda
