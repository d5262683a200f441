// JsonGrammar::FromSchema: the compiler from a schema to grammar nodes.
#include <algorithm>
#include <limits>
#include <map>
#include <set>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "kernels/status_macros.h"
#include "launcher/json_grammar.h"
#include "launcher/json_text.h"
#include "nlohmann/json.hpp"

namespace shoal {
namespace {

using Json = nlohmann::ordered_json;
using Node = JsonGrammar::Node;
using Kind = Node::Kind;

constexpr size_t kMaxAlternatives = 1000;
constexpr int64_t kMaxCount = 100000;  // minItems, maxLength, ...
constexpr int64_t kMaxInteger = 999'999'999'999'999;

const std::set<std::string>& Annotations() {
  static const auto* const names = new std::set<std::string>{
      "title",    "description", "default",     "examples",   "$schema",         "$id",
      "$comment", "$defs",       "definitions", "deprecated", "readOnly",        "writeOnly",
      "format",   "$anchor",     "example",     "strict",     "contentMediaType"};
  return *names;
}

absl::Status Bad(const std::string& path, const std::string& what) {
  return absl::InvalidArgumentError(absl::StrCat("JSON schema at ", path, ": ", what));
}

}  // namespace

class SchemaCompiler {
 public:
  explicit SchemaCompiler(const Json& document) : document_(document) {}

  absl::StatusOr<std::shared_ptr<const JsonGrammar>> Compile() {
    MakeTerminals();
    SHOAL_ASSIGN_OR_RETURN(const int value, Schema(document_, "#", 0));
    const int root = Sequence({space_, value});
    SHOAL_RETURN_IF_ERROR(CheckProgress());
    auto grammar = std::make_shared<JsonGrammar>();
    grammar->nodes_ = std::move(nodes_);
    grammar->root_ = root;
    return grammar;
  }

 private:
  int Add(Node node) {
    nodes_.push_back(std::move(node));
    return static_cast<int>(nodes_.size()) - 1;
  }
  int Bytes(std::initializer_list<std::pair<int, int>> ranges) {
    Node n;
    n.kind = Kind::kBytes;
    for (const auto& [low, high] : ranges) {
      for (int b = low; b <= high; ++b) n.bytes[b / 64] |= uint64_t{1} << (b % 64);
    }
    return Add(std::move(n));
  }
  int Literal(std::string text) {
    Node n;
    n.kind = Kind::kLiteral;
    n.literal = std::move(text);
    return Add(std::move(n));
  }
  int Group(Kind kind, std::vector<int> children) {
    Node n;
    n.kind = kind;
    n.children = std::move(children);
    return Add(std::move(n));
  }
  int Sequence(std::vector<int> children) { return Group(Kind::kSequence, std::move(children)); }
  int Any(std::vector<int> children) { return Group(Kind::kAny, std::move(children)); }
  int Repeat(int child, int64_t min, int64_t max) {
    Node n;
    n.kind = Kind::kRepeat;
    n.children = {child};
    n.min = min;
    n.max = max;
    return Add(std::move(n));
  }

  void MakeTerminals() {
    space_ = Repeat(
        Any({Literal(" "), Sequence({Literal("\n"), Repeat(Bytes({{' ', ' '}}), 0, 24)})}), 0, 1);
    const int hex = Bytes({{'0', '9'}, {'a', 'f'}, {'A', 'F'}});
    const int tail = Bytes({{0x80, 0xBF}});
    const int escape = Any({
        Bytes({{'"', '"'},
               {'\\', '\\'},
               {'/', '/'},
               {'b', 'b'},
               {'f', 'f'},
               {'n', 'n'},
               {'r', 'r'},
               {'t', 't'}}),
        // \u of a character, then of a surrogate pair.
        Sequence({Literal("u"), Bytes({{'0', '9'}, {'a', 'c'}, {'A', 'C'}, {'e', 'f'}, {'E', 'F'}}),
                  hex, hex, hex}),
        Sequence({Literal("u"), Bytes({{'d', 'd'}, {'D', 'D'}}), Bytes({{'0', '7'}}), hex, hex}),
        Sequence({Literal("u"), Bytes({{'d', 'd'}, {'D', 'D'}}),
                  Bytes({{'8', '9'}, {'a', 'b'}, {'A', 'B'}}), hex, hex, Literal("\\u"),
                  Bytes({{'d', 'd'}, {'D', 'D'}}), Bytes({{'c', 'f'}, {'C', 'F'}}), hex, hex}),
    });
    character_ = Any({
        Bytes({{0x20, 0x21}, {0x23, 0x5B}, {0x5D, 0x7E}}),
        Sequence({Literal("\\"), escape}),
        // Well-formed UTF-8 (RFC 3629, section 4).
        Sequence({Bytes({{0xC2, 0xDF}}), tail}),
        Sequence({Bytes({{0xE0, 0xE0}}), Bytes({{0xA0, 0xBF}}), tail}),
        Sequence({Bytes({{0xE1, 0xEC}, {0xEE, 0xEF}}), tail, tail}),
        Sequence({Bytes({{0xED, 0xED}}), Bytes({{0x80, 0x9F}}), tail}),
        Sequence({Bytes({{0xF0, 0xF0}}), Bytes({{0x90, 0xBF}}), tail, tail}),
        Sequence({Bytes({{0xF1, 0xF3}}), tail, tail, tail}),
        Sequence({Bytes({{0xF4, 0xF4}}), Bytes({{0x80, 0x8F}}), tail, tail}),
    });
    string_ = String(0, -1);
    const int digit = Bytes({{'0', '9'}});
    const int whole =
        Sequence({Repeat(Literal("-"), 0, 1),
                  Any({Literal("0"), Sequence({Bytes({{'1', '9'}}), Repeat(digit, 0, 14)})})});
    const int fraction = Sequence({Literal("."), Repeat(digit, 1, 15)});
    const int exponent =
        Sequence({Bytes({{'e', 'e'}, {'E', 'E'}}), Repeat(Bytes({{'+', '+'}, {'-', '-'}}), 0, 1),
                  Bytes({{'1', '9'}}), Repeat(digit, 0, 1)});
    number_ = Sequence({whole, Repeat(fraction, 0, 1), Repeat(exponent, 0, 1)});
    boolean_ = Any({Literal("true"), Literal("false")});
    null_ = Literal("null");
    value_ = Group(Kind::kRef, {0});  // closed below: values hold values
    const int object = Object({}, value_);
    const int any = Any({object, Array({}, value_, 0, -1), string_, number_, boolean_, null_});
    nodes_[value_].children = {any};
  }

  int String(int64_t min, int64_t max) {
    return Sequence({Literal("\""), Repeat(character_, min, max), Literal("\"")});
  }

  struct Property {
    std::string key;  // as JSON text, with its quotes
    int value = 0;
    bool required = false;
  };

  // extra: the value of any further property; -1: there is none.
  int Object(const std::vector<Property>& properties, int extra) {
    const int comma = Sequence({space_, Literal(","), space_});
    const int colon = Sequence({Literal(":"), space_});
    int first = Sequence({});  // what may follow when nothing came yet
    int later = Sequence({});  // and when something did
    if (extra >= 0) {
      const int pair = Sequence({string_, colon, extra});
      later = Repeat(Sequence({comma, pair}), 0, -1);
      first = Repeat(Sequence({pair, later}), 0, 1);
    }
    for (size_t i = properties.size(); i-- > 0;) {
      const Property& p = properties[i];
      const int pair = Sequence({Literal(p.key), colon, p.value});
      const int here = Sequence({pair, later});
      const int after_comma = Sequence({comma, pair, later});
      first = p.required ? here : Any({here, first});
      later = p.required ? after_comma : Any({after_comma, later});
    }
    return Sequence({Literal("{"), space_, first, space_, Literal("}")});
  }

  // items: -1: no more than the prefix.
  int Array(const std::vector<int>& prefix, int items, int64_t min, int64_t max) {
    const int comma = Sequence({space_, Literal(","), space_});
    std::vector<int> parts = {Literal("["), space_};
    for (size_t i = 0; i < prefix.size(); ++i) {
      if (i > 0) parts.push_back(comma);
      parts.push_back(prefix[i]);
    }
    const auto count = static_cast<int64_t>(prefix.size());
    if (items >= 0 && max != count) {
      const int64_t low = std::max<int64_t>(0, min - count);
      const int64_t high = max < 0 ? -1 : max - count;
      if (count > 0) {
        parts.push_back(Repeat(Sequence({comma, items}), low, high));
      } else {
        const int more = Repeat(Sequence({comma, items}), std::max<int64_t>(0, low - 1),
                                high < 0 ? -1 : high - 1);
        parts.push_back(Repeat(Sequence({items, more}), low > 0 ? 1 : 0, 1));
      }
    }
    parts.push_back(space_);
    parts.push_back(Literal("]"));
    return Sequence(std::move(parts));
  }

  absl::StatusOr<int> Schema(const Json& s, const std::string& path, int depth) {
    if (depth > JsonGrammar::kMaxDepth) {
      return Bad(path, absl::StrCat("nested deeper than ", JsonGrammar::kMaxDepth, " levels"));
    }
    if (nodes_.size() > static_cast<size_t>(JsonGrammar::kMaxNodes)) {
      return Bad(path, absl::StrCat("the schema is too large: more than ", JsonGrammar::kMaxNodes,
                                    " grammar nodes"));
    }
    if (s.is_boolean() && s.get<bool>()) return value_;
    if (!s.is_object()) return Bad(path, "expected an object or true");
    if (s.contains("$ref")) return Reference(s, path, depth);
    if (s.contains("const")) return OnlyWith(s, {"const", "type"}, path, Constant(s["const"]));
    if (s.contains("enum")) return Enum(s, path);
    for (const char* keyword : {"anyOf", "oneOf", "allOf"}) {
      if (s.contains(keyword)) return Alternatives(s, keyword, path, depth);
    }
    if (!s.contains("type")) {
      if (s.contains("properties")) return Typed(s, "object", path, depth);
      if (s.contains("items")) return Typed(s, "array", path, depth);
      return OnlyWith(s, {}, path, value_);
    }
    const Json& type = s["type"];
    if (type.is_string()) return Typed(s, type.get<std::string>(), path, depth);
    if (!type.is_array() || type.empty() || type.size() > 7) {
      return Bad(path, "type must be a name or a list of names");
    }
    std::vector<int> options;
    for (const Json& t : type) {
      if (!t.is_string()) return Bad(path, "type must be a name or a list of names");
      SHOAL_ASSIGN_OR_RETURN(const int option, Typed(s, t.get<std::string>(), path, depth, true));
      options.push_back(option);
    }
    return Any(std::move(options));
  }

  // An error when the schema has a keyword that neither is in `known` nor is an annotation.
  absl::Status CheckKeywords(const Json& s, const std::set<std::string>& known,
                             const std::string& path) {
    for (const auto& [key, unused] : s.items()) {
      if (known.contains(key) || Annotations().contains(key)) continue;
      return Bad(path, absl::StrCat("'", ClipText(key, 60), "' is not supported here"));
    }
    return absl::OkStatus();
  }
  absl::StatusOr<int> OnlyWith(const Json& s, const std::set<std::string>& known,
                               const std::string& path, int node) {
    SHOAL_RETURN_IF_ERROR(CheckKeywords(s, known, path));
    return node;
  }

  int Constant(const Json& value) { return Literal(DumpJson(value)); }

  absl::StatusOr<int> Enum(const Json& s, const std::string& path) {
    SHOAL_RETURN_IF_ERROR(CheckKeywords(s, {"enum", "type"}, path));
    const Json& values = s["enum"];
    if (!values.is_array() || values.empty() || values.size() > kMaxAlternatives) {
      return Bad(path, absl::StrCat("enum must list 1 to ", kMaxAlternatives, " values"));
    }
    std::vector<int> options;
    for (const Json& v : values) options.push_back(Constant(v));
    return Any(std::move(options));
  }

  absl::StatusOr<int> Alternatives(const Json& s, const char* keyword, const std::string& path,
                                   int depth) {
    SHOAL_RETURN_IF_ERROR(CheckKeywords(s, {keyword}, path));
    const Json& list = s[keyword];
    if (!list.is_array() || list.empty() || list.size() > kMaxAlternatives) {
      return Bad(path, absl::StrCat(keyword, " must list 1 to ", kMaxAlternatives, " schemas"));
    }
    if (std::string_view(keyword) == "allOf" && list.size() != 1) {
      return Bad(path, "allOf of several schemas is not supported");
    }
    std::vector<int> options;
    for (size_t i = 0; i < list.size(); ++i) {
      SHOAL_ASSIGN_OR_RETURN(const int option,
                             Schema(list[i], absl::StrCat(path, "/", keyword, "/", i), depth + 1));
      options.push_back(option);
    }
    return Any(std::move(options));
  }

  absl::StatusOr<int> Reference(const Json& s, const std::string& path, int depth) {
    SHOAL_RETURN_IF_ERROR(CheckKeywords(s, {"$ref"}, path));
    if (!s["$ref"].is_string()) return Bad(path, "$ref must be a string");
    const auto target = s["$ref"].get<std::string>();
    if (const auto it = references_.find(target); it != references_.end()) return it->second;
    const Json* at = &document_;
    if (target.empty() || target[0] != '#' || target.size() > 1000) {
      return Bad(path, "$ref must point into this schema, such as #/$defs/name");
    }
    for (size_t pos = 1; pos < target.size();) {
      if (target[pos] != '/') return Bad(path, "$ref must look like #/$defs/name");
      const size_t end = std::min(target.find('/', pos + 1), target.size());
      const std::string key = target.substr(pos + 1, end - pos - 1);
      size_t index = 0;
      if (at->is_array() && absl::SimpleAtoi(key, &index) && index < at->size()) {
        at = &(*at)[index];
        pos = end;
        continue;
      }
      if (!at->is_object() || !at->contains(key)) {
        return Bad(path, absl::StrCat("$ref ", ClipText(target, 100), " points to nothing"));
      }
      at = &(*at)[key];
      pos = end;
    }
    const int node = Group(Kind::kRef, {value_});
    references_[target] = node;  // before its content, which may refer to it
    SHOAL_ASSIGN_OR_RETURN(const int content, Schema(*at, target, depth + 1));
    nodes_[node].children = {content};
    return node;
  }

  absl::StatusOr<int64_t> Count(const Json& s, const char* key, int64_t otherwise,
                                const std::string& path) {
    if (!s.contains(key)) return otherwise;
    const Json& v = s[key];
    if (!v.is_number_integer() || v < 0 || v > kMaxCount) {
      return Bad(path, absl::StrCat(key, " must be an integer from 0 to ", kMaxCount));
    }
    return v.get<int64_t>();
  }

  // lenient: the keywords of the other types in a list of types are none of this type's business.
  absl::StatusOr<int> Typed(const Json& s, const std::string& type, const std::string& path,
                            int depth, bool lenient = false) {
    static const auto* const known = new std::map<std::string, std::set<std::string>>{
        {"object", {"type", "properties", "required", "additionalProperties"}},
        {"array", {"type", "items", "prefixItems", "minItems", "maxItems"}},
        {"string", {"type", "minLength", "maxLength"}},
        {"integer", {"type", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}},
        {"number", {"type"}},
        {"boolean", {"type"}},
        {"null", {"type"}},
    };
    const auto it = known->find(type);
    if (it == known->end()) return Bad(path, absl::StrCat("unknown type ", ClipText(type, 60)));
    std::set<std::string> allowed = it->second;
    if (lenient) {
      for (const auto& [unused, keywords] : *known)
        allowed.insert(keywords.begin(), keywords.end());
      if (type == "number") allowed = it->second;  // a bound of integers would not hold for it
    }
    SHOAL_RETURN_IF_ERROR(CheckKeywords(s, allowed, path));
    if (type == "object") return ObjectSchema(s, path, depth);
    if (type == "array") return ArraySchema(s, path, depth);
    if (type == "integer") return IntegerSchema(s, path);
    if (type == "number") return number_;
    if (type == "boolean") return boolean_;
    if (type == "null") return null_;
    SHOAL_ASSIGN_OR_RETURN(const int64_t min, Count(s, "minLength", 0, path));
    SHOAL_ASSIGN_OR_RETURN(const int64_t max, Count(s, "maxLength", -1, path));
    if (max >= 0 && max < min) return Bad(path, "maxLength is below minLength");
    return String(min, max);
  }

  absl::StatusOr<int> ObjectSchema(const Json& s, const std::string& path, int depth) {
    std::set<std::string> required;
    if (s.contains("required")) {
      if (!s["required"].is_array()) return Bad(path, "required must be a list of names");
      for (const Json& name : s["required"]) {
        if (!name.is_string()) return Bad(path, "required must be a list of names");
        required.insert(name.get<std::string>());
      }
    }
    std::vector<Property> properties;
    if (s.contains("properties")) {
      if (!s["properties"].is_object() || s["properties"].size() > kMaxAlternatives) {
        return Bad(path,
                   absl::StrCat("properties must be an object of at most ", kMaxAlternatives));
      }
      for (const auto& [name, schema] : s["properties"].items()) {
        const std::string where = absl::StrCat(path, "/properties/", ClipText(name, 60));
        SHOAL_ASSIGN_OR_RETURN(const int value, Schema(schema, where, depth + 1));
        properties.push_back({DumpJson(Json(name)), value, required.erase(name) > 0});
      }
    }
    if (!required.empty()) {
      return Bad(path, absl::StrCat("required property '", ClipText(*required.begin(), 60),
                                    "' is not among the properties"));
    }
    int extra = properties.empty() && !s.contains("properties") ? value_ : -1;
    if (s.contains("additionalProperties")) {
      const Json& additional = s["additionalProperties"];
      if (additional.is_boolean()) {
        extra = additional.get<bool>() ? value_ : -1;
      } else {
        SHOAL_ASSIGN_OR_RETURN(
            extra, Schema(additional, absl::StrCat(path, "/additionalProperties"), depth + 1));
      }
    }
    return Object(properties, extra);
  }

  absl::StatusOr<int> ArraySchema(const Json& s, const std::string& path, int depth) {
    SHOAL_ASSIGN_OR_RETURN(const int64_t min, Count(s, "minItems", 0, path));
    SHOAL_ASSIGN_OR_RETURN(const int64_t max, Count(s, "maxItems", -1, path));
    std::vector<int> prefix;
    if (s.contains("prefixItems")) {
      const Json& list = s["prefixItems"];
      if (!list.is_array() || list.size() > kMaxAlternatives) {
        return Bad(path, "prefixItems must be a list of schemas");
      }
      for (size_t i = 0; i < list.size(); ++i) {
        SHOAL_ASSIGN_OR_RETURN(const int item,
                               Schema(list[i], absl::StrCat(path, "/prefixItems/", i), depth + 1));
        prefix.push_back(item);
      }
    }
    int items = value_;
    if (s.contains("items")) {
      if (s["items"].is_boolean() && !s["items"].get<bool>()) {
        items = -1;
      } else {
        SHOAL_ASSIGN_OR_RETURN(items, Schema(s["items"], absl::StrCat(path, "/items"), depth + 1));
      }
    }
    const auto count = static_cast<int64_t>(prefix.size());
    if (max >= 0 && (max < min || max < count)) {
      return Bad(path, "maxItems is below minItems or below the number of prefixItems");
    }
    if (items < 0 && min > count) return Bad(path, "minItems asks for more than is allowed");
    if (max == 0) return Sequence({Literal("["), space_, Literal("]")});
    return Array(prefix, items, min, max);
  }

  absl::StatusOr<int> IntegerSchema(const Json& s, const std::string& path) {
    Node n;
    n.kind = Kind::kInteger;
    n.min = -kMaxInteger;
    n.max = kMaxInteger;
    const auto bound = [&](const char* key, int64_t add, int64_t& out) -> absl::Status {
      if (!s.contains(key)) return absl::OkStatus();
      const Json& v = s[key];
      if (!v.is_number_integer() || v < -kMaxInteger || v > kMaxInteger) {
        return Bad(path, absl::StrCat(key, " must be an integer of at most 15 digits"));
      }
      const int64_t value = v.get<int64_t>() + add;
      out = &out == &n.min ? std::max(out, value) : std::min(out, value);
      return absl::OkStatus();
    };
    SHOAL_RETURN_IF_ERROR(bound("minimum", 0, n.min));
    SHOAL_RETURN_IF_ERROR(bound("exclusiveMinimum", 1, n.min));
    SHOAL_RETURN_IF_ERROR(bound("maximum", 0, n.max));
    SHOAL_RETURN_IF_ERROR(bound("exclusiveMaximum", -1, n.max));
    if (n.min > n.max) return Bad(path, "no integer lies within these bounds");
    return Add(std::move(n));
  }

  // A cycle that consumes no byte ({"$ref": "#"}) would never end.
  absl::Status CheckProgress() const {
    std::vector<int8_t> seen(nodes_.size(), 0);  // 1: on the way, 2: done
    std::vector<std::pair<int, size_t>> stack;
    for (size_t start = 0; start < nodes_.size(); ++start) {
      if (seen[start] != 0) continue;
      stack.push_back({static_cast<int>(start), 0});
      seen[start] = 1;
      while (!stack.empty()) {
        const int node = stack.back().first;
        const std::vector<int> next = EnteredFirst(node);
        if (stack.back().second == next.size()) {
          seen[node] = 2;
          stack.pop_back();
          continue;
        }
        const int child = next[stack.back().second++];
        if (seen[child] == 1) return Bad("#", "a $ref that leads only to itself");
        if (seen[child] == 0) {
          seen[child] = 1;
          stack.push_back({child, 0});
        }
      }
    }
    return absl::OkStatus();
  }
  // The children that are entered before a byte is consumed. Only spaces, signs and lists of
  // properties can be empty, and all of those stand behind a bracket but the leading space.
  std::vector<int> EnteredFirst(int node) const {
    const Node& n = nodes_[node];
    if (n.kind == Kind::kSequence && !n.children.empty()) {
      std::vector<int> first;
      for (int child : n.children) {
        first.push_back(child);
        if (nodes_[child].kind != Kind::kRepeat || nodes_[child].min > 0) break;
      }
      return first;
    }
    if (n.kind == Kind::kBytes || n.kind == Kind::kLiteral || n.kind == Kind::kInteger) return {};
    return n.children;
  }

  const Json& document_;
  std::vector<Node> nodes_;
  std::map<std::string, int> references_;
  int space_ = 0, character_ = 0, string_ = 0, number_ = 0, boolean_ = 0, null_ = 0, value_ = 0;
};

absl::StatusOr<std::shared_ptr<const JsonGrammar>> JsonGrammar::FromSchema(
    std::string_view schema) {
  if (schema.size() > kMaxSchemaBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("the JSON schema has ", schema.size(), " bytes; at most ", kMaxSchemaBytes));
  }
  if (absl::Status s = CheckJsonDepth(schema, 4 * kMaxDepth); !s.ok()) return s;
  const Json document = Json::parse(schema, nullptr, /*allow_exceptions=*/false);
  if (document.is_discarded()) {
    return absl::InvalidArgumentError("the JSON schema is not valid JSON");
  }
  return SchemaCompiler(document).Compile();
}

}  // namespace shoal
