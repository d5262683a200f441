#include "launcher/json_grammar.h"

#include <algorithm>
#include <utility>

#include "kernels/check.h"

namespace shoal {
namespace {

using Node = JsonGrammar::Node;

// An integer under way, packed into Frame::count: 0 nothing yet, 1 a minus sign, else
// 2 * (magnitude + 1) + negative.
constexpr int64_t kMinus = 1;
int64_t PackInteger(int64_t magnitude, bool negative) {
  return 2 * (magnitude + 1) + (negative ? 1 : 0);
}

// Whether [low, high] meets [min, max].
bool Meets(int64_t low, int64_t high, const Node& n) { return low <= n.max && high >= n.min; }

// Whether an integer in range starts with these digits (or is them).
bool CanBecome(int64_t magnitude, bool negative, const Node& n) {
  constexpr int64_t kMost = 1'000'000'000'000'000;
  int64_t low = magnitude;
  int64_t high = magnitude;
  do {
    if (negative ? Meets(-high, -low, n) : Meets(low, high, n)) return true;
    low *= 10;
    high = high * 10 + 9;
  } while (magnitude > 0 && high < kMost);
  return false;
}

}  // namespace

size_t GrammarMatcher::FrameHash::operator()(const Frame& f) const {
  uint64_t h = static_cast<uint64_t>(f.node) * 0x9E3779B97F4A7C15u;
  h = (h ^ static_cast<uint64_t>(f.parent)) * 0xBF58476D1CE4E5B9u;
  h = (h ^ (h >> 29) ^ static_cast<uint64_t>(f.count)) * 0x94D049BB133111EBu;
  return h ^ (h >> 32);
}

GrammarMatcher::GrammarMatcher(std::shared_ptr<const JsonGrammar> grammar)
    : grammar_(std::move(grammar)) {}

int32_t GrammarMatcher::Intern(const Frame& frame) {
  const auto [it, added] = known_.try_emplace(frame, static_cast<int32_t>(frames_.size()));
  if (added) frames_.push_back(frame);
  return it->second;
}

GrammarMatcher::State GrammarMatcher::Start() {
  State state;
  Enter(grammar_->root(), kEnd, state);
  Normalize(state);
  return state;
}

void GrammarMatcher::Normalize(State& state) {
  std::sort(state.begin(), state.end());
  state.erase(std::unique(state.begin(), state.end()), state.end());
  // Fewer places allow less, so that a cut is safe.
  if (state.size() > kMaxPlaces) state.resize(kMaxPlaces);
}

void GrammarMatcher::Enter(int node, int32_t parent, State& out) {
  const Node& n = grammar_->nodes()[node];
  switch (n.kind) {
    case Node::Kind::kBytes:
    case Node::Kind::kLiteral:
    case Node::Kind::kInteger:
      out.push_back(Intern({node, parent, 0}));
      return;
    case Node::Kind::kSequence:
      if (n.children.empty()) return Leave(parent, out);
      // The last part needs no way back through the sequence: lists do not pile up.
      if (n.children.size() == 1) return Enter(n.children[0], parent, out);
      return Enter(n.children[0], Intern({node, parent, 1}), out);
    case Node::Kind::kAny:
      for (int child : n.children) Enter(child, parent, out);
      return;
    case Node::Kind::kRepeat:
      if (n.min == 0) Leave(parent, out);
      if (n.max != 0) Enter(n.children[0], Intern({node, parent, 1}), out);
      return;
    case Node::Kind::kRef:
      return Enter(n.children[0], parent, out);
  }
}

void GrammarMatcher::Leave(int32_t frame, State& out) {
  if (frame == kEnd) {
    out.push_back(kEnd);
    return;
  }
  const Frame f = frames_[frame];
  const Node& n = grammar_->nodes()[f.node];
  if (n.kind == Node::Kind::kSequence) {
    const auto next = static_cast<size_t>(f.count);
    const bool last = next + 1 == n.children.size();
    Enter(n.children[next], last ? f.parent : Intern({f.node, f.parent, f.count + 1}), out);
    return;
  }
  SHOAL_CHECK(n.kind == Node::Kind::kRepeat, "only sequences and repeats are left from within");
  if (f.count >= n.min) Leave(f.parent, out);
  if (n.max >= 0 && f.count >= n.max) return;
  // Without an upper bound only the way to the lower one needs counting.
  const int64_t count =
      n.max >= 0 ? f.count + 1 : std::min(f.count + 1, std::max<int64_t>(n.min, 1));
  Enter(n.children[0], Intern({f.node, f.parent, count}), out);
}

void GrammarMatcher::StepInteger(const Frame& frame, uint8_t byte, State& out) {
  const Node& n = grammar_->nodes()[frame.node];
  if (frame.count == 0 && byte == '-') {
    if (n.min < 0) out.push_back(Intern({frame.node, frame.parent, kMinus}));
    return;
  }
  if (byte < '0' || byte > '9') return;
  const bool first = frame.count <= kMinus;
  const bool negative = (frame.count & 1) != 0;
  const int64_t before = first ? 0 : frame.count / 2 - 1;
  if (!first && before == 0) return;  // no leading zeros
  const int64_t value = before * 10 + (byte - '0');
  if (negative && value == 0) return;  // "-0" is no use to anyone
  if (!CanBecome(value, negative, n)) return;
  out.push_back(Intern({frame.node, frame.parent, PackInteger(value, negative)}));
  const int64_t exact = negative ? -value : value;
  if (exact >= n.min && exact <= n.max) Leave(frame.parent, out);
}

GrammarMatcher::State GrammarMatcher::Step(const State& state, uint8_t byte) {
  State out;
  if (frames_.size() > kMaxFrames) return out;
  for (const int32_t place : state) {
    if (place == kEnd) continue;
    const Frame f = frames_[place];
    const Node& n = grammar_->nodes()[f.node];
    if (n.kind == Node::Kind::kBytes) {
      if (((n.bytes[byte / 64] >> (byte % 64)) & 1) != 0) Leave(f.parent, out);
    } else if (n.kind == Node::Kind::kInteger) {
      StepInteger(f, byte, out);
    } else if (static_cast<uint8_t>(n.literal[f.count]) == byte) {
      if (static_cast<size_t>(f.count) + 1 == n.literal.size()) {
        Leave(f.parent, out);
      } else {
        out.push_back(Intern({f.node, f.parent, f.count + 1}));
      }
    }
  }
  Normalize(out);
  return out;
}

}  // namespace shoal
