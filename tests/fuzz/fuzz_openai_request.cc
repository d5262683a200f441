// Any bytes as the body of each kind of OpenAI request; what is accepted must lie within the
// limits.
#include <cstdint>
#include <string_view>

#include "kernels/check.h"
#include "launcher/openai_request.h"
#include "tests/launcher/serve/tiny_tokenizer.h"

namespace shoal {
namespace {

ModelContext MakeModel() {
  static const auto* const tokenizer = MakeTinyTokenizer({"fish", " swim"}).release();
  static const auto* const chat = new ChatTemplate(*ChatTemplate::Parse(
      "{% for m in messages %}{{ m.role }}:{{ m.content }}"
      "{% for c in m.tool_calls or [] %}{{ c.function.arguments|tojson }}{% endfor %}{% endfor %}"
      "{{ tools|tojson if tools }}"));
  return {"fish", tokenizer, chat, nullptr};
}

void Check(const absl::StatusOr<OpenAiRequest>& r, const ModelContext& model) {
  if (!r.ok()) return;
  SHOAL_CHECK(r->n >= 1 && r->n <= 64 && !r->prompts.empty() && r->prompts.size() <= 64, "counts");
  const SamplingParams& p = r->generate.sampling;
  SHOAL_CHECK(p.temperature >= 0 && p.temperature <= 2 && p.top_p >= 0 && p.top_p <= 1 &&
                  p.logprobs >= -1 && p.logprobs <= 20 && p.top_k >= 0,
              "sampling");
  for (const auto& prompt : r->prompts) {
    for (int32_t t : prompt) {
      SHOAL_CHECK(t >= 0 && t < model.tokenizer->vocab_size(), "token in range");
    }
  }
}

}  // namespace
}  // namespace shoal

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  static const shoal::ModelContext model = shoal::MakeModel();
  const std::string_view body(reinterpret_cast<const char*>(data) + 1, size - 1);
  switch (data[0] % 5) {
    case 0:
      shoal::Check(shoal::ParseChatRequest(body, model), model);
      break;
    case 1:
      shoal::Check(shoal::ParseCompletionRequest(body, model), model);
      break;
    case 2:
      shoal::ParseTokenizeRequest(body, model).status().IgnoreError();
      break;
    case 3:
      shoal::ParseDetokenizeRequest(body, model).status().IgnoreError();
      break;
    default:
      shoal::ParseEmbeddingRequest(body, model).status().IgnoreError();
  }
  return 0;
}
