// What text a JSON schema allows, as a grammar over bytes, and a machine that follows a text
// through it byte by byte.
//
// Understood: type (one or several), properties, required, additionalProperties, items,
// prefixItems, minItems, maxItems, minLength, maxLength, enum, const, anyOf, oneOf (as anyOf),
// allOf of one, $ref into the same document, minimum and maximum of integers, and annotations
// (title, description, default, format, ...), which restrict nothing. Any other keyword is an
// error, so that nothing is promised that is not kept. Properties come in the order of the schema;
// an object that lists properties allows no others unless additionalProperties says so. Between the
// parts of a value stands at most one space, or a line break and an indent.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "absl/status/statusor.h"
#include "nlohmann/json_fwd.hpp"

namespace shoal {

class JsonGrammar {
 public:
  static constexpr size_t kMaxSchemaBytes = 64 << 10;
  static constexpr int kMaxDepth = 32;
  static constexpr int kMaxNodes = 20000;

  // kInvalidArgument: not JSON, a keyword that is not understood, or beyond a limit.
  static absl::StatusOr<std::shared_ptr<const JsonGrammar>> FromSchema(std::string_view schema);

  struct Node {
    enum class Kind : uint8_t { kBytes, kLiteral, kSequence, kAny, kRepeat, kRef, kInteger };
    Kind kind = Kind::kSequence;
    std::array<uint64_t, 4> bytes{};  // kBytes: a bit for each
    std::string literal;              // kLiteral, not empty
    std::vector<int> children;        // kSequence, kAny (one of); kRepeat and kRef: one
    int64_t min = 0, max = -1;        // kRepeat: times, -1: without end; kInteger: value
  };
  const std::vector<Node>& nodes() const { return nodes_; }
  int root() const { return root_; }

 private:
  friend class SchemaCompiler;
  std::vector<Node> nodes_;
  int root_ = 0;
};

// Follows texts through a grammar. A State is a set of places in the grammar, each with the way
// back out of it; states of one matcher can be compared and stay valid for its life. One thread.
class GrammarMatcher {
 public:
  using State = std::vector<int32_t>;  // rising

  explicit GrammarMatcher(std::shared_ptr<const JsonGrammar> grammar);
  State Start();
  // The state after one more byte; empty: the text is not allowed.
  State Step(const State& state, uint8_t byte);
  // The text may end here.
  static bool MayEnd(const State& state) { return !state.empty() && state.front() == kEnd; }
  static bool MustEnd(const State& state) { return state.size() == 1 && state.front() == kEnd; }

 private:
  static constexpr int32_t kEnd = -1;
  static constexpr size_t kMaxPlaces = 512;
  static constexpr size_t kMaxFrames = 1 << 20;
  struct Frame {
    int32_t node = 0;
    int32_t parent = kEnd;
    int64_t count = 0;  // of a literal or sequence: place in it; repeat: times; integer: so far
    friend bool operator==(const Frame&, const Frame&) = default;
  };
  struct FrameHash {
    size_t operator()(const Frame& f) const;
  };
  int32_t Intern(const Frame& frame);
  void Enter(int node, int32_t parent, State& out);
  void Leave(int32_t frame, State& out);
  void StepInteger(const Frame& frame, uint8_t byte, State& out);
  static void Normalize(State& state);

  const std::shared_ptr<const JsonGrammar> grammar_;
  std::vector<Frame> frames_;
  std::unordered_map<Frame, int32_t, FrameHash> known_;
};

}  // namespace shoal
