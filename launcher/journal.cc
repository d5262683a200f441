#include "launcher/journal.h"

#include <string_view>
#include <utility>

#include "launcher/engine_messages.h"

#define XXH_INLINE_ALL
#include "xxhash.h"

namespace shoal {
namespace {

// Prefixes are shared only between requests of one key: else the time to the first token would tell
// one client what another one asked.
PrefixHash SaltOf(std::string_view client) {
  const XXH128_hash_t hash = XXH3_128bits_withSeed(client.data(), client.size(), 0x73686F616CULL);
  return {hash.low64, hash.high64};
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
  const GenerateRequest& r = entry.request;
  SequenceRequest request;
  request.tokens = r.prompt;
  request.tokens.insert(request.tokens.end(), entry.generated.begin(), entry.generated.end());
  request.prompt_length = static_cast<int>(r.prompt.size());
  request.max_tokens = r.max_tokens;
  request.sampling = r.sampling;
  if (!r.ignore_eos) request.stop_tokens = end_tokens;
  request.client = r.client;
  request.salt = SaltOf(r.client);
  request.embed = r.embed;
  engine::v1::ToEngine message;
  engine::v1::Submit& submit = *message.mutable_submit();
  submit = ToMessage(request);
  submit.set_id(entry.id);
  submit.set_json_schema(r.json_schema);
  return message;
}

}  // namespace shoal
