// Every generation that has not ended: what was asked, and what came so far. It is what a new
// engine is told after the old one died.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "launcher/proto/engine.pb.h"
#include "launcher/text_stream.h"
#include "parallel/sampler.h"
#include "parallel/sequence.h"

namespace shoal {

struct GenerateRequest {
  std::vector<int32_t> prompt;
  int max_tokens = 0;
  SamplingParams sampling;
  std::vector<std::string> stop;
  bool ignore_eos = false;
  bool render_special = false;
  std::string client;       // whose turn it is, and under whose salt prefixes are shared
  std::string json_schema;  // the text must match; empty: any text
  bool embed = false;       // no text: the final hidden state of the prompt's last token
  std::optional<std::chrono::steady_clock::time_point> deadline;
};

struct GeneratedToken {
  int32_t token = 0;
  float logprob = 0;
  std::vector<Candidate> top;  // `logit` holds the log-probability
};

// What a client hears of its generation. `finish` or a bad `error` comes last, once.
struct GenerateUpdate {
  std::string text;  // may be empty: a character or a stop string is not decided yet
  std::vector<GeneratedToken> tokens;
  std::vector<float> embedding;  // with `finish`, when asked for
  FinishReason finish = FinishReason::kNone;
  absl::Status error;
  int prompt_tokens = 0;
  int completion_tokens = 0;
  int cached_tokens = 0;
  bool done() const { return finish != FinishReason::kNone || !error.ok(); }
};

using GenerateSink = std::function<void(const GenerateUpdate&)>;

struct JournalEntry {
  using Clock = std::chrono::steady_clock;
  uint64_t id = 0;
  GenerateRequest request;
  GenerateSink sink;
  TextStream text;
  std::vector<int32_t> generated;
  int cached_tokens = 0;
  // Engines that died while it was under way, since its last token. A request that kills every
  // engine must end some time.
  int deaths = 0;
  Clock::time_point submitted = Clock::now();
  Clock::time_point last_token;
};

// One thread. Entries are found by id, in the order of their arrival.
class Journal {
 public:
  JournalEntry& Add(GenerateRequest request, GenerateSink sink, const Tokenizer& tokenizer);
  JournalEntry* Find(uint64_t id);
  void Remove(uint64_t id);
  std::vector<uint64_t> Ids() const;
  size_t size() const { return entries_.size(); }
  int64_t tokens() const { return tokens_; }  // of all prompts
  // What a fresh engine must be told to go on with this entry.
  static engine::v1::ToEngine MakeSubmit(const JournalEntry& entry,
                                         const std::vector<int32_t>& end_tokens);

 private:
  std::map<uint64_t, std::unique_ptr<JournalEntry>> entries_;
  uint64_t next_id_ = 1;
  int64_t tokens_ = 0;
};

}  // namespace shoal
