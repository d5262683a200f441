// Any bytes as a JSON schema; a text that the grammar lets through must be JSON.
#include <cstdint>
#include <random>
#include <string>
#include <string_view>

#include "kernels/check.h"
#include "launcher/json_grammar.h"
#include "nlohmann/json.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto grammar =
      shoal::JsonGrammar::FromSchema(std::string_view(reinterpret_cast<const char*>(data), size));
  if (!grammar.ok()) return 0;
  shoal::GrammarMatcher matcher(*grammar);
  shoal::GrammarMatcher::State state = matcher.Start();
  std::string text;
  std::minstd_rand random(static_cast<uint32_t>(size));
  for (int i = 0; i < 200; ++i) {
    if (shoal::GrammarMatcher::MayEnd(state)) {
      SHOAL_CHECK(nlohmann::json::accept(text), "what may end is JSON");
    }
    if (state.empty() || shoal::GrammarMatcher::MustEnd(state)) break;
    // The first byte that fits, from a random one on.
    const auto first = static_cast<uint8_t>(random());
    shoal::GrammarMatcher::State next;
    for (int b = 0; b < 256 && next.empty(); ++b) {
      const auto byte = static_cast<uint8_t>(first + b);
      next = matcher.Step(state, byte);
      if (!next.empty()) text.push_back(static_cast<char>(byte));
    }
    state = std::move(next);
  }
  return 0;
}
