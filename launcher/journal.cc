#include "launcher/journal.h"

#include <string_view>
#include <utility>

#define XXH_INLINE_ALL
#include "xxhash.h"

namespace shoal {
namespace {

// Prefixes are shared only between requests of one key: else the time to the first token would tell
// one client what another one asked.
XXH128_hash_t SaltOf(std::string_view client) {
  return XXH3_128bits_withSeed(client.data(), client.size(), 0x73686F616CULL);
}

}  // namespace

JournalEntry& Journal::Add(GenerateRequest request, GenerateSink sink, const Tokenizer& tokenizer) {
  tokens_ += static_cast<int64_t>(request.prompt.size());
  TextStream text(tokenizer, request.stop, request.render_special);
  const uint64_t id = next_id_++;
  auto entry = std::make_unique<JournalEntry>(JournalEntry{.id = id,
                                                           .request = std::move(request),
                                                           .sink = std::move(sink),
                                                           .text = std::move(text),
                                                           .generated = {},
                                                           .last_token = {}});
  return *entries_.emplace(id, std::move(entry)).first->second;
}

JournalEntry* Journal::Find(uint64_t id) {
  const auto it = entries_.find(id);
  return it == entries_.end() ? nullptr : it->second.get();
}

void Journal::Remove(uint64_t id) {
  const auto it = entries_.find(id);
  if (it == entries_.end()) return;
  tokens_ -= static_cast<int64_t>(it->second->request.prompt.size());
  entries_.erase(it);
}

std::vector<uint64_t> Journal::Ids() const {
  std::vector<uint64_t> ids;
  for (const auto& [id, unused] : entries_) ids.push_back(id);
  return ids;
}

engine::v1::ToEngine Journal::MakeSubmit(const JournalEntry& entry,
                                         const std::vector<int32_t>& end_tokens) {
  engine::v1::ToEngine message;
  engine::v1::Submit& s = *message.mutable_submit();
  const GenerateRequest& r = entry.request;
  s.set_id(entry.id);
  s.mutable_tokens()->Add(r.prompt.begin(), r.prompt.end());
  s.mutable_tokens()->Add(entry.generated.begin(), entry.generated.end());
  s.set_prompt_length(static_cast<int>(r.prompt.size()));
  s.set_max_tokens(r.max_tokens);
  engine::v1::Sampling& p = *s.mutable_sampling();
  p.set_temperature(r.sampling.temperature);
  p.set_top_k(r.sampling.top_k);
  p.set_top_p(r.sampling.top_p);
  p.set_min_p(r.sampling.min_p);
  p.set_repeat_penalty(r.sampling.repeat_penalty);
  p.set_presence_penalty(r.sampling.presence_penalty);
  p.set_frequency_penalty(r.sampling.frequency_penalty);
  p.set_penalty_last_n(r.sampling.penalty_last_n);
  p.set_seed(r.sampling.seed);
  p.set_logprobs(r.sampling.logprobs);
  for (const auto& [token, bias] : r.sampling.logit_bias) {
    p.add_bias_token(token);
    p.add_bias(bias);
  }
  if (!r.ignore_eos) s.mutable_stop_tokens()->Add(end_tokens.begin(), end_tokens.end());
  s.set_client(r.client);
  const XXH128_hash_t salt = SaltOf(r.client);
  s.set_salt_low(salt.low64);
  s.set_salt_high(salt.high64);
  s.set_json_schema(r.json_schema);
  return message;
}

}  // namespace shoal
