#include "parallel/batch.h"

#include <array>
#include <cstring>
#include <type_traits>

#include "absl/strings/str_cat.h"

namespace shoal {
namespace {

constexpr int64_t kFirstMessageBytes = 2048;
constexpr uint32_t kMaxElements = 1u << 24;

class Writer {
 public:
  template <typename T>
  void Value(const T& v) {
    static_assert(std::is_trivially_copyable_v<T>);
    const auto* p = reinterpret_cast<const uint8_t*>(&v);
    bytes_.insert(bytes_.end(), p, p + sizeof(T));
  }
  template <typename T>
  void Array(const std::vector<T>& v) {
    static_assert(std::is_trivially_copyable_v<T>);
    Value(static_cast<uint32_t>(v.size()));
    const auto* p = reinterpret_cast<const uint8_t*>(v.data());
    bytes_.insert(bytes_.end(), p, p + v.size() * sizeof(T));
  }
  std::vector<uint8_t> Take() { return std::move(bytes_); }

 private:
  std::vector<uint8_t> bytes_;
};

class Reader {
 public:
  explicit Reader(absl::Span<const uint8_t> bytes) : bytes_(bytes) {}
  template <typename T>
  bool Value(T& v) {
    if (bytes_.size() < sizeof(T)) return false;
    std::memcpy(&v, bytes_.data(), sizeof(T));
    bytes_.remove_prefix(sizeof(T));
    return true;
  }
  template <typename T>
  bool Array(std::vector<T>& v) {
    uint32_t count = 0;
    if (!Value(count) || count > kMaxElements || bytes_.size() < count * sizeof(T)) return false;
    v.resize(count);
    if (count > 0) std::memcpy(v.data(), bytes_.data(), count * sizeof(T));
    bytes_.remove_prefix(count * sizeof(T));
    return true;
  }

 private:
  absl::Span<const uint8_t> bytes_;
};

}  // namespace

std::vector<uint8_t> EncodeBatch(const Batch& batch) {
  Writer w;
  w.Value(batch.kind);
  w.Value(batch.step);
  w.Value(batch.decode_rows);
  w.Value(batch.prefill_head);
  w.Array(batch.tokens);
  w.Array(batch.runs);
  w.Array(batch.pages);
  w.Array(batch.table);
  w.Array(batch.logits);
  w.Array(batch.fetch);
  return w.Take();
}

absl::StatusOr<Batch> DecodeBatch(absl::Span<const uint8_t> bytes) {
  Reader r(bytes);
  Batch b;
  if (!r.Value(b.kind) || !r.Value(b.step) || !r.Value(b.decode_rows) || !r.Value(b.prefill_head) ||
      !r.Array(b.tokens) || !r.Array(b.runs) || !r.Array(b.pages) || !r.Array(b.table) ||
      !r.Array(b.logits) || !r.Array(b.fetch)) {
    return absl::InternalError(absl::StrCat("a batch of ", bytes.size(),
                                            " bytes ends early: do all ranks run the same shoal?"));
  }
  return b;
}

absl::Status BroadcastBatch(Communicator& world, Batch& batch) {
  if (world.size() == 1) return absl::OkStatus();
  std::array<uint8_t, kFirstMessageBytes> first{};
  std::vector<uint8_t> bytes;
  uint64_t size = 0;
  if (world.rank() == 0) {
    bytes = EncodeBatch(batch);
    size = bytes.size();
    std::memcpy(first.data(), &size, sizeof size);
    std::memcpy(first.data() + sizeof size, bytes.data(),
                std::min<size_t>(bytes.size(), first.size() - sizeof size));
  }
  if (absl::Status s = world.Broadcast(first.data(), first.size(), 0); !s.ok()) return s;
  std::memcpy(&size, first.data(), sizeof size);
  const uint64_t fits = first.size() - sizeof size;
  if (size > fits) {
    bytes.resize(size);
    if (absl::Status s = world.Broadcast(bytes.data() + fits, size - fits, 0); !s.ok()) return s;
  }
  if (world.rank() == 0) return absl::OkStatus();
  bytes.resize(size);
  std::memcpy(bytes.data(), first.data() + sizeof size, std::min(size, fits));
  absl::StatusOr<Batch> decoded = DecodeBatch(bytes);
  if (!decoded.ok()) return decoded.status();
  batch = *std::move(decoded);
  return absl::OkStatus();
}

}  // namespace shoal
