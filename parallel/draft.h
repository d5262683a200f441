// Tokens that may come next, and how often such guesses were right.
#pragma once

#include <cstdint>
#include <vector>

namespace shoal {

struct Draft {
  std::vector<int32_t> tokens;
  // How much speaks for the first token: the longer a match, the likelier it goes on. Each accepted
  // token makes it one more.
  int evidence = 0;
};

// How often drafts held so far, by how much spoke for them.
class DraftRecord {
 public:
  // Tokens of the draft that are worth their row, where a row costs `price` of what a token is
  // worth (0: nothing).
  int Worth(const Draft& draft, double price) const;
  // Of the draft's tokens the first `accepted` were right, and the next one, if any, wrong.
  void Learn(const Draft& draft, int accepted);
  // A draft was not worth a try: the next ones like it are a little more so, for things change.
  void Pass(const Draft& draft);

 private:
  static constexpr int kClasses = 5;
  static int ClassOf(int evidence);
  float chance_[kClasses] = {0.4F, 0.5F, 0.6F, 0.7F, 0.8F};
};

}  // namespace shoal
