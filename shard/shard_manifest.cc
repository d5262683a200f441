#include "shard/shard_manifest.h"

#include <optional>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "kernels/status_macros.h"
#include "nlohmann/json.hpp"
#include "shard/byte_reader.h"
#include "xxhash.h"

namespace shoal {
namespace {

using Json = nlohmann::json;

constexpr const char* kRoleNames[] = {
    "embedding",   "output_norm", "head",        "attn_norm",      "q",
    "k",           "v",           "o",           "q_bias",         "k_bias",
    "v_bias",      "o_bias",      "q_norm",      "k_norm",         "ffn_norm",
    "gate",        "up",          "down",        "router",         "sinks",
    "router_bias", "gate_bias",   "up_bias",     "down_bias",      "choice_bias",
    "shared_gate", "shared_up",   "shared_down", "attn_post_norm", "ffn_post_norm",
};
constexpr const char* kKindNames[] = {"embedding", "attention", "ffn", "router", "expert", "head"};
static_assert(std::size(kRoleNames) == static_cast<size_t>(Role::kFfnPostNorm) + 1);
static_assert(std::size(kKindNames) == static_cast<size_t>(WeightUnit::Kind::kHead) + 1);

constexpr int64_t kMaxBytes = int64_t{1} << 50;
constexpr int64_t kMaxCount = 1 << 20;

std::string Hex(uint64_t value) { return absl::StrCat(absl::Hex(value, absl::kZeroPad16)); }

// Reads fields of a JSON object; the first wrong one is remembered, the rest yield zeros.
class Fields {
 public:
  Fields(const Json& json, absl::Status& status) : json_(json), status_(status) {}

  bool Has(const char* key) const { return Find(key) != nullptr; }
  int64_t Int(const char* key, int64_t min, int64_t max) {
    const Json* v = Find(key);
    if (v == nullptr || !v->is_number_integer()) return Fail(key, "an integer"), 0;
    const int64_t n = v->get<int64_t>();
    if (n < min || n > max) return Fail(key, absl::StrCat("from ", min, " to ", max)), min;
    return n;
  }
  std::string String(const char* key) {
    const Json* v = Find(key);
    if (v == nullptr || !v->is_string()) return Fail(key, "a string"), "";
    return v->get<std::string>();
  }
  uint64_t Hash(const char* key) { return ToHash(key, Find(key)); }
  const Json& Array(const char* key) {
    static const Json& empty = *new Json(Json::array());
    const Json* v = Find(key);
    if (v == nullptr || !v->is_array() || v->size() > static_cast<size_t>(kMaxCount)) {
      Fail(key, "an array");
      return empty;
    }
    return *v;
  }
  Extent Range(const char* key) {
    const Json& v = Array(key);
    if (v.size() != 2 || !v[0].is_number_integer() || !v[1].is_number_integer()) {
      return Fail(key, "[begin, end]"), Extent{};
    }
    return {v[0].get<int64_t>(), v[1].get<int64_t>()};
  }
  template <size_t n>
  int Name(const char* key, const char* const (&names)[n]) {
    const std::string name = String(key);
    for (size_t i = 0; i < n; ++i) {
      if (name == names[i]) return static_cast<int>(i);
    }
    return Fail(key, "a known name"), 0;
  }
  DType Type(const char* key) {
    const std::optional<DType> type = DTypeFromName(String(key));
    if (!type) Fail(key, absl::StrCat("one of ", KnownDTypes()));
    return type.value_or(DType::kF32);
  }
  uint64_t ToHash(const char* key, const Json* v) {
    uint64_t hash = 0;
    if (v == nullptr || !v->is_string() || v->get<std::string>().size() != 16 ||
        !absl::SimpleHexAtoi(v->get<std::string>(), &hash)) {
      Fail(key, "16 hexadecimal digits");
    }
    return hash;
  }
  void Fail(const char* key, const std::string& expected) {
    status_.Update(absl::InvalidArgumentError(absl::StrCat("field '", key, "' is not ", expected)));
  }

 private:
  const Json* Find(const char* key) const {
    if (!json_.is_object()) return nullptr;
    const auto it = json_.find(key);
    return it == json_.end() ? nullptr : &*it;
  }
  const Json& json_;
  absl::Status& status_;
};

Json ToJson(const Extent& e) { return Json::array({e.begin, e.end}); }

Json UnitToJson(const WeightUnit& unit, const std::vector<uint64_t>& checksums) {
  Json extents = Json::array();
  for (size_t i = 0; i < unit.extents.size(); ++i) {
    const WeightExtent& e = unit.extents[i];
    extents.push_back({{"role", kRoleNames[static_cast<int>(e.role)]},
                       {"tensor", e.tensor},
                       {"matrix", e.matrix},
                       {"row_begin", e.row_begin},
                       {"col_begin", e.col_begin},
                       {"type", Info(e.shape.type).name},
                       {"rows", e.shape.rows},
                       {"cols", e.shape.cols},
                       {"lead", e.shape.lead},
                       {"offset", e.offset},
                       {"bytes", e.bytes},
                       {"xxh3", Hex(checksums[i])}});
  }
  return {{"kind", kKindNames[static_cast<int>(unit.kind)]},
          {"layer", unit.layer},
          {"expert", unit.expert},
          {"offset", unit.offset},
          {"bytes", unit.bytes},
          {"extents", std::move(extents)}};
}

WeightUnit UnitFromJson(const Json& json, std::vector<uint64_t>& checksums, absl::Status& status) {
  Fields f(json, status);
  WeightUnit unit;
  unit.kind = static_cast<WeightUnit::Kind>(f.Name("kind", kKindNames));
  unit.layer = static_cast<int>(f.Int("layer", -1, kMaxCount));
  unit.expert = static_cast<int>(f.Int("expert", -1, kMaxCount));
  unit.offset = f.Int("offset", 0, kMaxBytes);
  unit.bytes = f.Int("bytes", 0, kMaxBytes);
  for (const Json& item : f.Array("extents")) {
    Fields g(item, status);
    WeightExtent e;
    e.role = static_cast<Role>(g.Name("role", kRoleNames));
    e.tensor = g.String("tensor");
    e.matrix = g.Int("matrix", 0, kMaxCount);
    e.row_begin = g.Int("row_begin", 0, kMaxBytes);
    e.col_begin = g.Int("col_begin", 0, kMaxBytes);
    e.shape.type = g.Type("type");
    e.shape.rows = g.Int("rows", 0, kMaxBytes);
    e.shape.cols = g.Int("cols", 0, kMaxBytes);
    e.shape.lead = static_cast<int>(g.Int("lead", 0, 7));
    e.offset = g.Int("offset", 0, kMaxBytes);
    e.bytes = g.Int("bytes", 0, kMaxBytes);
    checksums.push_back(g.Hash("xxh3"));
    if (e.offset + e.bytes > unit.bytes) g.Fail("bytes", "inside its unit");
    unit.extents.push_back(std::move(e));
  }
  return unit;
}

Json RankToJson(const ShardRank& rank) {
  Json units = Json::array();
  for (size_t i = 0; i < rank.layout.units.size(); ++i) {
    units.push_back(UnitToJson(rank.layout.units[i], rank.checksums[i]));
  }
  const RankPlan& p = rank.plan;
  return {{"file", rank.file},
          {"rank", p.rank},
          {"stage", p.stage},
          {"tp_index", p.tp_index},
          {"layers", ToJson(p.layers)},
          {"q_heads", ToJson(p.q_heads)},
          {"kv_heads", ToJson(p.kv_heads)},
          {"ffn", ToJson(p.ffn)},
          {"dense_ffn", ToJson(p.dense_ffn)},
          {"shared_ffn", ToJson(p.shared_ffn)},
          {"vocab", ToJson(p.vocab)},
          {"bytes", rank.layout.bytes},
          {"units", std::move(units)}};
}

ShardRank RankFromJson(const Json& json, absl::Status& status) {
  Fields f(json, status);
  ShardRank rank;
  rank.file = f.String("file");
  if (rank.file.find('/') != std::string::npos) f.Fail("file", "a plain file name");
  rank.plan.rank = static_cast<int>(f.Int("rank", 0, kMaxCount));
  rank.plan.stage = static_cast<int>(f.Int("stage", 0, kMaxCount));
  rank.plan.tp_index = static_cast<int>(f.Int("tp_index", 0, kMaxCount));
  rank.plan.layers = f.Range("layers");
  rank.plan.q_heads = f.Range("q_heads");
  rank.plan.kv_heads = f.Range("kv_heads");
  rank.plan.ffn = f.Range("ffn");
  if (f.Has("dense_ffn")) rank.plan.dense_ffn = f.Range("dense_ffn");
  if (f.Has("shared_ffn")) rank.plan.shared_ffn = f.Range("shared_ffn");
  rank.plan.vocab = f.Range("vocab");
  rank.layout.bytes = f.Int("bytes", 0, kMaxBytes);
  for (const Json& item : f.Array("units")) {
    std::vector<uint64_t> checksums;
    WeightUnit unit = UnitFromJson(item, checksums, status);
    if (unit.offset % kShardDataOffset != 0 || unit.offset + unit.bytes > rank.layout.bytes) {
      f.Fail("units", "page-aligned inside the rank's bytes");
    }
    rank.layout.units.push_back(std::move(unit));
    rank.checksums.push_back(std::move(checksums));
    if (!status.ok()) break;
  }
  return rank;
}

}  // namespace

uint64_t Checksum(const void* data, int64_t bytes) {
  return XXH3_64bits(data, static_cast<size_t>(bytes));
}

std::string ManifestToJson(const ShardManifest& m) {
  Json tensors = Json::array();
  for (const TensorInfo& t : m.tensors) {
    tensors.push_back(
        {{"name", t.name}, {"type", Info(t.type).name}, {"dims", t.dims}, {"bytes", t.bytes}});
  }
  Json ranks = Json::array();
  for (const ShardRank& r : m.ranks) ranks.push_back(RankToJson(r));
  const Json json = {
      {"format", "shoal shards"},
      {"version", kShardFormatVersion},
      {"fingerprint", Hex(m.fingerprint)},
      {"model", m.model},
      {"source", m.source},
      {"source_bytes", m.source_bytes},
      {"tp", m.tp},
      {"pp", m.pp},
      {"split", m.split},
      {"metadata",
       {{"file", kMetadataName}, {"bytes", m.metadata_bytes}, {"xxh3", Hex(m.metadata_checksum)}}},
      {"tensors", std::move(tensors)},
      {"ranks", std::move(ranks)},
  };
  // A model's name may hold bytes that are no UTF-8.
  return json.dump(1, ' ', false, Json::error_handler_t::replace) + "\n";
}

absl::StatusOr<ShardManifest> ManifestFromJson(const std::string& text, const std::string& name) {
  const Json json = Json::parse(text, nullptr, false);
  if (json.is_discarded()) {
    return absl::InvalidArgumentError(absl::StrCat(
        name, " is not JSON: it was cut or changed; write the directory again with shoal shard"));
  }
  absl::Status status;
  Fields f(json, status);
  const int64_t version = f.Int("version", 0, 1 << 30);
  if (status.ok() && f.String("format") != "shoal shards") {
    return absl::InvalidArgumentError(absl::StrCat(
        name, " is not of a shard directory; write the directory again with shoal shard"));
  }
  if (status.ok() && version != kShardFormatVersion) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, " has format version ", version, ", this program reads version ",
                     kShardFormatVersion, "; write the directory again with shoal shard"));
  }
  ShardManifest m;
  m.fingerprint = f.Hash("fingerprint");
  m.model = f.String("model");
  for (const Json& s : f.Array("source"))
    m.source.push_back(s.is_string() ? s.get<std::string>() : "");
  m.source_bytes = f.Int("source_bytes", 0, kMaxBytes);
  m.tp = static_cast<int>(f.Int("tp", 1, 1024));
  m.pp = static_cast<int>(f.Int("pp", 1, 1024));
  for (const Json& s : f.Array("split")) m.split.push_back(s.is_number() ? s.get<double>() : 0);
  const Json metadata = json.is_object() ? json.value("metadata", Json()) : Json();
  Fields meta(metadata, status);
  m.metadata_bytes = meta.Int("bytes", 0, kMaxBytes);
  m.metadata_checksum = meta.Hash("xxh3");
  for (const Json& item : f.Array("tensors")) {
    Fields t(item, status);
    TensorInfo info;
    info.name = t.String("name");
    info.type = t.Type("type");
    info.bytes = t.Int("bytes", 0, kMaxBytes);
    for (const Json& dim : t.Array("dims")) {
      const bool ok =
          dim.is_number_integer() && dim.get<int64_t>() > 0 && dim.get<int64_t>() < kMaxBytes;
      if (!ok) t.Fail("dims", "positive integers");
      info.dims.push_back(ok ? dim.get<int64_t>() : 1);
    }
    if (info.dims.empty() || info.dims.size() > 3) t.Fail("dims", "1 to 3 integers");
    if (!status.ok()) break;
    m.tensors.push_back(std::move(info));
  }
  for (const Json& item : f.Array("ranks")) {
    m.ranks.push_back(RankFromJson(item, status));
    if (!status.ok()) break;
  }
  if (status.ok() && static_cast<int>(m.ranks.size()) != m.tp * m.pp) {
    f.Fail("ranks", "as many as tp x pp");
  }
  if (!status.ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": ", status.message(), "; write the directory again with shoal shard"));
  }
  return m;
}

bool SameLayout(const WeightLayout& a, const WeightLayout& b) {
  if (a.bytes != b.bytes || a.units.size() != b.units.size()) return false;
  for (size_t i = 0; i < a.units.size(); ++i) {
    const WeightUnit &x = a.units[i], &y = b.units[i];
    if (x.kind != y.kind || x.layer != y.layer || x.expert != y.expert || x.offset != y.offset ||
        x.bytes != y.bytes || x.extents.size() != y.extents.size()) {
      return false;
    }
    for (size_t j = 0; j < x.extents.size(); ++j) {
      const WeightExtent &p = x.extents[j], &q = y.extents[j];
      if (p.role != q.role || p.tensor != q.tensor || p.matrix != q.matrix ||
          p.row_begin != q.row_begin || p.col_begin != q.col_begin || !(p.shape == q.shape) ||
          p.offset != q.offset || p.bytes != q.bytes) {
        return false;
      }
    }
  }
  return true;
}

std::string UnitName(const WeightUnit& unit) {
  const char* kind = kKindNames[static_cast<int>(unit.kind)];
  if (unit.layer < 0) return kind;
  if (unit.expert < 0) return absl::StrCat("layer ", unit.layer, " ", kind);
  return absl::StrCat("layer ", unit.layer, " expert ", unit.expert);
}

}  // namespace shoal
