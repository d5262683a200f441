// One embeddings request on its way: a generation that yields a vector for each input.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "launcher/coordinator.h"
#include "launcher/http_server.h"
#include "launcher/openai_request.h"

namespace shoal {

// The base64 text of the floats' bytes, little-endian, as OpenAI's clients ask for it.
std::string EncodeFloats(const std::vector<float>& values);

// Lives as long as the coordinator or the connection knows it. The coordinator's thread only.
class EmbeddingJob : public std::enable_shared_from_this<EmbeddingJob> {
 public:
  // `done` is called once, with the HTTP status.
  EmbeddingJob(std::shared_ptr<HttpExchange> exchange, EmbeddingRequest request,
               const ModelContext& model, Coordinator& coordinator, std::function<void(int)> done);
  // Submits the inputs; a refusal becomes the answer.
  void Start(const std::string& client);

 private:
  void OnUpdate(size_t index, const GenerateUpdate& update);
  void Fail(const absl::Status& status);
  void CancelAll();
  void Finish();

  const std::shared_ptr<HttpExchange> exchange_;
  EmbeddingRequest request_;
  const ModelContext& model_;
  Coordinator& coordinator_;
  std::function<void(int)> done_;
  std::vector<uint64_t> generations_;  // 0: not under way
  std::vector<std::vector<float>> vectors_;
  size_t open_ = 0;
  bool ended_ = false;
};

}  // namespace shoal
