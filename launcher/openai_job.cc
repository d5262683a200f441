#include "launcher/openai_job.h"

#include <algorithm>
#include <cmath>
#include <ctime>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "launcher/json_text.h"
#include "launcher/tool_calls.h"
#include "nlohmann/json.hpp"

namespace shoal {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kRetryAfterSeconds = 1;

std::string Quote(std::string_view text) { return DumpJson(Json(text)); }

// JSON has no -inf, which a masked token's log-probability is.
std::string Number(float x) { return std::isfinite(x) ? absl::StrCat(x) : "-9999"; }

const char* FinishName(FinishReason reason) {
  return reason == FinishReason::kLength ? "length" : "stop";
}

std::string BytesJson(std::string_view bytes) {
  std::string out = "[";
  for (size_t i = 0; i < bytes.size(); ++i) {
    absl::StrAppend(&out, i > 0 ? "," : "", static_cast<int>(static_cast<unsigned char>(bytes[i])));
  }
  return out + "]";
}

void Append(std::string& list, const std::string& item) {
  if (!list.empty()) list += ',';
  list += item;
}

std::string CallsJson(const std::vector<ToolCall>& calls, const std::string& id, size_t choice,
                      bool streamed) {
  std::string out;
  for (size_t i = 0; i < calls.size(); ++i) {
    Append(out,
           absl::StrCat(streamed ? absl::StrCat("{\"index\":", i, ",") : "{", "\"id\":\"call_", id,
                        "_", choice, "_", i, "\",\"type\":\"function\",\"function\":{\"name\":",
                        Quote(calls[i].name), ",\"arguments\":", Quote(calls[i].arguments), "}}"));
  }
  return "[" + out + "]";
}

uint64_t RandomSeed() {
  std::random_device device;
  return (uint64_t{device()} << 32) | device();
}

}  // namespace

HttpAnswer ErrorAnswer(int http_status, const std::string& message, const std::string& code) {
  const char* type = http_status == 401                        ? "authentication_error"
                     : http_status == 403                      ? "permission_error"
                     : http_status == 404                      ? "not_found_error"
                     : http_status == 429                      ? "rate_limit_error"
                     : http_status >= 400 && http_status < 500 ? "invalid_request_error"
                                                               : "server_error";
  HttpAnswer answer;
  answer.status = http_status;
  answer.body = DumpJson(Json{{"error",
                               {{"message", message},
                                {"type", type},
                                {"param", nullptr},
                                {"code", code.empty() ? Json() : Json(code)}}}});
  if (http_status == 429 || http_status == 503) {
    answer.headers.emplace_back("Retry-After", absl::StrCat(kRetryAfterSeconds));
  }
  return answer;
}

HttpAnswer ErrorAnswer(const absl::Status& status) {
  int code = 500;
  switch (status.code()) {
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kOutOfRange:
    case absl::StatusCode::kUnimplemented:
      code = 400;
      break;
    case absl::StatusCode::kNotFound:
      code = 404;
      break;
    case absl::StatusCode::kResourceExhausted:
    case absl::StatusCode::kUnavailable:
      code = 503;
      break;
    case absl::StatusCode::kDeadlineExceeded:
      code = 408;
      break;
    default:
      break;
  }
  const std::string param = ParamOf(status);
  HttpAnswer answer = ErrorAnswer(code, std::string(status.message()),
                                  code == 404 && param == "model" ? "model_not_found" : "");
  if (!param.empty()) {
    Json body = Json::parse(answer.body);
    body["error"]["param"] = param;
    answer.body = DumpJson(body);
  }
  return answer;
}

OpenAiJob::OpenAiJob(std::shared_ptr<HttpExchange> exchange, OpenAiRequest request, std::string id,
                     const ModelContext& model, Coordinator& coordinator,
                     std::function<void(int)> done)
    : exchange_(std::move(exchange)),
      request_(std::move(request)),
      id_(std::move(id)),
      model_(model),
      coordinator_(coordinator),
      done_(std::move(done)) {
  const char* object = request_.chat
                           ? (request_.stream ? "chat.completion.chunk" : "chat.completion")
                           : "text_completion";
  head_ = absl::StrCat("{\"id\":\"", request_.chat ? "chatcmpl-" : "cmpl-", id_, "\",\"object\":\"",
                       object, "\",\"created\":", static_cast<int64_t>(std::time(nullptr)),
                       ",\"model\":", Quote(model_.name), ",\"choices\":[");
}

void OpenAiJob::Start(const std::string& client) {
  const uint64_t seed = request_.random_seed ? RandomSeed() : request_.generate.sampling.seed;
  choices_.resize(request_.prompts.size() * request_.n);
  open_ = choices_.size();
  for (size_t i = 0; i < choices_.size() && !ended_; ++i) {
    Choice& choice = choices_[i];
    choice.prompt = static_cast<int>(i) / request_.n;
    choice.splitter = ReasoningSplitter(request_.reasoning, request_.in_thought);
    GenerateRequest g = request_.generate;
    g.prompt = request_.prompts[choice.prompt];
    g.sampling.seed = seed + i % request_.n;  // a given seed's first choice is that of n = 1
    g.client = client;
    absl::StatusOr<uint64_t> id = coordinator_.Submit(
        std::move(g),
        [self = shared_from_this(), i](const GenerateUpdate& u) { self->OnUpdate(i, u); });
    if (!id.ok()) return Fail(id.status());
    choice.generation = *id;
  }
  exchange_->SetOnClosed([self = shared_from_this()] {
    self->CancelAll();
    self->ended_ = true;
    std::exchange(self->done_, [](int) {})(kClientGone);
  });
  if (!request_.stream || ended_) return;
  exchange_->BeginStream({{"X-Request-Id", id_}});
  for (size_t i = 0; i < choices_.size() && request_.chat; ++i) {
    StreamChunk(i, R"({"role":"assistant","content":""})", nullptr);
  }
  for (size_t i = 0; i < choices_.size() && request_.echo; ++i) {
    StreamText(i, request_.prompt_texts[choices_[i].prompt], nullptr);
  }
}

void OpenAiJob::CancelAll() {
  for (Choice& c : choices_) {
    if (c.generation != 0) coordinator_.Cancel(std::exchange(c.generation, 0));
  }
}

void OpenAiJob::Fail(const absl::Status& status) {
  if (ended_) return;
  ended_ = true;
  CancelAll();
  const HttpAnswer answer = ErrorAnswer(status);
  if (exchange_->streaming()) {
    // The status line is long gone: an event tells.
    exchange_->Send(absl::StrCat("data: ", answer.body, "\n\n"));
    exchange_->EndStream();
  } else {
    exchange_->Respond(answer);
  }
  std::exchange(done_, [](int) {})(answer.status);
}

void OpenAiJob::OnUpdate(size_t index, const GenerateUpdate& update) {
  if (ended_) return;
  Choice& choice = choices_[index];
  if (update.done()) choice.generation = 0;
  if (!update.error.ok()) return Fail(update.error);
  choice.completion_tokens = update.completion_tokens;
  choice.cached_tokens = update.cached_tokens;
  choice.finish = update.finish;
  if (request_.logprobs) AddLogprobs(choice, update);
  ReasoningSplitter::Text text = choice.splitter.Push(update.text);
  if (update.done()) {
    const ReasoningSplitter::Text rest = choice.splitter.Finish();
    text.reasoning += rest.reasoning;
    text.content += rest.content;
  }
  if (!request_.stream) {
    choice.reasoning += text.reasoning;
  } else if (!text.reasoning.empty()) {
    StreamChunk(index, absl::StrCat("{\"reasoning_content\":", Quote(text.reasoning), "}"),
                nullptr);
  }
  TakeContent(index, text.content, update.done());
  if (!update.done()) return;
  choice.done = true;
  if (request_.stream) StreamEnd(index);
  if (--open_ == 0) Finish();
}

// Keeps or sends the next part of an answer.
void OpenAiJob::TakeContent(size_t index, const std::string& text, bool last) {
  Choice& choice = choices_[index];
  if (request_.stream && request_.functions.empty()) {
    if (!text.empty()) StreamText(index, text, nullptr);
    return;
  }
  choice.text += text;
  if (!request_.stream || request_.forced_call) return;
  const size_t certain = last ? 0 : CertainText(choice.text, choice.sent_text);
  if (certain > 0) {
    StreamText(index, choice.text.substr(0, certain), nullptr);
    choice.sent_text = true;
  }
  choice.text.erase(0, certain);
}

void OpenAiJob::StreamEnd(size_t index) {
  Choice& choice = choices_[index];
  if (request_.functions.empty()) {
    return request_.chat ? StreamChunk(index, "{}", FinishName(choice.finish))
                         : StreamText(index, "", FinishName(choice.finish));
  }
  const ParsedAnswer answer = ParseToolCalls(choice.text, request_.functions, choice.sent_text);
  if (!answer.content.empty()) StreamText(index, answer.content, nullptr);
  if (answer.calls.empty()) return StreamChunk(index, "{}", FinishName(choice.finish));
  StreamChunk(index,
              absl::StrCat("{\"tool_calls\":", CallsJson(answer.calls, id_, index, true), "}"),
              nullptr);
  StreamChunk(index, "{}", "tool_calls");
}

void OpenAiJob::StreamText(size_t index, const std::string& text, const char* finish) {
  if (request_.chat)
    return StreamChunk(index, absl::StrCat("{\"content\":", Quote(text), "}"), finish);
  Choice& choice = choices_[index];
  exchange_->Send(absl::StrCat("data: ", head_, "{\"index\":", index, ",\"text\":", Quote(text),
                               ",\"logprobs\":", TakeLogprobs(choice), ",\"finish_reason\":",
                               finish == nullptr ? "null" : absl::StrCat("\"", finish, "\""),
                               request_.include_usage ? "}],\"usage\":null}\n\n" : "}]}\n\n"));
}

void OpenAiJob::StreamChunk(size_t index, const std::string& delta, const char* finish) {
  exchange_->Send(absl::StrCat(
      "data: ", head_, "{\"index\":", index, ",\"delta\":", delta,
      ",\"logprobs\":", TakeLogprobs(choices_[index]),
      ",\"finish_reason\":", finish == nullptr ? "null" : absl::StrCat("\"", finish, "\""),
      request_.include_usage ? "}],\"usage\":null}\n\n" : "}]}\n\n"));
}

void OpenAiJob::AddLogprobs(Choice& choice, const GenerateUpdate& update) {
  const Tokenizer& tokenizer = *model_.tokenizer;
  for (const GeneratedToken& t : update.tokens) {
    const std::string bytes = tokenizer.TokenBytes(t.token, /*render_special=*/true);
    std::string top;
    for (const Candidate& c : t.top) {
      const std::string other = tokenizer.TokenBytes(c.token, true);
      Append(top, request_.chat
                      ? absl::StrCat("{\"token\":", Quote(other), ",\"logprob\":", Number(c.logit),
                                     ",\"bytes\":", BytesJson(other), "}")
                      : absl::StrCat(Quote(other), ":", Number(c.logit)));
    }
    if (request_.chat) {
      Append(choice.logprobs,
             absl::StrCat("{\"token\":", Quote(bytes), ",\"logprob\":", Number(t.logprob),
                          ",\"bytes\":", BytesJson(bytes), ",\"top_logprobs\":[", top, "]}"));
      continue;
    }
    Append(choice.token_texts, Quote(bytes));
    Append(choice.token_logprobs, Number(t.logprob));
    Append(choice.top_logprobs, absl::StrCat("{", top, "}"));
    Append(choice.text_offsets, absl::StrCat(choice.offset));
    choice.offset += bytes.size();
  }
}

std::string OpenAiJob::TakeLogprobs(Choice& choice) const {
  if (!request_.logprobs) return "null";
  if (request_.chat) {
    if (choice.logprobs.empty()) return "null";
    return absl::StrCat("{\"content\":[", std::exchange(choice.logprobs, ""),
                        "],\"refusal\":null}");
  }
  return absl::StrCat("{\"tokens\":[", std::exchange(choice.token_texts, ""),
                      "],\"token_logprobs\":[", std::exchange(choice.token_logprobs, ""),
                      "],\"top_logprobs\":[", std::exchange(choice.top_logprobs, ""),
                      "],\"text_offset\":[", std::exchange(choice.text_offsets, ""), "]}");
}

std::string OpenAiJob::UsageJson() const {
  int64_t prompt = 0;
  int64_t completion = 0;
  int64_t cached = 0;
  for (const auto& p : request_.prompts) prompt += static_cast<int64_t>(p.size());
  for (size_t i = 0; i < choices_.size(); ++i) {
    completion += choices_[i].completion_tokens;
    // A prompt counts once, however many answers it has.
    if (i % static_cast<size_t>(request_.n) == 0) cached += choices_[i].cached_tokens;
  }
  return absl::StrCat("{\"prompt_tokens\":", prompt, ",\"completion_tokens\":", completion,
                      ",\"total_tokens\":", prompt + completion,
                      ",\"prompt_tokens_details\":{\"cached_tokens\":", cached, "}}");
}

std::string OpenAiJob::ChoiceJson(size_t index) const {
  Choice choice = choices_[index];
  std::string out = absl::StrCat("{\"index\":", index);
  const char* finish = FinishName(choice.finish);
  if (request_.chat) {
    ParsedAnswer answer{choice.text, {}};
    if (!request_.functions.empty()) answer = ParseToolCalls(choice.text, request_.functions);
    const bool calls = !answer.calls.empty();
    absl::StrAppend(&out, ",\"message\":{\"role\":\"assistant\",\"content\":",
                    calls && answer.content.empty() ? "null" : Quote(answer.content));
    if (!choice.reasoning.empty()) {
      absl::StrAppend(&out, ",\"reasoning_content\":", Quote(choice.reasoning));
    }
    if (calls) {
      absl::StrAppend(&out, ",\"tool_calls\":", CallsJson(answer.calls, id_, index, false));
      finish = "tool_calls";
    }
    absl::StrAppend(&out, ",\"refusal\":null}");
  } else {
    const std::string prompt = request_.echo ? request_.prompt_texts[choice.prompt] : "";
    absl::StrAppend(&out, ",\"text\":", Quote(prompt + choice.text));
  }
  absl::StrAppend(&out, ",\"logprobs\":", TakeLogprobs(choice), ",\"finish_reason\":\"", finish,
                  "\"}");
  return out;
}

void OpenAiJob::Finish() {
  ended_ = true;
  if (request_.stream) {
    if (request_.include_usage) {
      exchange_->Send(absl::StrCat("data: ", head_, "],\"usage\":", UsageJson(), "}\n\n"));
    }
    exchange_->Send("data: [DONE]\n\n");
    exchange_->EndStream();
  } else {
    std::string body = head_;
    for (size_t i = 0; i < choices_.size(); ++i) {
      absl::StrAppend(&body, i > 0 ? "," : "", ChoiceJson(i));
    }
    absl::StrAppend(&body, "],\"usage\":", UsageJson(), "}");
    HttpAnswer answer;
    answer.body = std::move(body);
    answer.headers.emplace_back("X-Request-Id", id_);
    exchange_->Respond(std::move(answer));
  }
  std::exchange(done_, [](int) {})(200);
}

}  // namespace shoal
