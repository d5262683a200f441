// One text from one prompt, for the commands that talk to a single person.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "launcher/tokenizer.h"
#include "parallel/engine.h"

namespace shoal {

struct Generation {
  std::vector<int32_t> tokens;  // generated, without an end token
  FinishReason finish = FinishReason::kNone;
  int prompt_tokens = 0;
  int cached_tokens = 0;
  double prompt_seconds = 0;  // until the first token
  double decode_seconds = 0;  // for the tokens after it
  int64_t drafted = 0;        // tokens guessed and checked
  int64_t accepted = 0;       // of those, right
};

// Runs the engine until the sequence ends; control tokens are text with `render_special`. `show`
// gets well-formed UTF-8 as it comes, and nothing once after each step; `stop` is asked after each
// step.
absl::StatusOr<Generation> Generate(Engine& engine, const Tokenizer& tokenizer,
                                    SequenceRequest request, bool render_special,
                                    const std::function<void(std::string_view)>& show,
                                    const std::function<bool()>& stop);

// "prompt 12 tokens, 340.1 tokens/s; generated 64 tokens, 210.4 tokens/s"
std::string FormatSpeed(const Generation& g);

}  // namespace shoal
