#include "launcher/http_server.h"

#include <sys/socket.h>

#include <algorithm>
#include <unordered_set>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "boost/asio/ip/tcp.hpp"
#include "boost/asio/ssl/context.hpp"
#include "boost/asio/ssl/stream.hpp"
#include "boost/asio/steady_timer.hpp"
#include "boost/asio/write.hpp"
#include "boost/beast/core/flat_buffer.hpp"
#include "boost/beast/http/parser.hpp"
#include "boost/beast/http/read.hpp"
#include "boost/beast/http/string_body.hpp"

namespace shoal {
namespace {

namespace asio = boost::asio;
namespace http = boost::beast::http;
using asio::ip::tcp;
using boost::system::error_code;
using Clock = std::chrono::steady_clock;

constexpr std::chrono::milliseconds kSweep{500};
constexpr size_t kReadAheadBytes = 16 << 10;  // of a pipelined request
constexpr size_t kWatchBytes = 1024;

// A socket with or without TLS, in the shape that Beast reads from.
class AnyStream {
 public:
  using executor_type = tcp::socket::executor_type;
  AnyStream(tcp::socket socket, asio::ssl::context* tls) {
    if (tls != nullptr) {
      tls_.emplace(std::move(socket), *tls);
    } else {
      plain_.emplace(std::move(socket));
    }
  }
  executor_type get_executor() { return socket().get_executor(); }
  tcp::socket& socket() { return tls_.has_value() ? tls_->next_layer() : *plain_; }
  bool tls() const { return tls_.has_value(); }
  template <typename Handler>
  void Handshake(Handler&& handler) {
    tls_->async_handshake(asio::ssl::stream_base::server, std::forward<Handler>(handler));
  }
  template <typename Buffers, typename Handler>
  void async_read_some(const Buffers& buffers, Handler&& handler) {
    if (tls_.has_value()) {
      tls_->async_read_some(buffers, std::forward<Handler>(handler));
    } else {
      plain_->async_read_some(buffers, std::forward<Handler>(handler));
    }
  }
  template <typename Buffers, typename Handler>
  void async_write_some(const Buffers& buffers, Handler&& handler) {
    if (tls_.has_value()) {
      tls_->async_write_some(buffers, std::forward<Handler>(handler));
    } else {
      plain_->async_write_some(buffers, std::forward<Handler>(handler));
    }
  }

 private:
  std::optional<tcp::socket> plain_;
  std::optional<asio::ssl::stream<tcp::socket>> tls_;
};

}  // namespace

std::string_view HttpRequest::Header(std::string_view name) const {
  for (const auto& [key, value] : headers) {
    if (key == name) return value;
  }
  return {};
}

const char* HttpReason(int status) {
  const auto text = http::obsolete_reason(static_cast<http::status>(status));
  return text.data();
}

class HttpServer::Impl : public std::enable_shared_from_this<HttpServer::Impl> {
 public:
  class Connection;

  Impl(asio::io_context& io, HttpServerOptions options, HttpHandler& handler)
      : options(std::move(options)), handler(handler), io_(io), acceptor_(io), sweeper_(io) {}

  absl::Status Listen();
  void StopAccepting() {
    error_code ignored;
    acceptor_.close(ignored);
  }
  void Close();
  void Remove(Connection* c) { connections_.erase(c); }
  uint16_t port() const { return port_; }
  int connections() const { return static_cast<int>(connections_.size()); }

  const HttpServerOptions options;
  HttpHandler& handler;
  size_t body_bytes = 0;  // of all requests that are being read or answered

 private:
  void Accept();
  void Sweep();

  asio::io_context& io_;
  tcp::acceptor acceptor_;
  asio::steady_timer sweeper_;
  std::optional<asio::ssl::context> tls_;
  std::unordered_set<Connection*> connections_;
  uint16_t port_ = 0;
  bool closed_ = false;
};

class HttpServer::Impl::Connection : public HttpExchange,
                                     public std::enable_shared_from_this<Connection> {
 public:
  Connection(std::shared_ptr<Impl> server, tcp::socket socket, asio::ssl::context* tls)
      : server_(std::move(server)),
        stream_(std::move(socket), tls),
        buffer_(server_->options.header_bytes_max + kReadAheadBytes) {}
  ~Connection() override {
    ChargeBody(0);
    server_->Remove(this);
  }

  void Start() {
    if (!stream_.tls()) return ReadHeader(server_->options.header_timeout);
    deadline_ = Clock::now() + server_->options.header_timeout;
    stream_.Handshake([self = shared_from_this()](error_code error) {
      if (error) return self->Close();
      self->ReadHeader(self->server_->options.header_timeout);
    });
  }

  void Close() {
    if (closed_) return;
    closed_ = true;
    error_code ignored;
    stream_.socket().close(ignored);
    if (answering_ && on_closed_) std::exchange(on_closed_, nullptr)();
    on_closed_ = nullptr;
  }

  // Called twice a second.
  void Sweep(Clock::time_point now) {
    if (closed_) return;
    if (now >= deadline_) {
      if (reading_body_) return Refuse(408, "the request's body did not come in time");
      return Close();
    }
    if (writing_ && now - write_began_ > server_->options.write_timeout) return Close();
    if (streaming_ && !writing_ && now - write_began_ > server_->options.comment_interval) {
      Send(": keep-alive\n\n");
    }
  }

  const HttpRequest& request() const override { return request_; }
  void AddHeader(std::string name, std::string value) override {
    extra_headers_.emplace_back(std::move(name), std::move(value));
  }
  bool streaming() const override { return streaming_; }
  void SetOnClosed(std::function<void()> f) override {
    if (closed_) {
      if (f) f();
      return;
    }
    on_closed_ = std::move(f);
  }

  void Respond(HttpAnswer answer) override {
    if (closed_ || !answering_ || streaming_) return;
    std::string head = Head(answer.status, answer.content_type, answer.headers);
    absl::StrAppend(&head, "Content-Length: ", answer.body.size(), "\r\n\r\n");
    unsent_ += head;
    if (request_.method != "HEAD") unsent_ += answer.body;
    EndAnswer();
  }

  void BeginStream(std::vector<std::pair<std::string, std::string>> headers) override {
    if (closed_ || !answering_ || streaming_) return;
    headers.emplace_back("Cache-Control", "no-cache");
    headers.emplace_back("X-Accel-Buffering", "no");
    if (request_.http_1_0) request_.keep_alive = false;  // its end is the connection's
    unsent_ += Head(200, "text/event-stream; charset=utf-8", headers);
    unsent_ += request_.http_1_0 ? "\r\n" : "Transfer-Encoding: chunked\r\n\r\n";
    streaming_ = true;
    Flush();
  }

  void Send(std::string_view data) override {
    if (closed_ || !streaming_ || data.empty()) return;
    if (request_.http_1_0) {
      unsent_ += data;
    } else {
      absl::StrAppend(&unsent_, absl::Hex(data.size()), "\r\n");
      unsent_ += data;
      unsent_ += "\r\n";
    }
    if (unsent_.size() > server_->options.unsent_bytes_max) return Close();
    Flush();
  }

  void EndStream() override {
    if (closed_ || !streaming_) return;
    if (!request_.http_1_0) unsent_ += "0\r\n\r\n";
    EndAnswer();
  }

 private:
  using Parser = http::request_parser<http::string_body>;

  std::string Head(int status, std::string_view content_type,
                   const std::vector<std::pair<std::string, std::string>>& headers) const {
    std::string head = absl::StrCat(request_.http_1_0 ? "HTTP/1.0 " : "HTTP/1.1 ", status, " ",
                                    HttpReason(status), "\r\n");
    if (!content_type.empty()) {
      head.append("Content-Type: ").append(content_type).append("\r\n");
    }
    head += request_.keep_alive ? "Connection: keep-alive\r\n" : "Connection: close\r\n";
    for (const auto* list : {&headers, &extra_headers_}) {
      for (const auto& [name, value] : *list) {
        head.append(name).append(": ").append(value).append("\r\n");
      }
    }
    return head;
  }

  void ChargeBody(size_t bytes) {
    server_->body_bytes += bytes - charged_;
    charged_ = bytes;
  }

  void ReadHeader(std::chrono::seconds timeout) {
    if (closed_) return;
    request_ = {};
    extra_headers_.clear();
    parser_.emplace();
    parser_->header_limit(static_cast<uint32_t>(server_->options.header_bytes_max));
    parser_->body_limit(boost::none);  // set in OnHeader: the handler is asked first
    deadline_ = Clock::now() + timeout;
    http::async_read_header(
        stream_, buffer_, *parser_,
        [self = shared_from_this()](error_code error, size_t) { self->OnHeader(error); });
  }

  void OnHeader(error_code error) {
    if (closed_) return;
    if (error == http::error::header_limit || error == http::error::buffer_overflow) {
      return Refuse(431, absl::StrCat("the headers are larger than ",
                                      server_->options.header_bytes_max, " bytes"));
    }
    if (error.category() == http::make_error_code(http::error::bad_method).category() &&
        error != http::error::end_of_stream && error != http::error::partial_message) {
      return Refuse(400, absl::StrCat("malformed request: ", error.message()));
    }
    if (error) return Close();
    FillRequest();
    if (const auto fault = FindFault()) return Refuse(fault->first, fault->second);
    answering_ = true;
    if (std::optional<HttpAnswer> answer = server_->handler.OnHeaders(request_)) {
      // The body stays unread, so the connection cannot be used again.
      request_.keep_alive = request_.keep_alive && parser_->is_done();
      return Respond(*std::move(answer));
    }
    if (parser_->content_length().value_or(0) > server_->options.body_bytes_max) {
      return RefuseBody();
    }
    parser_->body_limit(server_->options.body_bytes_max);
    if (absl::AsciiStrToLower(std::string(request_.Header("expect"))) == "100-continue") {
      unsent_ += "HTTP/1.1 100 Continue\r\n\r\n";
      Flush();
    }
    reading_body_ = true;
    deadline_ = Clock::now() + server_->options.body_timeout;
    ReadBody();
  }

  void FillRequest() {
    const auto& message = parser_->get();
    request_.method = std::string(message.method_string());
    const std::string target(message.target());
    const size_t question = target.find('?');
    request_.path = target.substr(0, question);
    if (question != std::string::npos) request_.query = target.substr(question + 1);
    request_.keep_alive = message.keep_alive();
    request_.http_1_0 = message.version() < 11;
    for (const auto& field : message) {
      request_.headers.emplace_back(absl::AsciiStrToLower(std::string(field.name_string())),
                                    std::string(field.value()));
    }
  }

  // What Beast lets pass, but this server would read in another way than a proxy before it might.
  std::optional<std::pair<int, std::string>> FindFault() const {
    int hosts = 0;
    for (const auto& [name, value] : request_.headers) {
      const std::string lower = absl::AsciiStrToLower(value);
      hosts += name == "host" ? 1 : 0;
      if (name == "transfer-encoding" && lower != "chunked") {
        return {{501, "of transfer encodings this server knows chunked alone"}};
      }
      if (name == "content-encoding" && lower != "identity") {
        return {{415, "bodies must come without a content encoding"}};
      }
    }
    if (hosts > 1 || (hosts == 0 && !request_.http_1_0)) {
      return {{400, absl::StrCat("malformed request: ", hosts, " Host headers, expected one")}};
    }
    return std::nullopt;
  }

  void ReadBody() {
    if (parser_->is_done()) return OnBody();
    body_read_pending_ = true;
    http::async_read_some(
        stream_, buffer_, *parser_, [self = shared_from_this()](error_code error, size_t) {
          self->body_read_pending_ = false;
          if (self->closed_ || !self->reading_body_) return;
          if (error == http::error::body_limit) return self->RefuseBody();
          if (error &&
              error.category() == http::make_error_code(http::error::bad_chunk).category() &&
              error != http::error::partial_message && error != http::error::end_of_stream) {
            return self->Refuse(400, absl::StrCat("malformed request: ", error.message()));
          }
          if (error) return self->Close();
          self->ChargeBody(self->parser_->get().body().size());
          if (self->server_->body_bytes > self->server_->options.all_bodies_bytes_max) {
            return self->Refuse(503, "too many large requests at once");
          }
          self->ReadBody();
        });
  }

  void OnBody() {
    reading_body_ = false;
    deadline_ = Clock::time_point::max();
    request_.body = std::move(parser_->get().body());
    parser_.reset();
    Watch();
    server_->handler.OnRequest(shared_from_this());
  }

  void RefuseBody() {
    Refuse(413,
           absl::StrCat("the body is larger than ", server_->options.body_bytes_max, " bytes"));
  }

  // Answers what is not a request, and closes.
  void Refuse(int status, const std::string& message) {
    reading_body_ = false;
    request_.keep_alive = false;
    answering_ = true;
    Respond(server_->handler.OnBadRequest(status, message));
  }

  // While a request is answered, a read tells when the client goes away. Bytes of a pipelined
  // request are kept; where there are some already the read might wait for ever, while they are a
  // whole request.
  void Watch() {
    if (closed_ || watching_ || buffer_.size() > 0) return;
    watching_ = true;
    stream_.async_read_some(buffer_.prepare(kWatchBytes),
                            [self = shared_from_this()](error_code error, size_t bytes) {
                              self->watching_ = false;
                              if (self->closed_) return;
                              if (error) return self->Close();
                              self->buffer_.commit(bytes);
                              // A client that pipelines is not watched any further.
                              if (!self->answering_) {
                                self->ReadHeader(self->server_->options.header_timeout);
                              }
                            });
  }

  void EndAnswer() {
    streaming_ = false;
    answering_ = false;
    on_closed_ = nullptr;
    ended_ = true;
    ChargeBody(0);
    Flush();
  }

  void Flush() {
    if (writing_ || closed_) return;
    if (unsent_.empty()) return OnAllSent();
    writing_ = true;
    write_began_ = Clock::now();
    sending_.swap(unsent_);
    asio::async_write(stream_, asio::buffer(sending_),
                      [self = shared_from_this()](error_code error, size_t) {
                        self->writing_ = false;
                        self->sending_.clear();
                        if (error) return self->Close();
                        self->Flush();
                      });
  }

  void OnAllSent() {
    if (!ended_) return;
    ended_ = false;
    if (!request_.keep_alive) return Linger();
    deadline_ = Clock::now() + server_->options.idle_timeout;
    // A read that watched the client gets the next request's first bytes instead.
    if (!watching_) ReadHeader(server_->options.idle_timeout);
  }

  // A close with unread bytes would reset the connection and take the answer with it: say that
  // nothing more comes, and give the client a moment to stop talking.
  void Linger() {
    error_code ignored;
    stream_.socket().shutdown(tcp::socket::shutdown_send, ignored);
    deadline_ = Clock::now() + std::chrono::seconds(2);
    Discard();
  }
  void Discard() {
    if (watching_ || body_read_pending_ || closed_) return;
    buffer_.clear();
    stream_.socket().async_read_some(buffer_.prepare(kReadAheadBytes),
                                     [self = shared_from_this()](error_code error, size_t) {
                                       if (error) return self->Close();
                                       self->Discard();
                                     });
  }

  const std::shared_ptr<Impl> server_;
  AnyStream stream_;
  boost::beast::flat_buffer buffer_;
  std::optional<Parser> parser_;
  HttpRequest request_;
  std::vector<std::pair<std::string, std::string>> extra_headers_;
  std::function<void()> on_closed_;
  std::string unsent_;
  std::string sending_;
  size_t charged_ = 0;
  Clock::time_point deadline_ = Clock::time_point::max();
  Clock::time_point write_began_ = Clock::now();
  bool answering_ = false;
  bool streaming_ = false;
  bool ended_ = false;
  bool reading_body_ = false;
  bool body_read_pending_ = false;
  bool watching_ = false;
  bool writing_ = false;
  bool closed_ = false;
};

absl::Status HttpServer::Impl::Listen() {
  error_code error;
  if (!options.tls_certificate.empty()) {
    tls_.emplace(asio::ssl::context::tls_server);
    tls_->set_options(asio::ssl::context::no_tlsv1 | asio::ssl::context::no_tlsv1_1 |
                          asio::ssl::context::default_workarounds,
                      error);
    tls_->use_certificate_chain_file(options.tls_certificate, error);
    if (error) {
      return absl::InvalidArgumentError(absl::StrCat("TLS certificate ", options.tls_certificate,
                                                     ": ", error.message(), "; expected PEM"));
    }
    tls_->use_private_key_file(options.tls_key, asio::ssl::context::pem, error);
    if (error) {
      return absl::InvalidArgumentError(
          absl::StrCat("TLS key ", options.tls_key, ": ", error.message(), "; expected PEM"));
    }
  }
  const asio::ip::address address = asio::ip::make_address(options.address, error);
  if (error) {
    return absl::InvalidArgumentError(
        absl::StrCat("--listen ", options.address, " is not an IP address"));
  }
  const tcp::endpoint endpoint(address, options.port);
  acceptor_.open(endpoint.protocol(), error);
  if (!error) acceptor_.set_option(tcp::acceptor::reuse_address(true), error);
  if (!error) acceptor_.bind(endpoint, error);
  if (!error) acceptor_.listen(asio::socket_base::max_listen_connections, error);
  if (error) {
    const bool taken = error == boost::system::errc::address_in_use;
    return absl::UnavailableError(absl::StrCat("cannot listen on ", options.address, " port ",
                                               options.port, ": ", error.message(),
                                               taken ? "; choose another with --port" : ""));
  }
  port_ = acceptor_.local_endpoint().port();
  Accept();
  Sweep();
  return absl::OkStatus();
}

void HttpServer::Impl::Accept() {
  acceptor_.async_accept([self = shared_from_this()](error_code error, tcp::socket socket) {
    if (!self->acceptor_.is_open()) return;
    if (error) {  // out of descriptors, most likely: some connection has to end first
      auto pause = std::make_shared<asio::steady_timer>(self->io_, std::chrono::milliseconds(100));
      pause->async_wait([self, pause](error_code) {
        if (self->acceptor_.is_open()) self->Accept();
      });
      return;
    }
    if (self->connections() >= self->options.connections_max) {
      static constexpr char kFull[] =
          "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\n"
          "Content-Length: 0\r\n\r\n";
      // Not worth a wait: a client that does not get it sees a closed connection.
      send(socket.native_handle(), kFull, sizeof kFull - 1, MSG_DONTWAIT | MSG_NOSIGNAL);
    } else {
      error_code ignored;
      socket.set_option(tcp::no_delay(true), ignored);
      auto connection = std::make_shared<Connection>(
          self, std::move(socket), self->tls_.has_value() ? &*self->tls_ : nullptr);
      self->connections_.insert(connection.get());
      connection->Start();
    }
    self->Accept();
  });
}

void HttpServer::Impl::Sweep() {
  sweeper_.expires_after(kSweep);
  sweeper_.async_wait([self = shared_from_this()](error_code error) {
    if (error || self->closed_) return;
    const Clock::time_point now = Clock::now();
    // Copied, and held: closing one may end others.
    std::vector<std::shared_ptr<Connection>> all;
    for (Connection* c : self->connections_) {
      if (auto held = c->weak_from_this().lock()) all.push_back(std::move(held));
    }
    for (const auto& c : all) c->Sweep(now);
    self->Sweep();
  });
}

void HttpServer::Impl::Close() {
  closed_ = true;
  StopAccepting();
  sweeper_.cancel();
  std::vector<std::shared_ptr<Connection>> all;
  for (Connection* c : connections_) {
    if (auto held = c->weak_from_this().lock()) all.push_back(std::move(held));
  }
  for (const auto& c : all) c->Close();
}

HttpServer::HttpServer(asio::io_context& io, HttpServerOptions options, HttpHandler& handler)
    : impl_(std::make_shared<Impl>(io, std::move(options), handler)) {}
HttpServer::~HttpServer() { impl_->Close(); }
absl::Status HttpServer::Listen() { return impl_->Listen(); }
uint16_t HttpServer::port() const { return impl_->port(); }
int HttpServer::connections() const { return impl_->connections(); }
void HttpServer::StopAccepting() { impl_->StopAccepting(); }
void HttpServer::Close() { impl_->Close(); }

}  // namespace shoal
