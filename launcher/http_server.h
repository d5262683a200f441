// HTTP/1.1 with and without TLS: connections, limits on everything that a client can make large or
// slow, and answers whole or as a stream.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "boost/asio/io_context.hpp"

namespace shoal {

struct HttpRequest {
  std::string method;
  std::string path;                                          // without the query, not decoded
  std::string query;                                         // behind the '?'
  std::vector<std::pair<std::string, std::string>> headers;  // names in lower case
  std::string body;
  bool keep_alive = true;
  bool http_1_0 = false;
  // The first header of that name; empty: none. `name` in lower case.
  std::string_view Header(std::string_view name) const;
};

struct HttpAnswer {
  int status = 200;
  std::string content_type = "application/json";
  std::string body;
  std::vector<std::pair<std::string, std::string>> headers = {};
};

// One request and its answer. Calls on the server's thread; after the client went away they do
// nothing.
class HttpExchange {
 public:
  virtual ~HttpExchange() = default;
  virtual const HttpRequest& request() const = 0;
  // Stands in whatever answer is given later.
  virtual void AddHeader(std::string name, std::string value) = 0;
  // Either one Respond, or BeginStream, any number of Sends and EndStream.
  virtual void Respond(HttpAnswer answer) = 0;
  // An event stream: the server adds a comment when nothing was sent for a while.
  virtual void BeginStream(std::vector<std::pair<std::string, std::string>> headers) = 0;
  virtual void Send(std::string_view data) = 0;
  virtual void EndStream() = 0;
  virtual bool streaming() const = 0;
  // The client went away, or reads so slowly that it was sent away, before the answer was complete.
  virtual void SetOnClosed(std::function<void()> f) = 0;
};

class HttpHandler {
 public:
  virtual ~HttpHandler() = default;
  // Called with everything but the body, which is read only when there is no answer yet.
  virtual std::optional<HttpAnswer> OnHeaders(const HttpRequest& request) = 0;
  virtual void OnRequest(std::shared_ptr<HttpExchange> exchange) = 0;
  // A request that the server answered itself (malformed, too large, too slow), in the handler's
  // format.
  virtual HttpAnswer OnBadRequest(int status, const std::string& message) = 0;
};

struct HttpServerOptions {
  std::string address = "127.0.0.1";
  uint16_t port = 8080;         // 0: any
  std::string tls_certificate;  // PEM files; empty: no TLS
  std::string tls_key;
  int connections_max = 4096;
  size_t header_bytes_max = 64 << 10;
  size_t body_bytes_max = 16 << 20;
  size_t all_bodies_bytes_max = 256 << 20;
  size_t unsent_bytes_max = 4 << 20;  // of one connection
  std::chrono::seconds header_timeout{30};
  std::chrono::seconds body_timeout{60};
  std::chrono::seconds idle_timeout{75};
  std::chrono::seconds write_timeout{30};
  std::chrono::seconds comment_interval{15};
};

// All calls on the io_context's one thread.
class HttpServer {
 public:
  // The handler must outlive the server and its connections (the io_context's).
  HttpServer(boost::asio::io_context& io, HttpServerOptions options, HttpHandler& handler);
  ~HttpServer();
  absl::Status Listen();
  uint16_t port() const;
  int connections() const;
  void StopAccepting();
  // Closes every connection.
  void Close();

 private:
  class Impl;
  std::shared_ptr<Impl> impl_;
};

const char* HttpReason(int status);

}  // namespace shoal
