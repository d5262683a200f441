// Between the engine's own types and the messages of proto/engine.proto, in both directions.
#pragma once

#include "launcher/proto/engine.pb.h"
#include "parallel/sequence.h"

namespace shoal {

engine::v1::Sampling ToMessage(const SamplingParams& params);
SamplingParams FromMessage(const engine::v1::Sampling& message);

// All but the id and the JSON schema, of which the engine knows nothing.
engine::v1::Submit ToMessage(const SequenceRequest& request);
SequenceRequest FromMessage(const engine::v1::Submit& message);

engine::v1::Finish ToMessage(FinishReason reason);
FinishReason FromMessage(engine::v1::Finish finish);

}  // namespace shoal
