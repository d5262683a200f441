#include "shard/small_gguf_writer.h"

#include <cstring>

namespace shoal {
namespace {

// Type numbers of GGUF metadata (docs/gguf.md).
enum GgufType : uint32_t {
  kBool = 7,
  kString = 8,
  kArray = 9,
  kU64 = 10,
  kI64 = 11,
  kF64 = 12,
};
constexpr int64_t kAlignment = 32;

template <typename T>
void Put(std::string& out, T value) {
  char bytes[sizeof value];
  std::memcpy(bytes, &value, sizeof value);  // little-endian, as every machine we run on
  out.append(bytes, sizeof value);
}

void PutString(std::string& out, const std::string& s) {
  Put<uint64_t>(out, s.size());
  out += s;
}

struct PutValue {
  std::string& out;
  void operator()(uint64_t v) const { Put<uint32_t>(out, kU64), Put(out, v); }
  void operator()(int64_t v) const { Put<uint32_t>(out, kI64), Put(out, v); }
  void operator()(double v) const { Put<uint32_t>(out, kF64), Put(out, v); }
  void operator()(bool v) const { Put<uint32_t>(out, kBool), Put<uint8_t>(out, v ? 1 : 0); }
  void operator()(const std::string& v) const { Put<uint32_t>(out, kString), PutString(out, v); }
  void operator()(const std::vector<int64_t>& v) const {
    Array(kI64, v.size());
    for (const int64_t x : v) Put(out, x);
  }
  void operator()(const std::vector<double>& v) const {
    Array(kF64, v.size());
    for (const double x : v) Put(out, x);
  }
  void operator()(const std::vector<std::string>& v) const {
    Array(kString, v.size());
    for (const std::string& x : v) PutString(out, x);
  }
  void Array(GgufType type, size_t n) const {
    Put<uint32_t>(out, kArray);
    Put<uint32_t>(out, type);
    Put<uint64_t>(out, n);
  }
};

void Pad(std::string& out) { out.resize((out.size() + kAlignment - 1) / kAlignment * kAlignment); }

}  // namespace

void SmallGgufWriter::AddMetadata(const std::string& key, const MetadataValue& value) {
  PutString(metadata_, key);
  std::visit(PutValue{metadata_}, value);
  ++pairs_;
}

void SmallGgufWriter::AddTensor(const TensorInfo& info, std::string data) {
  tensors_.emplace_back(info, std::move(data));
}

std::string SmallGgufWriter::Finish() const {
  std::string out = "GGUF";
  Put<uint32_t>(out, 3);
  Put<uint64_t>(out, tensors_.size());
  Put<uint64_t>(out, static_cast<uint64_t>(pairs_));
  out += metadata_;
  uint64_t offset = 0;
  for (const auto& [info, data] : tensors_) {
    PutString(out, info.name);
    Put<uint32_t>(out, static_cast<uint32_t>(info.dims.size()));
    for (const int64_t dim : info.dims) Put<uint64_t>(out, static_cast<uint64_t>(dim));
    Put<uint32_t>(out, Info(info.type).ggml_id);
    Put<uint64_t>(out, offset);
    offset += (data.size() + kAlignment - 1) / kAlignment * kAlignment;
  }
  Pad(out);
  for (const auto& [info, data] : tensors_) {
    out += data;
    Pad(out);
  }
  return out;
}

}  // namespace shoal
