// A request as the engine sees it: tokens in, tokens out.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "parallel/block_allocator.h"
#include "parallel/draft.h"
#include "parallel/sampler.h"

namespace shoal {

using SequenceId = int64_t;

enum class FinishReason : uint8_t { kNone, kStop, kLength, kCancelled, kError };

struct SequenceRequest {
  std::vector<int32_t>
      tokens;  // prompt; after a restart of the engine also what was generated before it
  // Tokens [0, prompt_length) are computed on the prefill path, later ones on the decode path, so
  // that a text that is continued after a restart is the text that would have come without it. 0:
  // all of `tokens`.
  int prompt_length = 0;
  int max_tokens = 0;  // generated at most, those in `tokens` included
  SamplingParams sampling;
  std::vector<int32_t> stop_tokens;
  std::string client;  // requests of different clients take turns
  PrefixHash salt;     // prefixes are shared only under the same salt
  bool embed = false;  // ends with the final hidden state of its last token in place of a token
};

// Owned by the Scheduler.
struct Sequence {
  SequenceId id = 0;
  SequenceRequest request;
  std::vector<int32_t> tokens;  // prompt and generated
  int prompt_length = 0;
  int prefill_end = 0;           // tokens before it take the prefill path
  int scheduled = 0;             // tokens whose KV is computed by steps already handed out
  bool awaiting_sample = false;  // a step in flight will append a token
  int steps_in_flight = 0;
  int loading = 0;                 // pages that are being read from disk into its blocks
  bool cancelled = false;          // ends when no step in flight names it
  int slot = -1;                   // -1: waiting
  int64_t admitted = 0;            // order of admission; the last admitted is preempted first
  int cached_tokens = 0;           // of the prompt, taken over from an earlier sequence
  std::vector<int> blocks;         // -1 where a page is read from disk for each step
  std::vector<PrefixHash> hashes;  // of its full blocks, as far as computed or looked up

  std::vector<int> records;  // of its leading pages that are so; each is held
  int computed = 0;  // while there are such: tokens whose steps are done, no page of theirs missing
  bool lost = false;  // such a page could not be read: to be computed again
  int losses = 0;     // times that this happened

  Draft draft;              // whose rows follow its last token in the step in flight
  DraftRecord drafts_held;  // of earlier ones

  int generated() const { return static_cast<int>(tokens.size()) - prompt_length; }
  // Not to be scheduled now.
  bool blocked() const { return cancelled || awaiting_sample || loading > 0 || lost; }
  int remaining() const { return static_cast<int>(tokens.size()) - scheduled; }
};

}  // namespace shoal
