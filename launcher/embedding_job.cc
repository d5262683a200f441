#include "launcher/embedding_job.h"

#include <cmath>
#include <cstring>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "launcher/json_text.h"
#include "launcher/openai_job.h"
#include "nlohmann/json.hpp"

namespace shoal {
namespace {

using Json = nlohmann::ordered_json;

// Of length 1, as OpenAI's are: their dot product is their cosine.
void Normalize(std::vector<float>& v) {
  double squares = 0;
  for (float x : v) squares += double{x} * x;
  if (squares <= 0) return;
  const double scale = 1 / std::sqrt(squares);
  for (float& x : v) x = static_cast<float>(x * scale);
}

}  // namespace

std::string EncodeFloats(const std::vector<float>& values) {
  std::string bytes(values.size() * sizeof(float), '\0');
  std::memcpy(bytes.data(), values.data(), bytes.size());
  return absl::Base64Escape(bytes);
}

EmbeddingJob::EmbeddingJob(std::shared_ptr<HttpExchange> exchange, EmbeddingRequest request,
                           const ModelContext& model, Coordinator& coordinator,
                           std::function<void(int)> done)
    : exchange_(std::move(exchange)),
      request_(std::move(request)),
      model_(model),
      coordinator_(coordinator),
      done_(std::move(done)) {}

void EmbeddingJob::Start(const std::string& client) {
  open_ = request_.inputs.size();
  generations_.resize(open_);
  vectors_.resize(open_);
  for (size_t i = 0; i < request_.inputs.size() && !ended_; ++i) {
    GenerateRequest g;
    g.prompt = request_.inputs[i];
    g.max_tokens = 1;
    g.embed = true;
    g.client = client;
    absl::StatusOr<uint64_t> id = coordinator_.Submit(
        std::move(g),
        [self = shared_from_this(), i](const GenerateUpdate& u) { self->OnUpdate(i, u); });
    if (!id.ok()) return Fail(id.status());
    generations_[i] = *id;
  }
  exchange_->SetOnClosed([self = shared_from_this()] {
    self->CancelAll();
    self->ended_ = true;
    std::exchange(self->done_, [](int) {})(kClientGone);
  });
}

void EmbeddingJob::CancelAll() {
  for (uint64_t& id : generations_) {
    if (id != 0) coordinator_.Cancel(std::exchange(id, 0));
  }
}

void EmbeddingJob::Fail(const absl::Status& status) {
  if (ended_) return;
  ended_ = true;
  CancelAll();
  const HttpAnswer answer = ErrorAnswer(status);
  exchange_->Respond(answer);
  std::exchange(done_, [](int) {})(answer.status);
}

void EmbeddingJob::OnUpdate(size_t index, const GenerateUpdate& update) {
  if (ended_ || !update.done()) return;
  generations_[index] = 0;
  if (!update.error.ok()) return Fail(update.error);
  vectors_[index] = update.embedding;
  Normalize(vectors_[index]);
  if (--open_ == 0) Finish();
}

void EmbeddingJob::Finish() {
  ended_ = true;
  Json data = Json::array();
  size_t tokens = 0;
  for (size_t i = 0; i < vectors_.size(); ++i) {
    tokens += request_.inputs[i].size();
    data.push_back(
        {{"object", "embedding"},
         {"index", i},
         {"embedding", request_.base64 ? Json(EncodeFloats(vectors_[i])) : Json(vectors_[i])}});
  }
  const Json body = {{"object", "list"},
                     {"data", std::move(data)},
                     {"model", model_.name},
                     {"usage", {{"prompt_tokens", tokens}, {"total_tokens", tokens}}}};
  exchange_->Respond({.body = DumpJson(body)});
  std::exchange(done_, [](int) {})(200);
}

}  // namespace shoal
