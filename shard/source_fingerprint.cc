#include "shard/source_fingerprint.h"

#include <algorithm>
#include <string>
#include <type_traits>
#include <variant>
#include <vector>

#include "kernels/status_macros.h"
#include "shard/shard_file.h"
#include "xxhash.h"

namespace shoal {

absl::StatusOr<uint64_t> SourceFingerprint(const Checkpoint& checkpoint) {
  if (const auto* shards = dynamic_cast<const ShardDirectory*>(&checkpoint)) {
    return shards->manifest().fingerprint;
  }
  std::vector<uint8_t> sample;
  uint64_t hash = kShardFormatVersion;
  const auto mix = [&hash](const void* data, size_t n) {
    hash = XXH3_64bits_withSeed(data, n, hash);
  };
  for (const std::string& key : checkpoint.MetadataKeys()) {
    mix(key.data(), key.size());
    const MetadataValue& v = *checkpoint.FindMetadata(key);
    std::visit(
        [&mix](const auto& x) {
          using T = std::decay_t<decltype(x)>;
          if constexpr (std::is_arithmetic_v<T>) {
            mix(&x, sizeof x);
          } else if constexpr (std::is_same_v<T, std::vector<std::string>>) {
            for (const std::string& s : x) mix(s.data(), s.size() + 1);
          } else {
            mix(x.data(), x.size() * sizeof(x[0]));
          }
        },
        v);
  }
  for (const TensorInfo& t : checkpoint.tensors()) {
    mix(t.name.data(), t.name.size());
    mix(t.dims.data(), t.dims.size() * sizeof(t.dims[0]));
    mix(&t.type, sizeof t.type);
    sample.resize(std::min<int64_t>(t.bytes, 4096));
    for (const int64_t begin :
         {int64_t{0}, t.bytes / 2, t.bytes - static_cast<int64_t>(sample.size())}) {
      const int64_t n = std::min<int64_t>(static_cast<int64_t>(sample.size()), t.bytes - begin);
      SHOAL_RETURN_IF_ERROR(checkpoint.Read(t, begin, n, sample.data()));
      mix(sample.data(), n);
    }
  }
  return hash;
}

}  // namespace shoal
