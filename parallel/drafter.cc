#include "parallel/drafter.h"

#include <algorithm>
#include <bit>

namespace shoal {
namespace {

constexpr size_t kLeastSlots = 256;
constexpr size_t kMostSlots = size_t{1} << 14;

// Of the n tokens before `end`, in a table of `slots` slots (a power of two).
size_t SlotOf(const int32_t* end, int n, size_t slots) {
  uint64_t h = 0;
  for (const int32_t* t = end - n; t < end; ++t) {
    h = (h + static_cast<uint32_t>(*t) + 1) * 0x9E3779B97F4A7C15ull;
    h ^= h >> 29;
  }
  return h & (slots - 1);
}

// How far the texts that end at `a` and `b`, a before b, agree backwards.
int MatchLength(const int32_t* begin, const int32_t* a, const int32_t* b, int most) {
  int n = 0;
  while (n < most && a - n > begin && a[-n - 1] == b[-n - 1]) ++n;
  return n;
}

constexpr float kLearning = 0.1F;   // weight of the newest token in a chance
constexpr float kRecovery = 0.01F;  // of the way back to kFair, each time that a draft is passed
constexpr float kFair = 0.5F;

}  // namespace

void NgramIndex::Extend(absl::Span<const int32_t> tokens) {
  const size_t slots = std::clamp(std::bit_ceil(tokens.size()), kLeastSlots, kMostSlots);
  if (tables_[0].size() < slots) {
    for (std::vector<int32_t>& table : tables_) table.assign(slots, 0);
    indexed_ = 1;
  }
  // What follows the last token is not known yet.
  for (; indexed_ < tokens.size(); ++indexed_) {
    for (size_t i = 0; i < std::size(kSizes); ++i) {
      if (indexed_ < static_cast<size_t>(kSizes[i])) continue;
      tables_[i][SlotOf(tokens.data() + indexed_, kSizes[i], tables_[i].size())] =
          static_cast<int32_t>(indexed_);
    }
  }
}

Draft NgramIndex::Find(absl::Span<const int32_t> tokens, int most) {
  Extend(tokens);
  Draft draft;
  const int32_t* const begin = tokens.data();
  const int32_t* const end = begin + tokens.size();
  int32_t at = 0;
  for (size_t i = 0; i < std::size(kSizes) && at == 0; ++i) {
    if (tokens.size() <= static_cast<size_t>(kSizes[i])) continue;
    const int32_t found = tables_[i][SlotOf(end, kSizes[i], tables_[i].size())];
    if (found == 0) continue;
    draft.evidence = MatchLength(begin, begin + found, end, kLongestMatch);
    if (draft.evidence >= kSizes[i]) at = found;
  }
  if (at == 0) return {};
  for (int i = 0; i < most; ++i) {
    const size_t next = at + static_cast<size_t>(i);
    draft.tokens.push_back(next < tokens.size() ? tokens[next]
                                                : draft.tokens[next - tokens.size()]);
  }
  return draft;
}

int DraftRecord::ClassOf(int evidence) {
  return evidence <= 2 ? 0 : evidence == 3 ? 1 : evidence <= 5 ? 2 : evidence <= 9 ? 3 : 4;
}

int DraftRecord::Worth(const Draft& draft, double price) const {
  double chance = 1;  // that all tokens up to this one are right
  for (int i = 0; i < static_cast<int>(draft.tokens.size()); ++i) {
    chance *= chance_[ClassOf(draft.evidence + i)];
    if (chance < price) return i;
  }
  return static_cast<int>(draft.tokens.size());
}

void DraftRecord::Learn(const Draft& draft, int accepted) {
  const int seen = std::min(accepted + 1, static_cast<int>(draft.tokens.size()));
  for (int i = 0; i < seen; ++i) {
    float& chance = chance_[ClassOf(draft.evidence + i)];
    chance += kLearning * ((i < accepted ? 1.0F : 0.0F) - chance);
  }
}

void DraftRecord::Pass(const Draft& draft) {
  float& chance = chance_[ClassOf(draft.evidence)];
  if (chance < kFair) chance += kRecovery * (kFair - chance);
}

}  // namespace shoal
