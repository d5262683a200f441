#include "launcher/engine_messages.h"

#include <algorithm>

namespace shoal {

namespace pb = ::shoal::engine::v1;

// Fields with one name and one meaning on both sides, each written once for both directions.
#define SHOAL_SAMPLING_FIELDS(F) \
  F(temperature)                 \
  F(top_k)                       \
  F(top_p)                       \
  F(min_p)                       \
  F(repeat_penalty) F(presence_penalty) F(frequency_penalty) F(penalty_last_n) F(seed) F(logprobs)
#define SHOAL_SUBMIT_FIELDS(F) F(prompt_length) F(max_tokens) F(client) F(embed)

pb::Sampling ToMessage(const SamplingParams& params) {
  pb::Sampling m;
#define SHOAL_SET(field) m.set_##field(params.field);
  SHOAL_SAMPLING_FIELDS(SHOAL_SET)
#undef SHOAL_SET
  for (const auto& [token, bias] : params.logit_bias) {
    m.add_bias_token(token);
    m.add_bias(bias);
  }
  return m;
}

SamplingParams FromMessage(const pb::Sampling& m) {
  SamplingParams params;
#define SHOAL_GET(field) params.field = m.field();
  SHOAL_SAMPLING_FIELDS(SHOAL_GET)
#undef SHOAL_GET
  for (int i = 0; i < std::min(m.bias_token_size(), m.bias_size()); ++i) {
    params.logit_bias.emplace_back(m.bias_token(i), m.bias(i));
  }
  return params;
}

pb::Submit ToMessage(const SequenceRequest& request) {
  pb::Submit m;
#define SHOAL_SET(field) m.set_##field(request.field);
  SHOAL_SUBMIT_FIELDS(SHOAL_SET)
#undef SHOAL_SET
  m.mutable_tokens()->Add(request.tokens.begin(), request.tokens.end());
  m.mutable_stop_tokens()->Add(request.stop_tokens.begin(), request.stop_tokens.end());
  *m.mutable_sampling() = ToMessage(request.sampling);
  m.set_salt_low(request.salt.low);
  m.set_salt_high(request.salt.high);
  return m;
}

SequenceRequest FromMessage(const pb::Submit& m) {
  SequenceRequest request;
#define SHOAL_GET(field) request.field = m.field();
  SHOAL_SUBMIT_FIELDS(SHOAL_GET)
#undef SHOAL_GET
  request.tokens.assign(m.tokens().begin(), m.tokens().end());
  request.stop_tokens.assign(m.stop_tokens().begin(), m.stop_tokens().end());
  request.sampling = FromMessage(m.sampling());
  request.salt = {m.salt_low(), m.salt_high()};
  return request;
}

pb::Finish ToMessage(FinishReason reason) {
  switch (reason) {
    case FinishReason::kNone:
      return pb::FINISH_NONE;
    case FinishReason::kStop:
      return pb::FINISH_STOP;
    case FinishReason::kLength:
      return pb::FINISH_LENGTH;
    case FinishReason::kCancelled:
      return pb::FINISH_CANCELLED;
    case FinishReason::kError:
      return pb::FINISH_ERROR;
  }
  return pb::FINISH_ERROR;
}

FinishReason FromMessage(pb::Finish finish) {
  switch (finish) {
    case pb::FINISH_NONE:
      return FinishReason::kNone;
    case pb::FINISH_STOP:
      return FinishReason::kStop;
    case pb::FINISH_LENGTH:
      return FinishReason::kLength;
    case pb::FINISH_CANCELLED:
      return FinishReason::kCancelled;
    default:
      return FinishReason::kError;
  }
}

}  // namespace shoal
