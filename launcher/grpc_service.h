// shoal.v1.Coordinator over gRPC, with grpc.health.v1 and, when asked for, reflection.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "boost/asio/io_context.hpp"
#include "launcher/auth.h"
#include "launcher/coordinator.h"
#include "launcher/openai_request.h"
#include "launcher/supervisor.h"

namespace shoal {

struct GrpcOptions {
  std::string address = "127.0.0.1";
  int port = -1;                // -1: no gRPC; 0: any that is free
  std::string tls_certificate;  // PEM files; empty: no TLS
  std::string tls_key;
  std::string client_ca;  // PEM file; clients must show a certificate that it signed
  bool reflection = false;
};

// gRPC brings its own threads; they hand everything to the coordinator's.
class GrpcServer {
 public:
  // All must outlive the object; keys are those of HTTP.
  GrpcServer(boost::asio::io_context& io, GrpcOptions options, const ApiKeys& keys,
             const ModelContext& model, ClientLimiter& limiter, Coordinator& coordinator,
             const Supervisor& supervisor);
  ~GrpcServer();  // Shutdown

  absl::Status Start();
  int port() const;
  // What the health service says; call it when it may have changed.
  void SetServing(bool serving);
  // Ends open calls and waits for them. The io_context must no longer be run by another thread.
  void Shutdown();

 private:
  class Service;
  std::unique_ptr<Service> service_;
};

}  // namespace shoal
