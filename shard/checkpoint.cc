#include "shard/checkpoint.h"

#include <cmath>
#include <cstdlib>
#include <optional>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/status_macros.h"
#include "shard/byte_reader.h"
#include "shard/gguf.h"
#include "shard/shard_file.h"

namespace shoal {
namespace {

// "<prefix>-00002-of-00005.gguf", as llama-gguf-split names the parts.
struct SplitName {
  std::string prefix;
  int part = 0;  // from 1
  int parts = 0;
};

std::optional<SplitName> ParseSplitName(const std::string& path) {
  constexpr size_t kTail = sizeof("-00001-of-00005.gguf") - 1;
  if (path.size() <= kTail) return std::nullopt;
  const std::string tail = path.substr(path.size() - kTail);
  SplitName name{path.substr(0, path.size() - kTail)};
  const bool fits = tail[0] == '-' && tail.substr(6, 4) == "-of-" && tail.substr(15) == ".gguf" &&
                    absl::SimpleAtoi(tail.substr(1, 5), &name.part) &&
                    absl::SimpleAtoi(tail.substr(10, 5), &name.parts);
  if (!fits || name.part < 1 || name.part > name.parts || name.parts > kGgufMaxParts) {
    return std::nullopt;
  }
  return name;
}

std::string KindOf(const MetadataValue& value) {
  constexpr const char* kNames[] = {
      "an unsigned integer",
      "an integer",
      "a number",
      "a bool",
      "a string",
      "an array of integers",
      "an array of numbers",
      "an array of strings",
  };
  static_assert(std::variant_size_v<MetadataValue> == std::size(kNames));
  return kNames[value.index()];
}

std::string Where(const Checkpoint& c) { return c.Files().empty() ? "model" : c.Files()[0]; }

absl::Status WrongKind(const Checkpoint& c, const std::string& key, const MetadataValue* value,
                       const char* expected) {
  return absl::InvalidArgumentError(
      absl::StrCat(Where(c), ": metadata key '", key, "' ",
                   value == nullptr ? "is missing" : absl::StrCat("holds ", KindOf(*value)),
                   ", expected ", expected));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Checkpoint>> OpenCheckpoint(const std::string& path) {
  if (IsDirectory(path)) {
    absl::StatusOr<std::unique_ptr<ShardDirectory>> shards = ShardDirectory::Open(path);
    if (absl::IsNotFound(shards.status())) {
      return absl::FailedPreconditionError(shards.status().message());
    }
    SHOAL_RETURN_IF_ERROR(shards.status());
    return *std::move(shards);
  }
  SHOAL_ASSIGN_OR_RETURN(std::unique_ptr<ByteSource> file, OpenFileSource(path));
  const std::optional<SplitName> split = ParseSplitName(path);
  std::vector<std::unique_ptr<ByteSource>> parts;
  if (!split || split->parts == 1) {
    parts.push_back(std::move(file));
    return OpenGguf(std::move(parts));
  }
  for (int part = 1; part <= split->parts; ++part) {
    if (part == split->part) {
      parts.push_back(std::move(file));
      continue;
    }
    const std::string name =
        absl::StrFormat("%s-%05d-of-%05d.gguf", split->prefix, part, split->parts);
    absl::StatusOr<std::unique_ptr<ByteSource>> other = OpenFileSource(name);
    if (!other.ok()) {
      return absl::Status(other.status().code(),
                          absl::StrCat(other.status().message(), " (", path, " is one of ",
                                       split->parts, " parts and needs all of them)"));
    }
    parts.push_back(*std::move(other));
  }
  return OpenGguf(std::move(parts));
}

absl::StatusOr<int64_t> MetadataInt(const Checkpoint& c, const std::string& key, int64_t min,
                                    int64_t max) {
  const MetadataValue* value = c.FindMetadata(key);
  const std::string expected = absl::StrCat("an integer from ", min, " to ", max);
  if (value == nullptr) return WrongKind(c, key, value, expected.c_str());
  std::optional<int64_t> n;
  if (const auto* u = std::get_if<uint64_t>(value)) {
    n = CheckedSize(*u, INT64_MAX);
  } else if (const auto* i = std::get_if<int64_t>(value)) {
    n = *i;
  } else {
    return WrongKind(c, key, value, expected.c_str());
  }
  if (!n || *n < min || *n > max) {
    return absl::InvalidArgumentError(absl::StrCat(Where(c), ": metadata key '", key, "' is ",
                                                   n ? absl::StrCat(*n) : "above 2^63",
                                                   ", expected ", expected));
  }
  return *n;
}

absl::StatusOr<double> MetadataFloat(const Checkpoint& c, const std::string& key) {
  const MetadataValue* value = c.FindMetadata(key);
  if (value == nullptr) return WrongKind(c, key, value, "a number");
  double number = 0;
  if (const auto* d = std::get_if<double>(value)) {
    number = *d;
  } else if (const auto* u = std::get_if<uint64_t>(value)) {
    number = static_cast<double>(*u);
  } else if (const auto* i = std::get_if<int64_t>(value)) {
    number = static_cast<double>(*i);
  } else {
    return WrongKind(c, key, value, "a number");
  }
  if (!std::isfinite(number)) {
    return absl::InvalidArgumentError(absl::StrCat(Where(c), ": metadata key '", key, "' is ",
                                                   number, ", expected a finite number"));
  }
  return number;
}

absl::StatusOr<std::string> MetadataString(const Checkpoint& c, const std::string& key) {
  const MetadataValue* value = c.FindMetadata(key);
  if (value == nullptr || !std::holds_alternative<std::string>(*value)) {
    return WrongKind(c, key, value, "a string");
  }
  return std::get<std::string>(*value);
}

}  // namespace shoal
