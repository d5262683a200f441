// KServe's V2 protocol over gRPC, as far as health checks and routers need it: live, ready,
// metadata.
#pragma once

#include <functional>
#include <string>
#include <utility>

#include "grpcpp/grpcpp.h"
#include "launcher/proto/kserve.grpc.pb.h"

namespace shoal {

// Called by gRPC's threads; so are the functions it is given, which must outlive it.
class KServeService final : public inference::GRPCInferenceService::CallbackService {
 public:
  // authorized: the call carries a valid key, or none is needed. ready: requests are taken now.
  KServeService(std::string model,
                std::function<bool(const grpc::CallbackServerContext& context)> authorized,
                std::function<bool()> ready)
      : model_(std::move(model)), authorized_(std::move(authorized)), ready_(std::move(ready)) {}

  // The only one without a key, as /health/live.
  grpc::ServerUnaryReactor* ServerLive(grpc::CallbackServerContext* context,
                                       const inference::ServerLiveRequest* request,
                                       inference::ServerLiveResponse* response) override;
  grpc::ServerUnaryReactor* ServerReady(grpc::CallbackServerContext* context,
                                        const inference::ServerReadyRequest* request,
                                        inference::ServerReadyResponse* response) override;
  grpc::ServerUnaryReactor* ModelReady(grpc::CallbackServerContext* context,
                                       const inference::ModelReadyRequest* request,
                                       inference::ModelReadyResponse* response) override;
  grpc::ServerUnaryReactor* ServerMetadata(grpc::CallbackServerContext* context,
                                           const inference::ServerMetadataRequest* request,
                                           inference::ServerMetadataResponse* response) override;
  grpc::ServerUnaryReactor* ModelMetadata(grpc::CallbackServerContext* context,
                                          const inference::ModelMetadataRequest* request,
                                          inference::ModelMetadataResponse* response) override;

 private:
  // The error of a call without a key, or for another model (when one is named).
  grpc::Status Check(const grpc::CallbackServerContext& context, const std::string* model) const;

  const std::string model_;
  const std::function<bool(const grpc::CallbackServerContext&)> authorized_;
  const std::function<bool()> ready_;
};

}  // namespace shoal
