// One completion request on its way: its generations, and the answer they become, whole or
// streamed.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "launcher/coordinator.h"
#include "launcher/http_server.h"
#include "launcher/openai_request.h"

namespace shoal {

// OpenAI's error object for a status, with its HTTP code and Retry-After where it helps.
HttpAnswer ErrorAnswer(const absl::Status& status);
HttpAnswer ErrorAnswer(int http_status, const std::string& message, const std::string& code);

inline constexpr int kClientGone = 499;  // nginx's number for it

// Lives as long as the coordinator or the connection knows it. The coordinator's thread only.
class OpenAiJob : public std::enable_shared_from_this<OpenAiJob> {
 public:
  // `done` is called once, with the HTTP status, when the answer is complete or the client gone
  // (then 499).
  OpenAiJob(std::shared_ptr<HttpExchange> exchange, OpenAiRequest request, std::string id,
            const ModelContext& model, Coordinator& coordinator, std::function<void(int)> done);

  // Submits the generations; a refusal becomes the answer.
  void Start(const std::string& client);

 private:
  struct Choice {
    uint64_t generation = 0;  // 0: not under way
    int prompt = 0;
    ReasoningSplitter splitter;
    bool sent_text = false;  // of `text`, in front of what it holds now
    std::string text;        // of a whole answer; of a stream what may yet be a tool call
    std::string reasoning;   // of a whole answer
    std::string logprobs;    // JSON of the tokens so far, comma separated
    std::string token_texts, token_logprobs, top_logprobs, text_offsets;  // the older format
    size_t offset = 0;
    bool began = false;  // its first chunk is sent
    bool done = false;
    FinishReason finish = FinishReason::kNone;
    int completion_tokens = 0;
    int cached_tokens = 0;
  };

  void OnUpdate(size_t index, const GenerateUpdate& update);
  void Fail(const absl::Status& status);
  void CancelAll();
  void Finish();
  void AddLogprobs(Choice& choice, const GenerateUpdate& update);
  std::string TakeLogprobs(Choice& choice) const;
  void TakeContent(size_t index, const std::string& text, bool last);
  void StreamText(size_t index, const std::string& text, const char* finish);
  void StreamEnd(size_t index);
  void StreamChunk(size_t index, const std::string& delta, const char* finish);
  std::string ChoiceJson(size_t index) const;
  std::string UsageJson() const;

  const std::shared_ptr<HttpExchange> exchange_;
  OpenAiRequest request_;
  const std::string id_;
  const ModelContext& model_;
  Coordinator& coordinator_;
  std::function<void(int)> done_;
  std::string head_;  // of every chunk, up to its choices
  std::vector<Choice> choices_;
  size_t open_ = 0;
  bool ended_ = false;
};

}  // namespace shoal
