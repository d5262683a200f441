#include "shard/gguf.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <optional>
#include <type_traits>
#include <variant>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/status_macros.h"

namespace shoal {
namespace {

// Value types of metadata.
enum GgufType : uint32_t {
  kU8,
  kI8,
  kU16,
  kI16,
  kU32,
  kI32,
  kF32,
  kBool,
  kString,
  kArray,
  kU64,
  kI64,
  kF64,
};

// Tensor types of ggml that are not read here, to name them in the refusal.
const char* UnsupportedTensorType(uint32_t id) {
  switch (id) {
    case 4:
      return "q4_2 (removed from ggml)";
    case 5:
      return "q4_3 (removed from ggml)";
    case 9:
      return "q8_1";
    case 15:
      return "q8_k";
    case 16:
      return "iq2_xxs";
    case 17:
      return "iq2_xs";
    case 18:
      return "iq3_xxs";
    case 19:
      return "iq1_s";
    case 21:
      return "iq3_s";
    case 22:
      return "iq2_s";
    case 24:
      return "i8";
    case 25:
      return "i16";
    case 26:
      return "i32";
    case 27:
      return "i64";
    case 28:
      return "f64";
    case 29:
      return "iq1_m";
    case 31:
    case 32:
    case 33:
      return "q4_0 repacked (removed from ggml)";
    case 34:
      return "tq1_0";
    case 35:
      return "tq2_0";
    case 36:
    case 37:
    case 38:
      return "iq4_nl repacked (removed from ggml)";
    case 40:
      return "nvfp4";
    case 41:
      return "q1_0";
    case 42:
      return "q2_0";
    default:
      return "unknown";
  }
}

template <typename T>
absl::StatusOr<MetadataValue> ReadScalar(ByteReader& reader) {
  SHOAL_ASSIGN_OR_RETURN(const T v, reader.Value<T>("a metadata value"));
  if constexpr (std::is_floating_point_v<T>) {
    return MetadataValue(static_cast<double>(v));
  } else if constexpr (std::is_signed_v<T>) {
    return MetadataValue(static_cast<int64_t>(v));
  } else {
    return MetadataValue(static_cast<uint64_t>(v));
  }
}

template <typename T>
absl::StatusOr<MetadataValue> ReadNumbers(ByteReader& reader) {
  using Wide = std::conditional_t<std::is_floating_point_v<T>, double, int64_t>;
  SHOAL_ASSIGN_OR_RETURN(const int64_t n,
                         reader.Count("the length of an array", kGgufMaxArrayElems, sizeof(T)));
  std::vector<Wide> out;
  out.reserve(n);
  std::array<T, 512> piece;
  while (static_cast<int64_t>(out.size()) < n) {
    const int64_t step = std::min<int64_t>(piece.size(), n - static_cast<int64_t>(out.size()));
    SHOAL_RETURN_IF_ERROR(
        reader.Bytes(step * static_cast<int64_t>(sizeof(T)), piece.data(), "an array"));
    for (int64_t i = 0; i < step; ++i) {
      if constexpr (std::is_same_v<T, uint64_t>) {
        if (piece[i] > static_cast<uint64_t>(INT64_MAX)) {
          return reader.Error(absl::StrCat("array element ", piece[i], " does not fit in 63 bits"));
        }
      }
      out.push_back(static_cast<Wide>(piece[i]));
    }
  }
  return MetadataValue(std::move(out));
}

absl::StatusOr<MetadataValue> ReadStrings(ByteReader& reader) {
  SHOAL_ASSIGN_OR_RETURN(const int64_t n, reader.Count("the length of an array of strings",
                                                       kGgufMaxArrayElems, sizeof(uint64_t)));
  std::vector<std::string> out;
  out.reserve(n);
  for (int64_t i = 0; i < n; ++i) {
    SHOAL_ASSIGN_OR_RETURN(std::string s,
                           reader.String("a string in an array", kGgufMaxStringBytes));
    out.push_back(std::move(s));
  }
  return MetadataValue(std::move(out));
}

absl::StatusOr<MetadataValue> ReadArray(ByteReader& reader) {
  SHOAL_ASSIGN_OR_RETURN(const uint32_t type, reader.Value<uint32_t>("the type of an array"));
  switch (type) {
    case kU8:
      return ReadNumbers<uint8_t>(reader);
    case kI8:
      return ReadNumbers<int8_t>(reader);
    case kU16:
      return ReadNumbers<uint16_t>(reader);
    case kI16:
      return ReadNumbers<int16_t>(reader);
    case kU32:
      return ReadNumbers<uint32_t>(reader);
    case kI32:
      return ReadNumbers<int32_t>(reader);
    case kF32:
      return ReadNumbers<float>(reader);
    case kBool:
      return ReadNumbers<uint8_t>(reader);
    case kString:
      return ReadStrings(reader);
    case kU64:
      return ReadNumbers<uint64_t>(reader);
    case kI64:
      return ReadNumbers<int64_t>(reader);
    case kF64:
      return ReadNumbers<double>(reader);
    case kArray:
      return reader.Error("an array of arrays, which GGUF does not have");
    default:
      return reader.Error(absl::StrCat("array element type ", type, ", known are 0 to 12"));
  }
}

absl::StatusOr<MetadataValue> ReadValue(ByteReader& reader, uint32_t type) {
  switch (type) {
    case kU8:
      return ReadScalar<uint8_t>(reader);
    case kI8:
      return ReadScalar<int8_t>(reader);
    case kU16:
      return ReadScalar<uint16_t>(reader);
    case kI16:
      return ReadScalar<int16_t>(reader);
    case kU32:
      return ReadScalar<uint32_t>(reader);
    case kI32:
      return ReadScalar<int32_t>(reader);
    case kF32:
      return ReadScalar<float>(reader);
    case kU64:
      return ReadScalar<uint64_t>(reader);
    case kI64:
      return ReadScalar<int64_t>(reader);
    case kF64:
      return ReadScalar<double>(reader);
    case kArray:
      return ReadArray(reader);
    case kBool: {
      SHOAL_ASSIGN_OR_RETURN(const uint8_t v, reader.Value<uint8_t>("a bool"));
      if (v > 1) return reader.Error(absl::StrCat("a bool of value ", v, ", expected 0 or 1"));
      return MetadataValue(v == 1);
    }
    case kString: {
      SHOAL_ASSIGN_OR_RETURN(std::string s, reader.String("a string", kGgufMaxStringBytes));
      return MetadataValue(std::move(s));
    }
    default:
      return reader.Error(absl::StrCat("metadata value type ", type, ", known are 0 to 12"));
  }
}

absl::Status ReadMetadata(ByteReader& reader, int64_t pairs, GgufHeader& header) {
  absl::flat_hash_set<std::string> seen;
  for (int64_t i = 0; i < pairs; ++i) {
    SHOAL_ASSIGN_OR_RETURN(std::string key, reader.String("a metadata key", kGgufMaxKeyBytes));
    if (key.empty()) return reader.Error("an empty metadata key");
    if (!seen.insert(key).second) {
      return reader.Error(absl::StrCat("metadata key '", Printable(key), "' stands twice"));
    }
    SHOAL_ASSIGN_OR_RETURN(const uint32_t type, reader.Value<uint32_t>("the type of a value"));
    SHOAL_ASSIGN_OR_RETURN(MetadataValue value, ReadValue(reader, type));
    if (key == "general.alignment") {
      const auto* a = std::get_if<uint64_t>(&value);
      if (a == nullptr || !std::has_single_bit(*a) || *a > uint64_t{kGgufMaxAlignment}) {
        return reader.Error(absl::StrCat("general.alignment must be a power of two up to ",
                                         kGgufMaxAlignment,
                                         a == nullptr ? "" : absl::StrCat(", found ", *a)));
      }
      header.alignment = static_cast<int64_t>(*a);
    }
    header.metadata.emplace_back(std::move(key), std::move(value));
  }
  return absl::OkStatus();
}

// One tensor info; its offset is still relative to the data section.
absl::StatusOr<TensorInfo> ReadTensorInfo(ByteReader& reader, int64_t alignment) {
  TensorInfo t;
  SHOAL_ASSIGN_OR_RETURN(t.name, reader.String("a tensor name", kGgufMaxNameBytes));
  if (t.name.empty()) return reader.Error("an empty tensor name");
  const std::string label = absl::StrCat("tensor '", Printable(t.name), "'");
  SHOAL_ASSIGN_OR_RETURN(const uint32_t rank, reader.Value<uint32_t>("a number of dimensions"));
  if (rank < 1 || rank > 4) {
    return reader.Error(absl::StrCat(label, " has ", rank, " dimensions, expected 1 to 4"));
  }
  std::optional<int64_t> elems = 1;
  for (uint32_t i = 0; i < rank; ++i) {
    SHOAL_ASSIGN_OR_RETURN(const uint64_t raw, reader.Value<uint64_t>("a dimension"));
    const std::optional<int64_t> dim = CheckedSize(raw, kGgufMaxDim);
    if (!dim || *dim == 0) {
      return reader.Error(
          absl::StrCat(label, ": dimension ", i, " is ", raw, ", expected 1 to 2^40"));
    }
    elems = CheckedMul(*elems, *dim);
    if (!elems) return reader.Error(absl::StrCat(label, ": its number of elements overflows"));
    if (i < 3) {
      t.dims.push_back(*dim);
    } else if (*dim != 1) {
      return reader.Error(absl::StrCat(label, ": the fourth dimension is ", raw, ", expected 1"));
    }
  }
  SHOAL_ASSIGN_OR_RETURN(const uint32_t id, reader.Value<uint32_t>("a tensor type"));
  const std::optional<DType> type = DTypeFromGgml(id);
  if (!type) {
    return absl::UnimplementedError(
        absl::StrCat(reader.Error(label).message(), " has type ", UnsupportedTensorType(id),
                     " (id ", id, "), which is not supported; known types: ", KnownDTypes()));
  }
  t.type = *type;
  const DTypeInfo& info = Info(*type);
  if (t.cols() % info.block_elems != 0) {
    return reader.Error(absl::StrCat(label, ": rows of ", t.cols(), " elements are no multiple of ",
                                     info.block_elems, ", the block of ", info.name));
  }
  const std::optional<int64_t> bytes = CheckedMul(*elems / info.block_elems, info.block_bytes);
  if (!bytes) return reader.Error(absl::StrCat(label, ": its size in bytes overflows"));
  t.bytes = *bytes;
  SHOAL_ASSIGN_OR_RETURN(const uint64_t offset, reader.Value<uint64_t>("a tensor offset"));
  const std::optional<int64_t> checked = CheckedSize(offset, INT64_MAX);
  if (!checked || *checked % alignment != 0) {
    return reader.Error(absl::StrCat(label, ": its offset ", offset, " is no multiple of ",
                                     alignment, ", the alignment of this file"));
  }
  t.offset = *checked;
  return t;
}

// Makes offsets absolute; refuses what lies outside the file or on another tensor.
absl::Status PlaceTensors(const ByteSource& source, GgufHeader& header) {
  const auto malformed = [&](const std::string& text) {
    return absl::InvalidArgumentError(absl::StrCat(source.name(), ": ", text));
  };
  std::vector<const TensorInfo*> order;
  for (TensorInfo& t : header.tensors) {
    const std::optional<int64_t> begin = CheckedAdd(header.data_offset, t.offset);
    const std::optional<int64_t> end = begin ? CheckedAdd(*begin, t.bytes) : std::nullopt;
    if (!end || *end > source.size()) {
      return malformed(absl::StrCat("the file is too short: tensor '", Printable(t.name),
                                    "' takes ", t.bytes, " bytes at offset ", t.offset,
                                    " of the data section, which starts at ", header.data_offset,
                                    "; the file has ", source.size(),
                                    " bytes. Is the download complete?"));
    }
    t.offset = *begin;
    order.push_back(&t);
  }
  std::sort(order.begin(), order.end(),
            [](const TensorInfo* a, const TensorInfo* b) { return a->offset < b->offset; });
  for (size_t i = 1; i < order.size(); ++i) {
    if (order[i]->offset < order[i - 1]->offset + order[i - 1]->bytes) {
      return malformed(absl::StrCat("tensors '", Printable(order[i - 1]->name), "' and '",
                                    Printable(order[i]->name), "' overlap at byte ",
                                    order[i]->offset));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckMagic(ByteReader& reader, const ByteSource& source, GgufHeader& header) {
  if (source.size() == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(source.name(), ": the file is empty, expected a GGUF"));
  }
  char magic[4];
  SHOAL_RETURN_IF_ERROR(reader.Bytes(sizeof(magic), magic, "the magic"));
  if (std::memcmp(magic, "GGUF", 4) != 0) {
    return absl::InvalidArgumentError(absl::StrCat(source.name(), ": is no GGUF: starts with '",
                                                   Printable(std::string(magic, 4)),
                                                   "', expected 'GGUF'"));
  }
  SHOAL_ASSIGN_OR_RETURN(header.version, reader.Value<uint32_t>("the version"));
  if (header.version == 2 || header.version == 3) return absl::OkStatus();
  const uint32_t swapped = __builtin_bswap32(header.version);
  return absl::UnimplementedError(
      absl::StrCat(source.name(), ": GGUF version ", std::min(header.version, swapped),
                   swapped < header.version ? " in big-endian order" : "",
                   ", known are versions 2 and 3 in little-endian order; convert the model again"));
}

}  // namespace

absl::StatusOr<GgufHeader> ParseGgufHeader(const ByteSource& source) {
  ByteReader reader(source, kGgufMaxHeaderBytes);
  GgufHeader header;
  SHOAL_RETURN_IF_ERROR(CheckMagic(reader, source, header));
  // A tensor info takes at least: length, 1 byte of name, rank, one dim, type, offset.
  constexpr int64_t kMinTensorBytes = 8 + 1 + 4 + 8 + 4 + 8;
  constexpr int64_t kMinPairBytes = 8 + 1 + 4 + 1;
  SHOAL_ASSIGN_OR_RETURN(const int64_t tensors,
                         reader.Count("the number of tensors", kGgufMaxTensors, kMinTensorBytes));
  SHOAL_ASSIGN_OR_RETURN(const int64_t pairs, reader.Count("the number of metadata pairs",
                                                           kGgufMaxPairs, kMinPairBytes));
  SHOAL_RETURN_IF_ERROR(ReadMetadata(reader, pairs, header));
  absl::flat_hash_set<std::string> names;
  for (int64_t i = 0; i < tensors; ++i) {
    SHOAL_ASSIGN_OR_RETURN(TensorInfo t, ReadTensorInfo(reader, header.alignment));
    if (!names.insert(t.name).second) {
      return reader.Error(absl::StrCat("tensor '", Printable(t.name), "' stands twice"));
    }
    header.tensors.push_back(std::move(t));
  }
  header.data_offset = *CheckedAlignUp(reader.position(), header.alignment);
  SHOAL_RETURN_IF_ERROR(PlaceTensors(source, header));
  return header;
}

namespace {

class GgufCheckpoint final : public Checkpoint {
 public:
  // REQUIRES: one header per part, names unique over all of them.
  GgufCheckpoint(std::vector<std::unique_ptr<ByteSource>> parts, std::vector<GgufHeader> headers)
      : parts_(std::move(parts)), metadata_(std::move(headers[0].metadata)) {
    for (size_t part = 0; part < headers.size(); ++part) {
      for (TensorInfo& t : headers[part].tensors) {
        t.file = static_cast<int>(part);
        total_bytes_ += t.bytes;
        tensors_.push_back(std::move(t));
      }
    }
    for (size_t i = 0; i < tensors_.size(); ++i) tensor_index_[tensors_[i].name] = i;
    for (size_t i = 0; i < metadata_.size(); ++i) metadata_index_[metadata_[i].first] = i;
  }

  const std::vector<TensorInfo>& tensors() const override { return tensors_; }

  const TensorInfo* FindTensor(const std::string& name) const override {
    const auto it = tensor_index_.find(name);
    return it == tensor_index_.end() ? nullptr : &tensors_[it->second];
  }

  const MetadataValue* FindMetadata(const std::string& key) const override {
    const auto it = metadata_index_.find(key);
    return it == metadata_index_.end() ? nullptr : &metadata_[it->second].second;
  }

  std::vector<std::string> MetadataKeys() const override {
    std::vector<std::string> keys;
    for (const auto& [key, value] : metadata_) keys.push_back(key);
    return keys;
  }

  absl::Status Read(const TensorInfo& tensor, int64_t begin, int64_t n,
                    uint8_t* out) const override {
    const std::optional<int64_t> end = CheckedAdd(begin, n);
    if (!end || *end > tensor.bytes) {
      return absl::InternalError(absl::StrCat("read of bytes ", begin, " + ", n, " of tensor '",
                                              tensor.name, "', which has ", tensor.bytes));
    }
    return parts_[tensor.file]->ReadAt(tensor.offset + begin, n, out);
  }

  void WillNeed(const TensorInfo& tensor, int64_t begin, int64_t n) const override {
    const std::optional<int64_t> end = CheckedAdd(begin, n);
    if (end && *end <= tensor.bytes) parts_[tensor.file]->WillNeed(tensor.offset + begin, n);
  }

  std::vector<std::string> Files() const override {
    std::vector<std::string> files;
    for (const auto& part : parts_) files.push_back(part->name());
    return files;
  }

  int64_t TotalBytes() const override { return total_bytes_; }

 private:
  const std::vector<std::unique_ptr<ByteSource>> parts_;
  const std::vector<std::pair<std::string, MetadataValue>> metadata_;
  std::vector<TensorInfo> tensors_;
  absl::flat_hash_map<std::string, size_t> tensor_index_;
  absl::flat_hash_map<std::string, size_t> metadata_index_;
  int64_t total_bytes_ = 0;
};

// An integer of the metadata of one part; `fallback` when absent.
absl::StatusOr<int64_t> SplitKey(const ByteSource& source, const GgufHeader& header,
                                 const std::string& key, int64_t fallback) {
  for (const auto& [name, value] : header.metadata) {
    if (name != key) continue;
    const auto* u = std::get_if<uint64_t>(&value);
    const auto* i = std::get_if<int64_t>(&value);
    const std::optional<int64_t> n =
        u != nullptr ? CheckedSize(*u, kGgufMaxTensors)
                     : (i != nullptr && *i >= 0 ? std::optional<int64_t>(*i) : std::nullopt);
    if (!n) {
      return absl::InvalidArgumentError(
          absl::StrCat(source.name(), ": ", key, " must be a count up to ", kGgufMaxTensors));
    }
    return *n;
  }
  return fallback;
}

absl::Status CheckParts(const std::vector<std::unique_ptr<ByteSource>>& parts,
                        const std::vector<GgufHeader>& headers) {
  absl::flat_hash_set<std::string> names;
  for (size_t i = 0; i < parts.size(); ++i) {
    SHOAL_ASSIGN_OR_RETURN(const int64_t count, SplitKey(*parts[i], headers[i], "split.count", 1));
    SHOAL_ASSIGN_OR_RETURN(const int64_t no, SplitKey(*parts[i], headers[i], "split.no", 0));
    if (parts.size() == 1 && count > 1) {
      return absl::InvalidArgumentError(
          absl::StrCat(parts[0]->name(), ": is part ", no + 1, " of ", count,
                       "; keep the parts together under their own names, NAME-00001-of-",
                       absl::Dec(count, absl::kZeroPad5), ".gguf and so on"));
    }
    const bool single = parts.size() == 1;
    if (!single && (count != static_cast<int64_t>(parts.size()) || no != static_cast<int64_t>(i))) {
      return absl::InvalidArgumentError(absl::StrCat(parts[i]->name(), ": says it is part ", no + 1,
                                                     " of ", count, ", expected part ", i + 1,
                                                     " of ", parts.size()));
    }
    for (const TensorInfo& t : headers[i].tensors) {
      if (!names.insert(t.name).second) {
        return absl::InvalidArgumentError(absl::StrCat(
            parts[i]->name(), ": tensor '", Printable(t.name), "' stands in an earlier part too"));
      }
    }
  }
  const int64_t found = static_cast<int64_t>(names.size());
  SHOAL_ASSIGN_OR_RETURN(const int64_t expected,
                         SplitKey(*parts[0], headers[0], "split.tensors.count", found));
  if (parts.size() > 1 && expected != found) {
    return absl::InvalidArgumentError(absl::StrCat(parts[0]->name(), ": split.tensors.count is ",
                                                   expected, ", the parts hold ", found));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Checkpoint>> OpenGguf(
    std::vector<std::unique_ptr<ByteSource>> parts) {
  std::vector<GgufHeader> headers;
  for (const auto& part : parts) {
    SHOAL_ASSIGN_OR_RETURN(GgufHeader header, ParseGgufHeader(*part));
    headers.push_back(std::move(header));
  }
  SHOAL_RETURN_IF_ERROR(CheckParts(parts, headers));
  return std::make_unique<GgufCheckpoint>(std::move(parts), std::move(headers));
}

}  // namespace shoal
