// Bytes from outside: where they come from, and the one place where their sizes are checked.
//
// Every count, length, dimension and offset of a file passes through ByteReader or the Checked
// functions below, so no other code does arithmetic on numbers that a stranger chose.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace shoal {

// Arithmetic on non-negative sizes: no value when the result does not fit in int64_t (or an operand
// is negative).
std::optional<int64_t> CheckedAdd(int64_t a, int64_t b);
std::optional<int64_t> CheckedMul(int64_t a, int64_t b);
// The next multiple of `alignment`, a power of two.
std::optional<int64_t> CheckedAlignUp(int64_t a, int64_t alignment);
// A size read from a file: no value when it is above `max`.
std::optional<int64_t> CheckedSize(uint64_t value, int64_t max);

// A name from a file, safe to print on a terminal.
std::string Printable(const std::string& text);

// A fixed run of bytes that is read by position. Thread-safe.
class ByteSource {
 public:
  virtual ~ByteSource() = default;
  virtual const std::string& name() const = 0;
  virtual int64_t size() const = 0;
  // kDataLoss when the source no longer has these bytes.
  virtual absl::Status ReadAt(int64_t offset, int64_t n, uint8_t* out) const = 0;
  // A hint: this range is read soon.
  virtual void WillNeed(int64_t offset, int64_t n) const {}
};

// A regular file, read with pread: a file that shrinks gives an error, never a signal.
// kNotFound, kPermissionDenied, or kFailedPrecondition for what is no regular file or cannot be
// read.
absl::StatusOr<std::unique_ptr<ByteSource>> OpenFileSource(const std::string& path);
// Does not own `bytes`, which outlive the source.
std::unique_ptr<ByteSource> MakeMemorySource(std::string name, absl::Span<const uint8_t> bytes);

// Reads little-endian values in order. Errors are kInvalidArgument and name the file, the position
// and `what`. `limit` bounds how far it may go (the largest header we accept).
class ByteReader {
 public:
  ByteReader(const ByteSource& source, int64_t limit);

  int64_t position() const { return window_begin_ + cursor_; }
  int64_t remaining() const { return end_ - position(); }

  absl::Status Bytes(int64_t n, void* out, const char* what);
  template <typename T>
  absl::StatusOr<T> Value(const char* what) {
    T value;
    if (absl::Status s = Bytes(sizeof(T), &value, what); !s.ok()) return s;
    return value;
  }
  // A u64 count of things that take at least `bytes_each` bytes here: above `max`, or more than
  // what remains could hold, is an error. So what is allocated for it is bounded by the file.
  absl::StatusOr<int64_t> Count(const char* what, int64_t max, int64_t bytes_each);
  // u64 length, then the bytes.
  absl::StatusOr<std::string> String(const char* what, int64_t max_bytes);

  absl::Status Error(const std::string& message) const;

 private:
  absl::Status Refill();

  const ByteSource& source_;
  int64_t end_;  // readable bytes of the source: min(size, limit)
  std::vector<uint8_t> window_;
  int64_t window_begin_ = 0;  // position of window_[0]
  int64_t cursor_ = 0;        // next byte in window_
};

}  // namespace shoal
