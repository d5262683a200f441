#include "launcher/json_constraint.h"

#include <random>
#include <string>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "launcher/json_grammar.h"
#include "nlohmann/json.hpp"
#include "tests/launcher/serve/tiny_tokenizer.h"

namespace shoal {
namespace {

using ::testing::HasSubstr;
using Json = nlohmann::json;

// Whether the whole text is allowed.
bool Allows(const std::string& schema, const std::string& text) {
  const auto grammar = JsonGrammar::FromSchema(schema);
  EXPECT_TRUE(grammar.ok()) << grammar.status();
  if (!grammar.ok()) return false;
  GrammarMatcher matcher(*grammar);
  GrammarMatcher::State state = matcher.Start();
  for (unsigned char c : text) state = matcher.Step(state, c);
  return GrammarMatcher::MayEnd(state);
}

std::string ErrorOf(const std::string& schema) {
  return std::string(JsonGrammar::FromSchema(schema).status().message());
}

TEST(JsonGrammar, AnyValue) {
  for (const char* text :
       {"1", "-0.5e+3", "\"a\\n\\u00e9\"", "true", "null", "[]", "[1, [2]]", "{}",
        R"({"a": {"b": [1, "x"]}, "c": null})", "\"\xC3\xA9\"", R"("\ud83d\ude00")"}) {
    EXPECT_TRUE(Allows("true", text)) << text;
  }
  for (const char* text : {"01", "1.", "+1", "\"", "tru", "[1,]", "{\"a\"}", "{a: 1}", "1 2", "",
                           "\"\xFF\"", "\"\xC3\"", "\"\n\"", R"("\ud83d")", R"("\x")"}) {
    EXPECT_FALSE(Allows("true", text)) << text;
  }
}

TEST(JsonGrammar, ObjectsFollowTheirSchema) {
  const char* schema = R"({"type": "object", "properties": {
      "name": {"type": "string", "maxLength": 3}, "age": {"type": "integer"},
      "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 2}},
      "required": ["name", "tags"], "additionalProperties": false})";
  EXPECT_TRUE(Allows(schema, R"({"name": "bob", "age": 7, "tags": ["a"]})"));
  EXPECT_TRUE(Allows(schema, R"({"name":"","tags":["a","b"]})"));
  EXPECT_TRUE(Allows(schema, "{\n  \"name\": \"x\",\n  \"tags\": [\"b\"]\n}"));
  EXPECT_FALSE(Allows(schema, R"({"name": "four", "tags": ["a"]})"));
  EXPECT_FALSE(Allows(schema, R"({"name": "bob"})"));
  EXPECT_FALSE(Allows(schema, R"({"name": "bob", "tags": []})"));
  EXPECT_FALSE(Allows(schema, R"({"name": "bob", "tags": ["a", "a", "a"]})"));
  EXPECT_FALSE(Allows(schema, R"({"name": "bob", "tags": ["c"]})"));
  EXPECT_FALSE(Allows(schema, R"({"name": "bob", "tags": ["a"], "more": 1})"));
}

TEST(JsonGrammar, OptionalPropertiesInEveryCombination) {
  const char* schema = R"({"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2},
                           "c": {"const": 3}}})";
  for (const char* text : {"{}", R"({"a":1})", R"({"b":2})", R"({"c":3})", R"({"a":1,"c":3})",
                           R"({"b":2,"c":3})", R"({"a":1,"b":2,"c":3})"}) {
    EXPECT_TRUE(Allows(schema, text)) << text;
  }
  EXPECT_FALSE(Allows(schema, R"({,"b":2})"));
  EXPECT_FALSE(Allows(schema, R"({"a":1,})"));
}

TEST(JsonGrammar, IntegerBounds) {
  const char* schema = R"({"type": "integer", "minimum": -5, "exclusiveMaximum": 1205})";
  for (const char* text : {"0", "-5", "7", "99", "1204", "120"}) {
    EXPECT_TRUE(Allows(schema, text)) << text;
  }
  for (const char* text : {"-6", "1205", "1300", "99999", "-", "-0", "007"}) {
    EXPECT_FALSE(Allows(schema, text)) << text;
  }
}

TEST(JsonGrammar, ReferencesMayRecur) {
  const char* schema =
      R"({"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "object", "properties":
      {"value": {"type": "integer"}, "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
      "required": ["value"]}}})";
  EXPECT_TRUE(Allows(schema, R"({"value": 1, "children": [{"value": 2, "children": []}]})"));
  EXPECT_FALSE(Allows(schema, R"({"value": 1, "children": [{}]})"));
}

TEST(JsonGrammar, AlternativesAndTypeLists) {
  const char* schema = R"({"anyOf": [{"type": ["integer", "null"]}, {"const": "x"}]})";
  EXPECT_TRUE(Allows(schema, "12"));
  EXPECT_TRUE(Allows(schema, "null"));
  EXPECT_TRUE(Allows(schema, "\"x\""));
  EXPECT_FALSE(Allows(schema, "\"y\""));
}

TEST(JsonGrammar, RefusesWhatItCannotKeep) {
  EXPECT_THAT(ErrorOf("{"), HasSubstr("not valid JSON"));
  EXPECT_THAT(ErrorOf(R"({"type": "string", "pattern": "(a+)+$"})"), HasSubstr("'pattern'"));
  EXPECT_THAT(ErrorOf(R"({"type": "wibble"})"), HasSubstr("unknown type"));
  EXPECT_THAT(ErrorOf(R"({"$ref": "#"})"), HasSubstr("leads only to itself"));
  EXPECT_THAT(ErrorOf(R"({"$ref": "#/$defs/x"})"), HasSubstr("points to nothing"));
  EXPECT_THAT(ErrorOf(R"({"type": "integer", "minimum": 3, "maximum": 2})"), HasSubstr("bounds"));
  EXPECT_THAT(ErrorOf(R"({"type": "object", "properties": {}, "required": ["a"]})"),
              HasSubstr("required property 'a'"));
}

TEST(JsonGrammar, SchemaBombsEndEarly) {
  std::string deep;
  for (int i = 0; i < 100000; ++i) deep += R"({"items":)";
  EXPECT_THAT(ErrorOf(deep), HasSubstr("bytes; at most"));
  EXPECT_THAT(ErrorOf(deep.substr(0, 9000)), HasSubstr("nests deeper"));
  std::string wide = R"({"enum": [0)";
  for (int i = 1; i < 5000; ++i) wide += absl::StrCat(",", i);
  EXPECT_THAT(ErrorOf(wide + "]}"), HasSubstr("enum"));
  // Each level refers twice to the next: 2^14 arrays when written out, 14 as a graph.
  std::string doubling = R"({"$ref": "#/$defs/d0", "$defs": {)";
  for (int i = 0; i < 14; ++i) {
    const std::string next = absl::StrCat(R"({"$ref": "#/$defs/d)", i + 1, "\"}");
    absl::StrAppend(&doubling, "\"d", i, R"(": {"type": "array", "prefixItems": [)", next, ",",
                    next, "]},");
  }
  doubling += R"("d14": {"type": "null"}}})";
  EXPECT_EQ(ErrorOf(doubling), "");
}

// Whatever the model prefers, the text that the masks lead to is JSON of the schema.
TEST(JsonConstraint, RandomTokensMakeValidJson) {
  const auto tokenizer = MakeTinyTokenizer({"{\"", "\":", "\", \"", "name", "true", "12", "}",
                                            "\"}", "]", "[{", "null", "é\"", "fal", "se"});
  ASSERT_NE(tokenizer, nullptr);
  const ConstraintVocabulary vocabulary(*tokenizer);
  const char* schema = R"({"type": "object", "properties": {
      "name": {"type": "string", "maxLength": 8}, "ok": {"type": "boolean"},
      "sub": {"type": "array", "maxItems": 3, "items": {"type": "integer", "maximum": 50}}},
      "required": ["name", "sub"]})";
  const auto grammar = JsonGrammar::FromSchema(schema);
  ASSERT_TRUE(grammar.ok()) << grammar.status();
  std::mt19937 random(7);
  for (int round = 0; round < 50; ++round) {
    JsonConstraint constraint(*grammar, vocabulary, 1);
    std::vector<int32_t> tokens = {1};
    std::string text;
    while (tokens.size() < 2000) {
      const std::vector<uint64_t> mask = constraint.Mask(tokens);
      std::vector<int32_t> allowed;
      for (int32_t t = 0; t < vocabulary.size(); ++t) {
        if (((mask[t / 64] >> (t % 64)) & 1) != 0) allowed.push_back(t);
      }
      ASSERT_FALSE(allowed.empty());
      tokens.push_back(allowed[random() % allowed.size()]);
      if (tokens.back() == kTinyEos) break;
      text += tokenizer->TokenBytes(tokens.back(), false);
    }
    ASSERT_EQ(tokens.back(), kTinyEos);
    const Json value = Json::parse(text, nullptr, false);
    ASSERT_TRUE(value.is_object()) << text;
    EXPECT_TRUE(value["name"].is_string()) << text;
    ASSERT_TRUE(value["sub"].is_array()) << text;
    EXPECT_LE(value["sub"].size(), 3U) << text;
    for (const Json& n : value["sub"]) EXPECT_LE(n.get<int64_t>(), 50) << text;
  }
}

}  // namespace
}  // namespace shoal
