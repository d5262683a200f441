// A checkpoint as the rest of shoal sees it: metadata, and tensors whose rows can be read.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/dtype.h"

namespace shoal {

// Arrays of any GGUF integer or float type are widened; bool counts as an integer.
using MetadataValue =
    std::variant<uint64_t, int64_t, double, bool, std::string, std::vector<int64_t>,
                 std::vector<double>, std::vector<std::string>>;

struct TensorInfo {
  std::string name;
  DType type = DType::kF32;
  // dims[0] is the contiguous axis (in_features), then out_features, then experts; always 1..3
  // entries.
  std::vector<int64_t> dims;
  int64_t bytes = 0;
  int file = 0;        // part of a split checkpoint
  int64_t offset = 0;  // absolute, in that file

  int64_t cols() const { return dims[0]; }
  int64_t rows() const { return dims.size() > 1 ? dims[1] : 1; }
  int64_t matrices() const { return dims.size() > 2 ? dims[2] : 1; }
};

// Immutable after opening; readable from any thread.
class Checkpoint {
 public:
  virtual ~Checkpoint() = default;
  virtual const std::vector<TensorInfo>& tensors() const = 0;
  virtual const TensorInfo* FindTensor(const std::string& name) const = 0;  // null when absent
  virtual const MetadataValue* FindMetadata(const std::string& key) const = 0;
  virtual std::vector<std::string> MetadataKeys() const = 0;
  // Copies bytes [begin, begin + n) of the tensor's data. kDataLoss when the file shrank meanwhile.
  virtual absl::Status Read(const TensorInfo& tensor, int64_t begin, int64_t n,
                            uint8_t* out) const = 0;
  // A hint that these bytes are read soon, so that the disk starts now.
  virtual void WillNeed(const TensorInfo& tensor, int64_t begin, int64_t n) const {}
  virtual std::vector<std::string> Files() const = 0;  // never empty
  virtual int64_t TotalBytes() const = 0;              // of all tensors' data
};

// Opens a GGUF (any part of a split one) or a shard directory. kNotFound / kPermissionDenied for
// files that cannot be read (exit 66), kInvalidArgument for malformed ones (exit 65),
// kUnimplemented for unknown tensor types.
absl::StatusOr<std::unique_ptr<Checkpoint>> OpenCheckpoint(const std::string& path);

// Typed metadata access with range checks; errors name the key, what was found and what was
// expected.
absl::StatusOr<int64_t> MetadataInt(const Checkpoint& c, const std::string& key, int64_t min,
                                    int64_t max);
absl::StatusOr<double> MetadataFloat(const Checkpoint& c, const std::string& key);
absl::StatusOr<std::string> MetadataString(const Checkpoint& c, const std::string& key);

}  // namespace shoal
