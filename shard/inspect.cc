#include "shard/inspect.h"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <type_traits>
#include <variant>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "shard/byte_reader.h"
#include "shard/model_config.h"
#include "shard/tensor_names.h"

namespace shoal {
namespace {

using Json = nlohmann::ordered_json;

constexpr size_t kShownElems = 8;

struct Sum {
  int64_t tensors = 0;
  double weights = 0;
  int64_t bytes = 0;

  void Add(const TensorInfo& t) {
    ++tensors;
    weights += static_cast<double>(t.cols()) * static_cast<double>(t.rows() * t.matrices());
    bytes += t.bytes;
  }
  double bits_per_weight() const {
    return weights > 0 ? 8 * static_cast<double>(bytes) / weights : 0;
  }
};

// By type, the largest first.
std::vector<std::pair<std::string, Sum>> SumByType(const Checkpoint& c) {
  std::map<std::string, Sum> by_type;
  for (const TensorInfo& t : c.tensors()) by_type[Info(t.type).name].Add(t);
  std::vector<std::pair<std::string, Sum>> sums(by_type.begin(), by_type.end());
  std::stable_sort(sums.begin(), sums.end(),
                   [](const auto& a, const auto& b) { return a.second.bytes > b.second.bytes; });
  return sums;
}

Sum Total(const Checkpoint& c) {
  Sum total;
  for (const TensorInfo& t : c.tensors()) total.Add(t);
  return total;
}

std::string BytesText(int64_t bytes) {
  const auto n = static_cast<double>(bytes);
  if (n >= 1e9) return absl::StrFormat("%.2f GB", n / 1e9);
  if (n >= 1e6) return absl::StrFormat("%.2f MB", n / 1e6);
  if (n >= 1e3) return absl::StrFormat("%.1f kB", n / 1e3);
  return absl::StrCat(bytes, " B");
}

std::string ElementText(const std::string& s) { return absl::StrCat("\"", Printable(s), "\""); }
std::string ElementText(double d) { return absl::StrFormat("%.6g", d); }
std::string ElementText(int64_t n) { return absl::StrCat(n); }
std::string ElementText(uint64_t n) { return absl::StrCat(n); }
std::string ElementText(bool b) { return b ? "true" : "false"; }
template <typename T>
std::string ElementText(const std::vector<T>& v) {
  std::string text;
  for (size_t i = 0; i < std::min(v.size(), kShownElems); ++i) {
    absl::StrAppend(&text, i > 0 ? ", " : "", ElementText(v[i]));
  }
  return absl::StrCat("[", text, v.size() > kShownElems ? ", ..." : "", "]  (", v.size(), ")");
}

template <typename T>
Json ElementJson(const T& value) {
  return value;
}
template <typename T>
Json ElementJson(const std::vector<T>& v) {
  if (v.size() <= kShownElems) return v;
  return {{"length", v.size()}, {"first", std::vector<T>(v.begin(), v.begin() + kShownElems)}};
}

const char* RopeScalingName(RopeScaling::Kind kind) {
  switch (kind) {
    case RopeScaling::Kind::kNone:
      return "none";
    case RopeScaling::Kind::kLinear:
      return "linear";
    case RopeScaling::Kind::kYarn:
      return "yarn";
  }
  return "";
}

std::string Ordinal(int n) {
  const int last = n % 100 / 10 == 1 ? 0 : n % 10;
  return absl::StrCat(n, last == 1 ? "st" : last == 2 ? "nd" : last == 3 ? "rd" : "th");
}

std::vector<int> LayersWithWindow(const ModelConfig& m) {
  std::vector<int> layers;
  for (int layer = 0; layer < m.layers; ++layer) {
    if (m.window_of(layer) > 0) layers.push_back(layer);
  }
  return layers;
}

std::string WindowText(const ModelConfig& m) {
  if (m.window == 0) return "";
  std::string text = absl::StrCat(m.chunked ? ", chunks of " : ", sliding window ", m.window);
  if (!m.windowed.empty()) {
    absl::StrAppend(&text, " in ", LayersWithWindow(m).size(), " of the layers");
  } else if (m.window_period > 0) {
    absl::StrAppend(&text, " in all but every ", Ordinal(m.window_period), " layer");
  }
  return text;
}

std::string ModelText(const ModelConfig& m) {
  std::string text = absl::StrCat(
      m.architecture, ", ", m.layers, " layers, dim ", m.dim, ", ", m.heads, " heads of ",
      m.head_dim, ", ", m.kv_heads, " KV heads, FFN ", m.ffn,
      m.experts > 0 ? absl::StrCat(" x ", m.experts, " experts, ", m.experts_used, " used") : "",
      m.shared_ffn > 0 ? absl::StrCat(" beside one of ", m.shared_ffn, " for all") : "",
      m.dense_layers > 0 ? absl::StrCat(", ", m.dense_ffn, " in the first ", m.dense_layers) : "",
      ", vocabulary ", m.vocab, ", context ", m.context);
  if (m.moe_step > 1) {
    absl::StrAppend(&text, ", ", m.dense_ffn, " in all but every ", Ordinal(m.moe_step), " layer");
  }
  absl::StrAppend(&text, WindowText(m));
  if (m.rope_scaling.kind != RopeScaling::Kind::kNone) {
    absl::StrAppend(&text, ", rope scaling ", RopeScalingName(m.rope_scaling.kind), " ",
                    m.rope_scaling.factor);
  }
  if (!m.rope_factors.empty()) absl::StrAppend(&text, ", rope factors");
  if (m.tied_embeddings) absl::StrAppend(&text, ", tied embeddings");
  return text;
}

Json ModelJson(const ModelConfig& m) {
  return {{"architecture", m.architecture},
          {"name", m.name},
          {"layers", m.layers},
          {"dim", m.dim},
          {"heads", m.heads},
          {"kv_heads", m.kv_heads},
          {"head_dim", m.head_dim},
          {"ffn", m.ffn},
          {"vocab", m.vocab},
          {"context", m.context},
          {"experts", m.experts},
          {"experts_used", m.experts_used},
          {"shared_ffn", m.shared_ffn},
          {"dense_layers", m.dense_layers},
          {"moe_step", m.moe_step},
          {"dense_ffn", m.dense_ffn},
          {"rope_base", m.rope_base},
          {"rotary_dim", m.rotary_dim},
          {"rope_scaling", RopeScalingName(m.rope_scaling.kind)},
          {"rope_scaling_factor", m.rope_scaling.factor},
          {"window", m.window},
          {"window_chunked", m.chunked},
          {"window_layers", LayersWithWindow(m)},
          {"norm", m.norm == NormKind::kRms ? "rms" : "layer"},
          {"parallel_ffn", m.parallel_ffn},
          {"unused_layers", m.unused_layers},
          {"tied_embeddings", m.tied_embeddings}};
}

Json SumJson(const Sum& s) {
  return {{"tensors", s.tensors},
          {"weights", static_cast<int64_t>(s.weights)},
          {"bytes", s.bytes},
          {"bits_per_weight", s.bits_per_weight()}};
}

// Column widths from the longest entry, so that a terminal shows a table.
size_t Widest(const std::vector<std::string>& texts, size_t most) {
  size_t width = 0;
  for (const std::string& t : texts) width = std::max(width, t.size());
  return std::min(width, most);
}

void AppendMetadata(const Checkpoint& c, std::string* out) {
  std::vector<std::string> keys;
  for (const std::string& key : c.MetadataKeys()) keys.push_back(Printable(key));
  const int width = static_cast<int>(Widest(keys, 48));
  absl::StrAppend(out, "\nMetadata (", keys.size(), ")\n");
  for (const std::string& key : c.MetadataKeys()) {
    const std::string value =
        std::visit([](const auto& v) { return ElementText(v); }, *c.FindMetadata(key));
    absl::StrAppendFormat(out, "  %-*s  %s\n", width, Printable(key), value);
  }
}

void AppendTensors(const Checkpoint& c, std::string* out) {
  std::vector<std::string> names;
  for (const TensorInfo& t : c.tensors()) names.push_back(Printable(t.name));
  const int width = static_cast<int>(Widest(names, 48));
  absl::StrAppend(out, "\nTensors (", names.size(), ")\n");
  for (size_t i = 0; i < names.size(); ++i) {
    const TensorInfo& t = c.tensors()[i];
    absl::StrAppendFormat(out, "  %-*s  %-7s %-22s %10s\n", width, names[i], Info(t.type).name,
                          DimsText(t.dims), BytesText(t.bytes));
  }
}

void AppendSums(const Checkpoint& c, std::string* out) {
  const auto row = [out](const std::string& name, const Sum& s) {
    absl::StrAppendFormat(out, "  %-7s %7d tensors %16.0f weights %10s %8.4f bits/weight\n", name,
                          s.tensors, s.weights, BytesText(s.bytes), s.bits_per_weight());
  };
  absl::StrAppend(out, "\nTypes\n");
  for (const auto& [type, sum] : SumByType(c)) row(type, sum);
  row("total", Total(c));
}

}  // namespace

std::string InspectText(const Checkpoint& c) {
  std::string out;
  for (const std::string& file : c.Files()) absl::StrAppend(&out, file, "\n");
  const absl::StatusOr<ModelConfig> config = ReadModelConfig(c);
  if (config.ok()) {
    absl::StrAppend(&out, "Model: ", ModelText(*config), "\n");
  } else {
    absl::StrAppend(&out, "No model that can be run: ", config.status().message(), "\n");
  }
  AppendMetadata(c, &out);
  AppendTensors(c, &out);
  AppendSums(c, &out);
  return out;
}

std::string InspectJson(const Checkpoint& c) {
  Json out;
  out["files"] = c.Files();
  const absl::StatusOr<ModelConfig> config = ReadModelConfig(c);
  if (config.ok()) {
    out["model"] = ModelJson(*config);
  } else {
    out["error"] = std::string(config.status().message());
  }
  out["metadata"] = Json::object();
  for (const std::string& key : c.MetadataKeys()) {
    out["metadata"][key] =
        std::visit([](const auto& v) { return ElementJson(v); }, *c.FindMetadata(key));
  }
  out["tensors"] = Json::array();
  for (const TensorInfo& t : c.tensors()) {
    out["tensors"].push_back({{"name", t.name},
                              {"type", Info(t.type).name},
                              {"shape", t.dims},
                              {"bytes", t.bytes},
                              {"file", t.file},
                              {"offset", t.offset}});
  }
  out["types"] = Json::object();
  for (const auto& [type, sum] : SumByType(c)) out["types"][type] = SumJson(sum);
  out["total"] = SumJson(Total(c));
  // Names from outside may hold bytes that are no UTF-8.
  return out.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

}  // namespace shoal
