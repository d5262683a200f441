#include "comm/liveness.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"

namespace shoal {

struct Liveness::Frame {
  enum Kind : uint16_t { kHello = 1, kBeat, kLost, kAbort, kLeft };
  Kind kind;
  uint16_t code = 0;
  int32_t rank = 0;
  std::string text = {};
};

namespace {

// Not moved by whoever sets the clock.
absl::Time MonotonicNow() {
  return absl::UnixEpoch() + absl::FromChrono(std::chrono::steady_clock::now().time_since_epoch());
}

constexpr uint32_t kMagic = 0x564c4853;  // "SHLV"
constexpr size_t kTextLimit = 1024;
constexpr size_t kStrangersLimit = 16;  // connections that have not introduced themselves

struct Header {
  uint32_t magic;
  uint16_t kind;
  uint16_t code;
  int32_t rank;
  uint32_t text_bytes;
};
static_assert(sizeof(Header) == 16);

std::string Encode(uint16_t kind, uint16_t code, int32_t rank, std::string_view text) {
  text = text.substr(0, kTextLimit);
  const Header header{kMagic, kind, code, rank, static_cast<uint32_t>(text.size())};
  std::string bytes(reinterpret_cast<const char*>(&header), sizeof header);
  bytes.append(text);
  return bytes;
}

absl::StatusOr<sockaddr_in> SocketAddress(const std::string& address, uint16_t port) {
  sockaddr_in socket_address{};
  socket_address.sin_family = AF_INET;
  socket_address.sin_port = htons(port);
  if (inet_pton(AF_INET, address.c_str(), &socket_address.sin_addr) != 1) {
    return absl::InvalidArgumentError(absl::StrCat("'", address, "' is not an IPv4 address"));
  }
  return socket_address;
}

absl::Status Unreachable(const Invitation& invitation, int error) {
  return absl::UnavailableError(absl::StrCat(
      "cannot reach rank 0 at ", invitation.address.data(), ":", invitation.port, " (",
      std::strerror(error),
      "); check that a firewall lets the ranks' hosts talk, or choose another network with --net"));
}

// A frame is at most a kilobyte and the socket's buffer far more, so a full buffer means that the
// peer has been deaf for long: it is about to be declared lost, and the rest of the frame does not
// matter.
void SendAll(int fd, const std::string& bytes) {
  size_t sent = 0;
  while (sent < bytes.size()) {
    const ssize_t n = send(fd, bytes.data() + sent, bytes.size() - sent, MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return;
    sent += n;
  }
}

void TuneConnection(int fd) {
  const int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

}  // namespace

absl::StatusOr<Liveness::Listener> Liveness::Listen(const std::string& address) {
  absl::StatusOr<sockaddr_in> at = SocketAddress(address, 0);
  if (!at.ok()) return at.status();
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  socklen_t length = sizeof *at;
  if (fd < 0 || bind(fd, reinterpret_cast<sockaddr*>(&*at), sizeof *at) != 0 ||
      listen(fd, SOMAXCONN) != 0 ||
      getsockname(fd, reinterpret_cast<sockaddr*>(&*at), &length) != 0) {
    const int error = errno;
    if (fd >= 0) close(fd);
    return absl::UnavailableError(
        absl::StrCat("cannot listen on ", address, ": ", std::strerror(error)));
  }
  Listener listener{fd, {}};
  address.copy(listener.invitation.address.data(), listener.invitation.address.size() - 1);
  listener.invitation.port = ntohs(at->sin_port);
  std::array<uint8_t, 16>& token = listener.invitation.token;
  SHOAL_CHECK(getrandom(token.data(), token.size(), 0) == static_cast<ssize_t>(token.size()),
              "the kernel gave no random bytes");
  return listener;
}

Liveness::Liveness(LivenessOptions options, OnFailure on_failure)
    : options_(std::move(options)),
      on_failure_(std::move(on_failure)),
      wake_fd_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      join_deadline_(MonotonicNow() + options_.connect),
      left_(options_.hosts.size()),
      joined_(options_.hosts.size()),
      last_beat_(MonotonicNow()) {
  SHOAL_CHECK(wake_fd_ >= 0, "no event descriptor: raise the limit of open files");
}

std::unique_ptr<Liveness> Liveness::Host(LivenessOptions options, const Listener& listener,
                                         OnFailure on_failure) {
  std::unique_ptr<Liveness> self(new Liveness(std::move(options), std::move(on_failure)));
  self->listener_ = listener.fd;
  self->token_ = listener.invitation.token;
  self->thread_ = std::thread([raw = self.get()] { raw->Run(); });
  return self;
}

absl::StatusOr<std::unique_ptr<Liveness>> Liveness::Join(LivenessOptions options,
                                                         const Invitation& invitation,
                                                         OnFailure on_failure) {
  absl::StatusOr<sockaddr_in> at = SocketAddress(invitation.address.data(), invitation.port);
  if (!at.ok()) return at.status();
  const absl::Duration patience = options.connect;
  std::unique_ptr<Liveness> self(new Liveness(std::move(options), std::move(on_failure)));
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) return Unreachable(invitation, errno);
  self->connections_.push_back({fd, 0, MonotonicNow(), ""});
  if (connect(fd, reinterpret_cast<sockaddr*>(&*at), sizeof *at) != 0) {
    if (errno != EINPROGRESS) return Unreachable(invitation, errno);
    pollfd wait{fd, POLLOUT, 0};
    const absl::Time deadline = MonotonicNow() + patience;
    int ready;
    do {
      ready =
          poll(&wait, 1, static_cast<int>(absl::ToInt64Milliseconds(deadline - MonotonicNow())));
    } while (ready < 0 && errno == EINTR && MonotonicNow() < deadline);
    int error = ETIMEDOUT;
    socklen_t length = sizeof error;
    if (ready > 0) getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length);
    if (error != 0) return Unreachable(invitation, error);
  }
  TuneConnection(fd);
  const std::string_view token(reinterpret_cast<const char*>(invitation.token.data()),
                               invitation.token.size());
  SendAll(fd, Encode(Frame::kHello, 0, self->options_.rank, token));
  self->connections_[0].heard = MonotonicNow();
  self->thread_ = std::thread([raw = self.get()] { raw->Run(); });
  return self;
}

Liveness::~Liveness() {
  {
    MutexLock lock(&mu_);
    stop_ = true;
  }
  Wake();
  if (thread_.joinable()) thread_.join();
  for (const Connection& connection : connections_) {
    if (connection.fd >= 0) close(connection.fd);
  }
  if (listener_ >= 0) close(listener_);
  close(wake_fd_);
}

void Liveness::Wake() {
  const uint64_t one = 1;
  // It can fail only when the counter is full, and then the thread is awake.
  if (write(wake_fd_, &one, sizeof one) < 0) return;
}

std::string Liveness::Name(int rank) const {
  return absl::StrCat("rank ", rank, " on host ", options_.hosts[rank]);
}

void Liveness::Abort(const absl::Status& reason) {
  SHOAL_CHECK(!reason.ok(), "an abort needs a reason");
  {
    MutexLock lock(&mu_);
    if (abort_.ok()) abort_ = reason;
  }
  Wake();
}

void Liveness::Leave() {
  left_[options_.rank].store(true, std::memory_order_release);
  Wake();
}

void Liveness::Run() {
  absl::Time last_turn = MonotonicNow(), next_beat = last_turn;
  bool said_left = false;
  while (true) {
    const absl::Time now = MonotonicNow();
    // After a short pause of this very process the others' beats lie unread: that is no silence of
    // theirs.
    if (!WasGivenUp() && now - last_turn > options_.silence / 2) {
      for (Connection& connection : connections_) connection.heard = now;
    }
    last_turn = now;

    absl::Status abort;
    bool stop;
    {
      MutexLock lock(&mu_);
      abort = abort_;
      stop = stop_;
    }
    if (!abort.ok() && !failed_) {
      Send({Frame::kAbort, static_cast<uint16_t>(abort.code()), options_.rank,
            std::string(abort.message())});
      Fail({abort, options_.rank, false, true, false});
    }
    if (!said_left && has_left(options_.rank)) {
      said_left = true;
      Send({Frame::kLeft, 0, options_.rank});
    }
    if (stop) return;
    if (now >= next_beat) {
      Send({Frame::kBeat, 0, options_.rank});
      // One that nobody was there to hear does not count.
      if (std::any_of(connections_.begin(), connections_.end(),
                      [](const Connection& c) { return c.peer >= 0; })) {
        last_beat_ = now;
      }
      next_beat = now + options_.interval;
    }
    CheckSilence(now);
    Listen(next_beat - MonotonicNow());
  }
}

// Waits for something to read, at most `patience`, and reads it.
void Liveness::Listen(absl::Duration patience) {
  std::vector<pollfd> polls = {{wake_fd_, POLLIN, 0}, {listener_, POLLIN, 0}};
  for (const Connection& connection : connections_) polls.push_back({connection.fd, POLLIN, 0});
  const int64_t milliseconds =
      absl::ToInt64Milliseconds(absl::Ceil(patience, absl::Milliseconds(1)));
  if (poll(polls.data(), polls.size(), static_cast<int>(std::max<int64_t>(milliseconds, 0))) <= 0) {
    return;
  }
  uint64_t ignored;
  if (polls[0].revents != 0 && read(wake_fd_, &ignored, sizeof ignored) < 0) return;
  const size_t count = connections_.size();
  if (polls[1].revents != 0) Accept();
  for (size_t i = 0; i < count; ++i) {
    if (polls[i + 2].revents != 0) Read(connections_[i]);
  }
  std::erase_if(connections_, [](const Connection& connection) { return connection.fd < 0; });
}

void Liveness::Accept() {
  const int fd = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
  if (fd < 0) return;
  const auto strangers = std::count_if(connections_.begin(), connections_.end(),
                                       [](const Connection& c) { return c.peer < 0; });
  if (static_cast<size_t>(strangers) >= kStrangersLimit + options_.hosts.size()) {
    close(fd);
    return;
  }
  TuneConnection(fd);
  connections_.push_back({fd, -1, MonotonicNow(), ""});
}

void Liveness::Read(Connection& connection) {
  char bytes[4096];
  const ssize_t n = recv(connection.fd, bytes, sizeof bytes, 0);
  if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (n <= 0) return Close(connection, "its connection closed");
  connection.heard = MonotonicNow();
  connection.received.append(bytes, n);
  Header header;
  while (connection.received.size() >= sizeof header) {
    std::memcpy(&header, connection.received.data(), sizeof header);
    if (header.magic != kMagic || header.text_bytes > kTextLimit || header.rank < 0 ||
        header.rank >= static_cast<int32_t>(options_.hosts.size())) {
      return Close(connection, "it sent something that is not a heartbeat");
    }
    if (connection.received.size() < sizeof header + header.text_bytes) return;
    const Frame frame{static_cast<Frame::Kind>(header.kind), header.code, header.rank,
                      connection.received.substr(sizeof header, header.text_bytes)};
    connection.received.erase(0, sizeof header + header.text_bytes);
    if (connection.peer < 0) {
      if (!Introduce(connection, frame)) return Close(connection, "");
    } else {
      HandleFrame(connection, frame);
    }
  }
}

// A stranger's first frame: false unless it is a rank of this job that has not joined yet.
bool Liveness::Introduce(Connection& connection, const Frame& frame) {
  const std::string_view token(reinterpret_cast<const char*>(token_.data()), token_.size());
  if (frame.kind != Frame::kHello || frame.text != token || frame.rank == 0 ||
      joined_[frame.rank]) {
    return false;
  }
  joined_[frame.rank] = true;
  connection.peer = frame.rank;
  SendAll(connection.fd, news_);
  return true;
}

void Liveness::HandleFrame(Connection& connection, const Frame& frame) {
  const bool from_origin = options_.rank == 0;  // a worker hears of the others through rank 0
  const int rank = from_origin ? connection.peer : frame.rank;
  if (frame.kind == Frame::kLeft) {
    left_[rank].store(true, std::memory_order_release);
    if (options_.rank == 0) Send(frame, rank);
  } else if (frame.kind == Frame::kAbort) {
    if (options_.rank == 0) Send(frame, rank);
    Fail({absl::Status(static_cast<absl::StatusCode>(frame.code),
                       absl::StrCat(Name(rank), ": ", frame.text)),
          rank, false, false, false});
  } else if (frame.kind == Frame::kLost && options_.rank != 0) {
    Lose(rank, frame.text);
  }
}

void Liveness::Close(Connection& connection, std::string_view why) {
  close(connection.fd);
  connection.fd = -1;
  const int peer = connection.peer;
  connection.peer = -1;
  if (peer >= 0 && !has_left(peer)) Lose(peer, why);
}

void Liveness::CheckSilence(absl::Time now) {
  for (Connection& connection : connections_) {
    if (now - connection.heard <= options_.silence) continue;
    Close(connection, absl::StrCat("no sign of life for ", absl::FormatDuration(options_.silence)));
  }
  std::erase_if(connections_, [](const Connection& connection) { return connection.fd < 0; });
  if (options_.rank != 0 || now < join_deadline_) return;
  for (size_t r = 1; r < joined_.size(); ++r) {
    if (joined_[r]) continue;
    joined_[r] = true;  // said once
    Lose(static_cast<int>(r),
         absl::StrCat("it did not reach rank 0 within ", absl::FormatDuration(options_.connect)));
  }
}

// A rank that has sent no beat for so long was stopped, and the others have given it up: what it
// sees then, their closed connections too, is its own doing, and it is not the one to blame them.
bool Liveness::WasGivenUp() {
  const absl::Duration pause = MonotonicNow() - last_beat_;
  if (pause <= options_.silence) return false;
  Fail({absl::UnavailableError(
            absl::StrCat("this process, ", Name(options_.rank), ", was stopped for ",
                         absl::FormatDuration(absl::Trunc(pause, absl::Milliseconds(100))),
                         " and is no longer part of the job")),
        options_.rank, true, false, false});
  return true;
}

void Liveness::Lose(int rank, std::string_view why) {
  if (WasGivenUp()) return;
  if (options_.rank == 0) Send({Frame::kLost, 0, rank, std::string(why)}, rank);
  const int lowest_survivor = rank == 0 ? 1 : 0;
  Fail({absl::UnavailableError(absl::StrCat(Name(rank), " was lost: ", std::string(why))), rank,
        true, false, options_.rank == lowest_survivor});
}

void Liveness::Fail(const JobFailure& failure) {
  if (failed_) return;
  failed_ = true;
  on_failure_(failure);
}

void Liveness::Send(const Frame& frame, int except) {
  const std::string bytes = Encode(frame.kind, frame.code, frame.rank, frame.text);
  // At most a loss, an abort and a farewell of each rank.
  if (options_.rank == 0 && frame.kind != Frame::kBeat) news_ += bytes;
  for (const Connection& connection : connections_) {
    if (connection.fd >= 0 && connection.peer >= 0 && connection.peer != except) {
      SendAll(connection.fd, bytes);
    }
  }
}

}  // namespace shoal
