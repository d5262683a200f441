#include "kernels/buffer.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"

namespace shoal {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

size_t RoundUp(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

absl::Status Refused(size_t bytes, int error) {
  const int64_t free_pages = sysconf(_SC_AVPHYS_PAGES);
  return absl::ResourceExhaustedError(
      absl::StrCat("cannot allocate ", bytes, " bytes: ", std::strerror(error), " (",
                   free_pages * sysconf(_SC_PAGESIZE), " bytes are free)"));
}

}  // namespace

absl::StatusOr<Buffer> Buffer::Allocate(size_t bytes) {
  Buffer buffer;
  if (bytes == 0) return buffer;
  if (bytes > std::numeric_limits<size_t>::max() / 2) return Refused(bytes, ENOMEM);
  const bool huge = bytes >= kHugePage;
  const size_t size = RoundUp(bytes, static_cast<size_t>(sysconf(_SC_PAGESIZE)));
  // mmap aligns to 4 KiB only: map up to 2 MiB more and return what lies before and after.
  const size_t mapped = huge ? size + kHugePage : size;
  void* map = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) return Refused(bytes, errno);
  uint8_t* begin = static_cast<uint8_t*>(map);
  if (huge) {
    const size_t head =
        RoundUp(reinterpret_cast<size_t>(begin), kHugePage) - reinterpret_cast<size_t>(begin);
    const size_t tail = mapped - head - size;
    if (head > 0) munmap(begin, head);
    if (tail > 0) munmap(begin + head + size, tail);
    begin += head;
    madvise(begin, size, MADV_HUGEPAGE);  // a hint: small pages are slower, not wrong
  }
  buffer.data_ = begin;
  buffer.size_ = bytes;
  buffer.mapped_ = size;
  return buffer;
}

Buffer::Buffer(Buffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      mapped_(std::exchange(other.mapped_, 0)) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(mapped_, other.mapped_);
  return *this;
}

Buffer::~Buffer() {
  if (data_ != nullptr) munmap(data_, mapped_);
}

}  // namespace shoal
