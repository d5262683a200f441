#include "launcher/kserve_service.h"

#include "absl/strings/str_cat.h"

namespace shoal {
namespace {

grpc::ServerUnaryReactor* Reply(grpc::CallbackServerContext* context, const grpc::Status& status) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(status);
  return reactor;
}

}  // namespace

grpc::Status KServeService::Check(const grpc::CallbackServerContext& context,
                                  const std::string* model) const {
  if (!authorized_(context)) {
    return {grpc::StatusCode::UNAUTHENTICATED,
            "a valid API key is needed (authorization metadata)"};
  }
  if (model != nullptr && *model != model_) {
    return {grpc::StatusCode::NOT_FOUND,
            absl::StrCat("model '", *model, "' is not served here; the model is '", model_, "'")};
  }
  return grpc::Status::OK;
}

grpc::ServerUnaryReactor* KServeService::ServerLive(grpc::CallbackServerContext* context,
                                                    const inference::ServerLiveRequest*,
                                                    inference::ServerLiveResponse* response) {
  response->set_live(true);
  return Reply(context, grpc::Status::OK);
}

grpc::ServerUnaryReactor* KServeService::ServerReady(grpc::CallbackServerContext* context,
                                                     const inference::ServerReadyRequest*,
                                                     inference::ServerReadyResponse* response) {
  response->set_ready(ready_());
  return Reply(context, Check(*context, nullptr));
}

grpc::ServerUnaryReactor* KServeService::ModelReady(grpc::CallbackServerContext* context,
                                                    const inference::ModelReadyRequest* request,
                                                    inference::ModelReadyResponse* response) {
  response->set_ready(ready_());
  return Reply(context, Check(*context, &request->name()));
}

grpc::ServerUnaryReactor* KServeService::ServerMetadata(
    grpc::CallbackServerContext* context, const inference::ServerMetadataRequest*,
    inference::ServerMetadataResponse* response) {
  response->set_name("shoal");
  response->set_version(SHOAL_VERSION);
  return Reply(context, Check(*context, nullptr));
}

grpc::ServerUnaryReactor* KServeService::ModelMetadata(
    grpc::CallbackServerContext* context, const inference::ModelMetadataRequest* request,
    inference::ModelMetadataResponse* response) {
  response->set_name(model_);
  response->add_versions(std::string("1"));
  response->set_platform("shoal_text_generation");
  const auto text = [](auto& tensor, const char* name) {
    tensor.set_name(name);
    tensor.set_datatype("BYTES");
    tensor.add_shape(1);
  };
  text(*response->add_inputs(), "text_input");
  text(*response->add_outputs(), "text_output");
  return Reply(context, Check(*context, &request->name()));
}

}  // namespace shoal
