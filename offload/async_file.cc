#include "offload/async_file.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "offload/memory_budget.h"

namespace shoal {
namespace {

// A transfer that keeps coming back interrupted or short is given up after this many tries.
constexpr int kRetriesMax = 100;

absl::Status OpenError(const std::string& path, int error) {
  std::string text = absl::StrCat("cannot open ", path, ": ", strerror(error));
  if (error == ENOENT) return absl::NotFoundError(text);
  if (error == EACCES || error == EPERM) return absl::PermissionDeniedError(text);
  if (error == ENOSPC) return absl::ResourceExhaustedError(text);
  return absl::UnavailableError(text);
}

absl::Status PieceError(const IoPiece& piece, const std::string& path, int error) {
  std::string text = absl::StrCat(piece.write ? "writing " : "reading ", path, " at byte ",
                                  piece.offset, ": ", strerror(error));
  if (error == ENOSPC || error == EDQUOT || error == EFBIG) {
    return absl::ResourceExhaustedError(text);
  }
  return absl::UnavailableError(text);
}

}  // namespace

absl::StatusOr<std::unique_ptr<AsyncFile>> AsyncFile::Open(const std::string& path,
                                                           const Options& options) {
  std::unique_ptr<AsyncFile> file(new AsyncFile());
  file->path_ = path;
  file->fault_ = options.fault;
  int flags = O_CLOEXEC | (options.write ? O_RDWR : O_RDONLY);
  if (options.create) flags |= O_CREAT | O_TRUNC;
  file->fd_ = open(path.c_str(), flags | O_DIRECT, 0644);
  file->direct_ = file->fd_ >= 0;
  if (file->fd_ < 0 && errno == EINVAL) file->fd_ = open(path.c_str(), flags, 0644);
  if (file->fd_ < 0) return OpenError(path, errno);
  struct stat st;
  if (fstat(file->fd_, &st) != 0) return OpenError(path, errno);
  if (!S_ISREG(st.st_mode)) return OpenError(path, S_ISDIR(st.st_mode) ? EISDIR : EINVAL);
  file->size_ = st.st_size;
  file->slots_.resize(kIoDepthMax);
  if (options.engine != IoEngine::kThreads) {
    absl::StatusOr<std::unique_ptr<IoQueue>> ring = MakeUringQueue(kIoDepthMax);
    if (ring.ok()) {
      file->queue_ = *std::move(ring);
    } else if (options.engine == IoEngine::kUring) {
      return ring.status();
    } else {
      file->engine_note_ = absl::StrCat(" (", ring.status().message(), ")");
    }
  }
  if (file->queue_ == nullptr) file->queue_ = MakeThreadQueue(8);
  return file;
}

AsyncFile::~AsyncFile() {
  std::vector<IoDone> done;
  while (in_flight_ > 0) Wait(&done);
  queue_.reset();
  if (fd_ >= 0) close(fd_);
}

void AsyncFile::Submit(const IoPiece& piece) {
  SHOAL_CHECK(in_flight_ < kIoDepthMax, "too many pieces in flight");
  SHOAL_CHECK(
      (piece.offset | piece.bytes | static_cast<int64_t>(reinterpret_cast<uintptr_t>(piece.data))) %
              kIoAlignment ==
          0,
      "unaligned piece");
  size_t slot = 0;
  while (slots_[slot].used) slot++;
  slots_[slot] = {piece, 0, 0, 0, true};
  in_flight_++;
  if (fault_) slots_[slot].fault = fault_(piece);
  if (slots_[slot].fault != 0) {
    faulted_.push_back(static_cast<int>(slot));
  } else {
    Push(static_cast<int>(slot));
  }
}

void AsyncFile::Push(int slot) {
  const Slot& s = slots_[slot];
  queue_->Push({s.piece.write, fd_, s.piece.offset + s.moved, s.piece.data + s.moved,
                s.piece.bytes - s.moved, static_cast<uint64_t>(slot)});
}

bool AsyncFile::Finish(int slot, int64_t result, IoDone* done) {
  Slot& s = slots_[slot];
  absl::Status status;
  bool again = result == -EINTR || result == -EAGAIN || result > 0;
  if (result > 0) {
    s.moved += result;
    // O_DIRECT goes on only from an aligned place; a transfer that stops elsewhere met the end of
    // the file.
    if (s.moved < s.piece.bytes && s.moved % kIoAlignment != 0) again = false;
  }
  if (s.moved < s.piece.bytes) {
    if (again && s.retries++ < kRetriesMax) {
      Push(slot);
      return false;
    }
    if (result < 0) {
      status = PieceError(s.piece, path_, static_cast<int>(-result));
    } else {
      status = absl::DataLossError(absl::StrCat(path_, " ends at byte ", s.piece.offset + s.moved,
                                                ", but the piece at ", s.piece.offset, " needs ",
                                                s.piece.bytes, " bytes: the file was cut"));
    }
  }
  if (!direct_) posix_fadvise(fd_, s.piece.offset, s.piece.bytes, POSIX_FADV_DONTNEED);
  *done = {s.piece.tag, s.moved, std::move(status)};
  s.used = false;
  in_flight_--;
  return true;
}

void AsyncFile::Wait(std::vector<IoDone>* done) {
  SHOAL_CHECK(in_flight_ > 0, "waiting for nothing");
  size_t before = done->size();
  IoDone one;
  for (int slot : faulted_) {
    if (Finish(slot, -slots_[slot].fault, &one)) done->push_back(std::move(one));
  }
  faulted_.clear();
  while (done->size() == before) {
    results_.clear();
    queue_->Wait(&results_);
    for (const IoQueue::Result& r : results_) {
      if (Finish(static_cast<int>(r.id), r.result, &one)) done->push_back(std::move(one));
    }
  }
}

absl::Status AsyncFile::Transfer(bool write, int64_t offset, uint8_t* data, int64_t bytes,
                                 int depth) {
  SHOAL_CHECK(in_flight_ == 0, "transfer while pieces are in flight");
  absl::Status status;
  std::vector<IoDone> done;
  int64_t next = 0;
  while ((next < bytes && status.ok()) || in_flight_ > 0) {
    while (next < bytes && status.ok() && in_flight_ < std::min(depth, kIoDepthMax)) {
      int64_t n = std::min(kIoPieceBytes, bytes - next);
      Submit({write, offset + next, data + next, n, 0});
      next += n;
    }
    done.clear();
    Wait(&done);
    for (IoDone& d : done) status.Update(d.status);
  }
  return status;
}

absl::Status AsyncFile::Sync() {
  if (fdatasync(fd_) == 0) return absl::OkStatus();
  return PieceError({true}, path_, errno);
}

absl::Status AsyncFile::Reserve(int64_t offset, int64_t bytes) {
  if (fallocate(fd_, 0, offset, bytes) == 0 || errno == EOPNOTSUPP || errno == ENOSYS) {
    return absl::OkStatus();
  }
  if (errno != ENOSPC && errno != EDQUOT) return PieceError({true}, path_, errno);
  struct statvfs fs = {};
  fstatvfs(fd_, &fs);
  return absl::ResourceExhaustedError(absl::StrCat(
      path_, " needs ", FormatBytes(bytes), " more, its file system has ",
      FormatBytes(static_cast<int64_t>(fs.f_bavail) * static_cast<int64_t>(fs.f_frsize)),
      " free: make room or choose another folder"));
}

std::string AsyncFile::Describe() const {
  return absl::StrCat(queue_->Describe(), engine_note_, direct_ ? ", direct" : ", buffered");
}

void DepthTuner::OnBytes(int64_t bytes, bool saturated, double now_s) {
  if (done_) return;
  if (!saturated || bytes_ < 0) {
    bytes_ = saturated ? 0 : -1;
    start_s_ = now_s;
    return;
  }
  bytes_ += bytes;
  if (bytes_ < kWindowBytes || now_s <= start_s_) return;
  constexpr int kCount = std::size(kCandidates);
  double& rate = best_rate_[step_ % kCount];
  rate = std::max(rate, bytes_ / (now_s - start_s_));
  bytes_ = -1;
  if (++step_ < kCount * kRounds) {
    depth_ = kCandidates[step_ % kCount];
    return;
  }
  done_ = true;
  double best = *std::max_element(best_rate_, best_rate_ + kCount);
  // The smallest depth within 3 % of the best: deeper queues only delay demand reads.
  depth_ = kIoDepthMax;
  for (int i = 0; i < kCount; i++) {
    if (best_rate_[i] >= 0.97 * best) depth_ = std::min(depth_, kCandidates[i]);
  }
}

}  // namespace shoal
