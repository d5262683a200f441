// The file that one rank's KV pages lie in: its format, and opening it so that nothing in it is
// believed unseen. README.md ("KV pages on disk") restates the format.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "offload/async_file.h"

namespace shoal {

// A page is up to 16 blocks of one sequence, 256 tokens aligned to positions that are multiples of
// 256: one run of attention, so that a page can be attended by itself.
inline constexpr int kKvPageBlocks = 16;
inline constexpr uint32_t kKvFileVersion = 1;
inline constexpr int64_t kKvFileHeaderBytes = 4096;
inline constexpr char kKvFileMagic[8] = {'S', 'H', 'O', 'A', 'L', 'K', 'V', 'P'};

// 128 bits that name a model with its plan (a file) or a prefix (a page).
struct KvName {
  uint64_t low = 0;
  uint64_t high = 0;
  friend bool operator==(const KvName&, const KvName&) = default;
};

// What a rank holds of a page. A record is [header][part of layer 0][part of layer 1]..., a part is
// [block][K, V] of one layer; header and parts are padded to 4 KiB.
struct KvPageShape {
  int layers = 0;
  int64_t block_bytes = 0;  // of one layer

  int64_t part_bytes() const { return Padded(kKvPageBlocks * block_bytes); }
  int64_t header_bytes() const;
  int64_t record_bytes() const { return header_bytes() + layers * part_bytes(); }
  int64_t record_offset(int record) const { return kKvFileHeaderBytes + record * record_bytes(); }
  int64_t part_offset(int record, int layer) const {
    return record_offset(record) + header_bytes() + layer * part_bytes();
  }
  static int64_t Padded(int64_t bytes) {
    return (bytes + kIoAlignment - 1) / kIoAlignment * kIoAlignment;
  }
};

struct KvFileHeader {
  char magic[8];
  uint32_t version;
  uint32_t layers;
  int64_t block_bytes;
  KvName key;         // model, plan, KV type
  uint64_t checksum;  // xxh3 of the bytes before it
};
static_assert(sizeof(KvFileHeader) == 48 && offsetof(KvFileHeader, key) == 24 &&
              offsetof(KvFileHeader, checksum) == 40);

struct KvRecordHeader {
  uint64_t checksum;  // xxh3 of what follows, parts' checksums included, seeded by the file's key
  uint64_t stamp;     // grows with each page written
  uint32_t blocks;    // 1 to 16
  uint32_t layers;
  KvName prefix[kKvPageBlocks];  // the prefixes that end with each block; zeros behind the last
  // Then for each layer the xxh3 of the blocks * block_bytes bytes of its part.
};
static_assert(sizeof(KvRecordHeader) == 280 && offsetof(KvRecordHeader, prefix) == 24);

inline int64_t KvPageShape::header_bytes() const {
  return Padded(static_cast<int64_t>(sizeof(KvRecordHeader)) + layers * int64_t{8});
}

// What is known of a page on disk.
struct KvRecord {
  std::vector<KvName> prefix;  // that ends with each of its blocks; empty: no page
  uint64_t stamp = 0;
  std::vector<uint64_t> checksums;  // of each layer's part

  int blocks() const { return static_cast<int>(prefix.size()); }
};

// `out` has shape.header_bytes() bytes.
void EncodeKvRecord(const KvRecord& record, const KvPageShape& shape, const KvName& key,
                    uint8_t* out);
// False for anything but what EncodeKvRecord made under the same key and shape.
bool DecodeKvRecord(const uint8_t* bytes, const KvPageShape& shape, const KvName& key,
                    KvRecord* record);

// What a page file holds, read by someone who is not its owner.
struct KvPageIndex {
  KvPageShape shape;
  std::vector<KvRecord> records;  // empty ones where there is no page
};
// kDataLoss when fd is no page file of this version.
absl::StatusOr<KvPageIndex> ReadKvPageIndex(int fd);

struct KvFileOptions {
  std::string dir;
  bool keep = false;  // the pages outlive the process; else the file has no name
  KvName key;
  KvPageShape shape;
  int records = 0;            // the file's limit
  int64_t dir_bytes_max = 0;  // of all page files in `dir` that have names; 0: no limit
  bool reserve = false;  // take all of the disk's space now; kResourceExhausted when it lacks it
  IoEngine engine = IoEngine::kAuto;
  std::function<int(const IoPiece&)> fault;  // tests
};

// An open page file. Holds a lock on it: no other process writes into the same one.
struct KvPageFile {
  ~KvPageFile();
  std::unique_ptr<AsyncFile> file;
  std::vector<KvRecord> found;  // [records that the file has]; empty where none is valid
  // Why pages of an earlier run are not used, or those of this one will not be kept; empty if
  // neither.
  std::string note;
  int lock_fd = -1;
};

// Makes `dir` when it is missing. An error only when pages cannot be written there at all.
absl::StatusOr<std::unique_ptr<KvPageFile>> OpenKvPageFile(const KvFileOptions& options);

}  // namespace shoal
