#include "launcher/server_client.h"

#include <algorithm>
#include <chrono>
#include <optional>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "boost/asio/connect.hpp"
#include "boost/asio/io_context.hpp"
#include "boost/asio/ip/tcp.hpp"
#include "boost/asio/ssl/context.hpp"
#include "boost/asio/ssl/host_name_verification.hpp"
#include "boost/asio/ssl/stream.hpp"
#include "boost/beast/core/flat_buffer.hpp"
#include "boost/beast/http/parser.hpp"
#include "boost/beast/http/read.hpp"
#include "boost/beast/http/string_body.hpp"
#include "boost/beast/http/write.hpp"
#include "kernels/status_macros.h"
#include "launcher/exit_code.h"
#include "nlohmann/json.hpp"

namespace shoal {
namespace {

namespace asio = boost::asio;
namespace http = boost::beast::http;
using asio::ip::tcp;
using boost::system::error_code;

constexpr std::chrono::milliseconds kPoll{50};
constexpr std::chrono::seconds kConnectTimeout{10};
// A server that is at work sends a comment at least every 15 seconds.
constexpr std::chrono::seconds kSilence{120};
constexpr size_t kMaxErrorBytes = 1 << 20;
constexpr size_t kMaxLineBytes = 16 << 20;

absl::Status Unavailable(const std::string& message) {
  return WithExitCode(absl::UnavailableError(message), kExitUnavailable);
}

// What an answer other than 200 says.
absl::Status Refusal(int status, const std::string& body) {
  std::string message = absl::StrCat("the server answered ", status);
  const auto json = nlohmann::json::parse(body, nullptr, /*allow_exceptions=*/false);
  if (json.is_object() && json.contains("error") && json["error"].is_object() &&
      json["error"].contains("message") && json["error"]["message"].is_string()) {
    absl::StrAppend(&message, ": ", json["error"]["message"].get<std::string>());
  }
  const int code = status == 401 || status == 403                    ? kExitNotPermitted
                   : status == 429 || status >= 500                  ? kExitUnavailable
                   : status == 400 || status == 404 || status == 413 ? kExitUsage
                                                                     : kExitInternal;
  return WithExitCode(absl::UnknownError(message), code);
}

// One connection. Each step waits for its completion, for `stop` or for a deadline.
class Connection {
 public:
  Connection(const ServerAddress& address, const std::function<bool()>& stop)
      : address_(address), stop_(stop), socket_(io_) {}

  absl::Status Open(const std::string& ca_file) {
    tcp::resolver resolver(io_);
    tcp::resolver::results_type found;
    SHOAL_RETURN_IF_ERROR(Await(kConnectTimeout, "resolve", [&](auto done) {
      resolver.async_resolve(address_.host, address_.port,
                             [&found, done](error_code e, tcp::resolver::results_type r) {
                               found = std::move(r);
                               done(e);
                             });
    }));
    SHOAL_RETURN_IF_ERROR(Await(kConnectTimeout, "reach", [&](auto done) {
      asio::async_connect(socket_, found, [done](error_code e, const auto&) { done(e); });
    }));
    if (!address_.tls) return absl::OkStatus();
    error_code error;
    tls_context_.set_default_verify_paths(error);
    if (!ca_file.empty()) tls_context_.load_verify_file(ca_file, error);
    if (error) {
      return WithExitCode(absl::InvalidArgumentError(absl::StrCat(
                              "--server-ca ", ca_file, ": ", error.message(), "; expected PEM")),
                          kExitConfig);
    }
    tls_.emplace(socket_, tls_context_);
    tls_->set_verify_mode(asio::ssl::verify_peer);
    tls_->set_verify_callback(asio::ssl::host_name_verification(address_.host));
    SSL_set_tlsext_host_name(tls_->native_handle(), address_.host.c_str());
    return Await(kConnectTimeout, "speak TLS with",
                 [&](auto done) { tls_->async_handshake(asio::ssl::stream_base::client, done); });
  }

  absl::Status Send(http::request<http::string_body>& request) {
    return Await(kSilence, "write to", [&](auto done) {
      const auto written = [done](error_code e, size_t) { done(e); };
      tls_.has_value() ? http::async_write(*tls_, request, written)
                       : http::async_write(socket_, request, written);
    });
  }

  // Reads some more of the answer; its body so far is the parser's.
  absl::Status Read(http::response_parser<http::string_body>& parser) {
    return Await(kSilence, "read from", [&](auto done) {
      const auto read = [done](error_code e, size_t) { done(e); };
      tls_.has_value() ? http::async_read_some(*tls_, buffer_, parser, read)
                       : http::async_read_some(socket_, buffer_, parser, read);
    });
  }

 private:
  template <typename Start>
  absl::Status Await(std::chrono::seconds timeout, const char* verb, const Start& start) {
    std::optional<error_code> result;
    start([&result](error_code e) { result = e; });
    const auto deadline = std::chrono::steady_clock::now() + timeout;
    absl::Status given_up;
    while (!result.has_value()) {
      io_.restart();
      io_.run_for(kPoll);
      if (result.has_value() || !given_up.ok()) continue;
      if (stop_()) given_up = absl::CancelledError("interrupted");
      if (std::chrono::steady_clock::now() > deadline)
        given_up = Failure(verb, "no answer in time");
      error_code ignored;
      if (!given_up.ok()) socket_.close(ignored);  // completes what is pending
    }
    if (!given_up.ok()) return given_up;
    return *result ? Failure(verb, result->message()) : absl::OkStatus();
  }
  absl::Status Failure(const char* verb, const std::string& why) const {
    return Unavailable(absl::StrCat("cannot ", verb, " the server at ", address_.host, " port ",
                                    address_.port, ": ", why));
  }

  const ServerAddress& address_;
  const std::function<bool()>& stop_;
  asio::io_context io_;
  asio::ssl::context tls_context_{asio::ssl::context::tls_client};
  tcp::socket socket_;
  std::optional<asio::ssl::stream<tcp::socket&>> tls_;
  boost::beast::flat_buffer buffer_;
};

// Takes whole lines out of `text` and gives the data ones to `on_event`. True after [DONE].
absl::StatusOr<bool> TakeEvents(std::string& text,
                                const std::function<absl::Status(std::string_view)>& on_event) {
  size_t begin = 0;
  for (size_t end; (end = text.find('\n', begin)) != std::string::npos; begin = end + 1) {
    std::string_view line = std::string_view(text).substr(begin, end - begin);
    if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
    if (line.substr(0, 5) != "data:") continue;
    line.remove_prefix(5);
    if (!line.empty() && line.front() == ' ') line.remove_prefix(1);
    if (line == "[DONE]") return true;
    SHOAL_RETURN_IF_ERROR(on_event(line));
  }
  text.erase(0, begin);
  if (text.size() > kMaxLineBytes) return Unavailable("the server's stream has no line breaks");
  return false;
}

}  // namespace

absl::StatusOr<ServerAddress> ServerAddress::Parse(std::string_view url) {
  ServerAddress a;
  const size_t scheme = url.find("://");
  std::string_view rest = url.substr(scheme == url.npos ? 0 : scheme + 3);
  const std::string_view name = scheme == url.npos ? "http" : url.substr(0, scheme);
  a.tls = name == "https";
  const size_t slash = std::min(rest.find('/'), rest.size());
  a.prefix = std::string(rest.substr(slash));
  while (!a.prefix.empty() && a.prefix.back() == '/') a.prefix.pop_back();
  std::string_view authority = rest.substr(0, slash);
  a.port = a.tls ? "443" : "80";
  const size_t bracket = authority.rfind(']');
  const size_t colon = authority.rfind(':');
  if (colon != authority.npos && (bracket == authority.npos || colon > bracket)) {
    a.port = std::string(authority.substr(colon + 1));
    authority = authority.substr(0, colon);
  }
  if (authority.size() > 2 && authority.front() == '[' && authority.back() == ']') {
    authority = authority.substr(1, authority.size() - 2);
  }
  a.host = std::string(authority);
  int port = 0;
  if ((name != "http" && !a.tls) || a.host.empty() || !absl::SimpleAtoi(a.port, &port) ||
      port < 1 || port > 65535) {
    return UsageError(absl::StrCat("--server ", std::string(url),
                                   ": give an address such as http://localhost:8080"));
  }
  return a;
}

absl::Status ServerClient::Stream(
    const std::string& path, const std::string& body,
    const std::function<absl::Status(std::string_view data)>& on_event,
    const std::function<bool()>& stop) const {
  Connection connection(address_, stop);
  SHOAL_RETURN_IF_ERROR(connection.Open(ca_file_));
  http::request<http::string_body> request(http::verb::post, address_.prefix + path, 11);
  const bool v6 = address_.host.find(':') != std::string::npos;
  request.set(http::field::host,
              absl::StrCat(v6 ? "[" : "", address_.host, v6 ? "]" : "", ":", address_.port));
  request.set(http::field::content_type, "application/json");
  if (!key_.empty()) request.set(http::field::authorization, "Bearer " + key_);
  request.keep_alive(false);
  request.body() = body;
  request.prepare_payload();
  SHOAL_RETURN_IF_ERROR(connection.Send(request));

  http::response_parser<http::string_body> parser;
  parser.body_limit(boost::none);  // of a stream; its pieces are taken out as they come
  std::string text;
  while (!parser.is_done()) {
    SHOAL_RETURN_IF_ERROR(connection.Read(parser));
    if (!parser.is_header_done()) continue;
    text += std::exchange(parser.get().body(), std::string());
    if (parser.get().result() != http::status::ok) {
      if (text.size() > kMaxErrorBytes) break;
      continue;
    }
    SHOAL_ASSIGN_OR_RETURN(const bool done, TakeEvents(text, on_event));
    if (done) return absl::OkStatus();
  }
  const int status = parser.get().result_int();
  if (status != 200) return Refusal(status, text);
  return Unavailable("the server's answer ended early");
}

}  // namespace shoal
