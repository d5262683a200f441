// Any bytes sent to the HTTP server, in one piece or several; it must answer or close, and go on.
#include <cstdint>
#include <memory>
#include <string>

#include "boost/asio/connect.hpp"
#include "boost/asio/io_context.hpp"
#include "boost/asio/ip/tcp.hpp"
#include "boost/asio/write.hpp"
#include "kernels/check.h"
#include "launcher/http_server.h"

namespace shoal {
namespace {

namespace asio = boost::asio;

class EchoHandler : public HttpHandler {
 public:
  std::optional<HttpAnswer> OnHeaders(const HttpRequest& request) override {
    if (request.path == "/refuse") return HttpAnswer{.status = 401, .body = "no"};
    return std::nullopt;
  }
  void OnRequest(std::shared_ptr<HttpExchange> exchange) override {
    if (exchange->request().path != "/stream") {
      return exchange->Respond({.body = exchange->request().body});
    }
    exchange->BeginStream({});
    exchange->Send(exchange->request().body);
    exchange->EndStream();
  }
  HttpAnswer OnBadRequest(int status, const std::string& message) override {
    return {.status = status, .body = message};
  }
};

struct World {
  asio::io_context io;
  EchoHandler handler;
  HttpServer server{io, {.port = 0, .header_bytes_max = 4096, .body_bytes_max = 65536}, handler};
};

}  // namespace
}  // namespace shoal

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  namespace asio = boost::asio;
  static auto* const world = [] {
    auto* w = new shoal::World();
    SHOAL_CHECK(w->server.Listen().ok(), "a free port");
    return w;
  }();
  boost::system::error_code error;
  asio::ip::tcp::socket client(world->io);
  client.connect({asio::ip::address_v4::loopback(), world->server.port()}, error);
  if (error) return 0;  // the kernel ran out of ports for a moment
  world->io.poll();
  const size_t cut = size > 0 ? data[0] % size : 0;
  client.send(asio::buffer(data, cut), 0, error);
  world->io.poll();
  client.send(asio::buffer(data + cut, size - cut), 0, error);
  world->io.poll();
  client.set_option(asio::socket_base::linger(true, 0), error);
  client.close(error);
  for (int i = 0; i < 100 && world->server.connections() > 0; ++i) world->io.poll();
  return 0;
}
