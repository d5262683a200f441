// Reader of GGUF, versions 2 and 3, one file or a split one.
//
// Layout (little-endian): "GGUF", u32 version, u64 tensors, u64 key-value pairs; the pairs (string
// key, u32 type, value); the tensor infos (string name, u32 dims, u64 dim[], u32 type, u64 offset);
// zeros up to the alignment; then the data section, in which a tensor lies at its offset. A string
// is a u64 length and the bytes, an array a u32 element type, a u64 count and the elements.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "shard/byte_reader.h"
#include "shard/checkpoint.h"

namespace shoal {

// What we accept. Real files stay far below; a hostile one cannot make us allocate much more than
// its header.
inline constexpr int64_t kGgufMaxHeaderBytes = int64_t{256} << 20;
inline constexpr int64_t kGgufMaxPairs = 1 << 16;
inline constexpr int64_t kGgufMaxTensors = 1 << 18;
inline constexpr int64_t kGgufMaxKeyBytes = 65535;  // the format's own limit
inline constexpr int64_t kGgufMaxNameBytes = 255;
inline constexpr int64_t kGgufMaxStringBytes = 16 << 20;
inline constexpr int64_t kGgufMaxArrayElems = 1 << 22;
inline constexpr int64_t kGgufMaxDim = int64_t{1} << 40;
inline constexpr int64_t kGgufMaxAlignment = 1 << 20;
inline constexpr int kGgufMaxParts = 512;

// The header of one file. Tensor offsets are absolute and checked: aligned, inside the file, not
// overlapping.
struct GgufHeader {
  uint32_t version = 0;
  int64_t alignment = 32;
  int64_t data_offset = 0;
  std::vector<std::pair<std::string, MetadataValue>> metadata;  // in file order, keys are unique
  std::vector<TensorInfo> tensors;                              // in file order, names are unique
};

absl::StatusOr<GgufHeader> ParseGgufHeader(const ByteSource& source);

// A checkpoint of these parts, in order (one, unless the metadata says that it is split).
absl::StatusOr<std::unique_ptr<Checkpoint>> OpenGguf(
    std::vector<std::unique_ptr<ByteSource>> parts);

}  // namespace shoal
