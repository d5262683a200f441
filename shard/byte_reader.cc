#include "shard/byte_reader.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <limits>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "kernels/status_macros.h"

namespace shoal {

static_assert(std::endian::native == std::endian::little,
              "files are little-endian and values are copied as they lie");

std::optional<int64_t> CheckedAdd(int64_t a, int64_t b) {
  int64_t sum;
  if (a < 0 || b < 0 || __builtin_add_overflow(a, b, &sum)) return std::nullopt;
  return sum;
}

std::optional<int64_t> CheckedMul(int64_t a, int64_t b) {
  int64_t product;
  if (a < 0 || b < 0 || __builtin_mul_overflow(a, b, &product)) return std::nullopt;
  return product;
}

std::optional<int64_t> CheckedAlignUp(int64_t a, int64_t alignment) {
  const std::optional<int64_t> up = CheckedAdd(a, alignment - 1);
  if (!up) return std::nullopt;
  return *up & ~(alignment - 1);
}

std::optional<int64_t> CheckedSize(uint64_t value, int64_t max) {
  if (value > static_cast<uint64_t>(max)) return std::nullopt;
  return static_cast<int64_t>(value);
}

std::string Printable(const std::string& text) {
  constexpr size_t kMaxPrinted = 128;
  if (text.size() > kMaxPrinted) {
    return absl::Utf8SafeCEscape(text.substr(0, kMaxPrinted)) + "...";
  }
  return absl::Utf8SafeCEscape(text);
}

namespace {

absl::Status ErrnoStatus(const std::string& name, const char* what, int error) {
  const std::string text = absl::StrCat(name, ": cannot ", what, ": ", std::strerror(error));
  if (error == ENOENT || error == ENOTDIR) return absl::NotFoundError(text);
  if (error == EACCES || error == EPERM) return absl::PermissionDeniedError(text);
  return absl::FailedPreconditionError(text);
}

class FileSource final : public ByteSource {
 public:
  FileSource(std::string name, int fd, int64_t size)
      : name_(std::move(name)), fd_(fd), size_(size) {}
  ~FileSource() override { close(fd_); }
  FileSource(const FileSource&) = delete;
  FileSource& operator=(const FileSource&) = delete;

  const std::string& name() const override { return name_; }
  int64_t size() const override { return size_; }

  absl::Status ReadAt(int64_t offset, int64_t n, uint8_t* out) const override {
    while (n > 0) {
      const ssize_t got = pread(fd_, out, n, offset);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) return ErrnoStatus(name_, "read", errno);
      if (got == 0) {
        return absl::DataLossError(absl::StrCat(name_, ": ends at byte ", offset,
                                                " although it had ", size_,
                                                " bytes when it was opened; "
                                                "the file was cut while in use"));
      }
      offset += got;
      out += got;
      n -= got;
    }
    return absl::OkStatus();
  }

  void WillNeed(int64_t offset, int64_t n) const override {
    posix_fadvise(fd_, offset, n, POSIX_FADV_WILLNEED);
  }

 private:
  const std::string name_;
  const int fd_;
  const int64_t size_;
};

class MemorySource final : public ByteSource {
 public:
  MemorySource(std::string name, absl::Span<const uint8_t> bytes)
      : name_(std::move(name)), bytes_(bytes) {}
  const std::string& name() const override { return name_; }
  int64_t size() const override { return static_cast<int64_t>(bytes_.size()); }
  absl::Status ReadAt(int64_t offset, int64_t n, uint8_t* out) const override {
    const std::optional<int64_t> end = CheckedAdd(offset, n);
    if (!end || *end > size()) {
      return absl::DataLossError(absl::StrCat(name_, ": has no bytes at ", offset));
    }
    if (n > 0) std::memcpy(out, bytes_.data() + offset, n);
    return absl::OkStatus();
  }

 private:
  const std::string name_;
  const absl::Span<const uint8_t> bytes_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<ByteSource>> OpenFileSource(const std::string& path) {
  // O_NONBLOCK: opening a FIFO must not wait for a writer.
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) return ErrnoStatus(path, "open", errno);
  struct stat info;
  if (fstat(fd, &info) != 0) {
    const int error = errno;
    close(fd);
    return ErrnoStatus(path, "examine", error);
  }
  if (!S_ISREG(info.st_mode)) {
    close(fd);
    return absl::FailedPreconditionError(
        absl::StrCat(path, ": is ", S_ISDIR(info.st_mode) ? "a directory" : "no regular file",
                     ", expected a model file (.gguf)"));
  }
  return std::make_unique<FileSource>(path, fd, info.st_size);
}

std::unique_ptr<ByteSource> MakeMemorySource(std::string name, absl::Span<const uint8_t> bytes) {
  return std::make_unique<MemorySource>(std::move(name), bytes);
}

ByteReader::ByteReader(const ByteSource& source, int64_t limit)
    : source_(source), end_(std::min(source.size(), limit)) {}

absl::Status ByteReader::Error(const std::string& message) const {
  return absl::InvalidArgumentError(
      absl::StrCat(source_.name(), ": at byte ", position(), ": ", message));
}

absl::Status ByteReader::Refill() {
  constexpr int64_t kWindowBytes = 256 << 10;
  const int64_t begin = position();
  window_.resize(std::min(kWindowBytes, end_ - begin));
  window_begin_ = begin;
  cursor_ = 0;
  return source_.ReadAt(begin, static_cast<int64_t>(window_.size()), window_.data());
}

absl::Status ByteReader::Bytes(int64_t n, void* out, const char* what) {
  if (n > remaining()) {
    return Error(absl::StrCat("the file is too short: ", what, " takes ", n, " bytes, ",
                              remaining(), " remain"));
  }
  auto* to = static_cast<uint8_t*>(out);
  while (n > 0) {
    int64_t here = static_cast<int64_t>(window_.size()) - cursor_;
    if (here == 0) {
      SHOAL_RETURN_IF_ERROR(Refill());
      here = static_cast<int64_t>(window_.size());
    }
    const int64_t step = std::min(n, here);
    std::memcpy(to, window_.data() + cursor_, step);
    cursor_ += step;
    to += step;
    n -= step;
  }
  return absl::OkStatus();
}

absl::StatusOr<int64_t> ByteReader::Count(const char* what, int64_t max, int64_t bytes_each) {
  SHOAL_ASSIGN_OR_RETURN(const uint64_t count, Value<uint64_t>(what));
  const std::optional<int64_t> checked = CheckedSize(count, max);
  if (!checked) return Error(absl::StrCat(what, " is ", count, ", at most ", max, " is accepted"));
  const std::optional<int64_t> bytes = CheckedMul(*checked, bytes_each);
  if (!bytes || *bytes > remaining()) {
    return Error(absl::StrCat("the file is too short: ", what, " is ", count, ", which takes ",
                              bytes_each, " bytes or more each, ", remaining(), " remain"));
  }
  return *checked;
}

absl::StatusOr<std::string> ByteReader::String(const char* what, int64_t max_bytes) {
  SHOAL_ASSIGN_OR_RETURN(const int64_t n, Count(what, max_bytes, 1));
  std::string text(n, '\0');
  SHOAL_RETURN_IF_ERROR(Bytes(n, text.data(), what));
  return text;
}

}  // namespace shoal
