// Writes a small GGUF (version 3) in memory: metadata, and tensors as they are.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "shard/checkpoint.h"

namespace shoal {

class SmallGgufWriter {
 public:
  void AddMetadata(const std::string& key, const MetadataValue& value);
  void AddTensor(const TensorInfo& info, std::string data);  // info's name, type and dims
  std::string Finish() const;

 private:
  int64_t pairs_ = 0;
  std::string metadata_;
  std::vector<std::pair<TensorInfo, std::string>> tensors_;
};

}  // namespace shoal
