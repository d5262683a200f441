#include "launcher/frame.h"

#include <sys/socket.h>

#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "kernels/status_macros.h"

namespace shoal {
namespace {

absl::Status ReadAll(int fd, void* data, size_t bytes) {
  auto* p = static_cast<char*>(data);
  while (bytes > 0) {
    const ssize_t n = recv(fd, p, bytes, 0);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return absl::UnavailableError(absl::StrCat("socket: ", strerror(errno)));
    if (n == 0) return absl::UnavailableError("the other end closed the socket");
    p += n;
    bytes -= static_cast<size_t>(n);
  }
  return absl::OkStatus();
}

}  // namespace

std::string EncodeFrame(const google::protobuf::MessageLite& message) {
  std::string out(kFrameHeaderBytes, '\0');
  message.AppendToString(&out);
  const auto size = static_cast<uint32_t>(out.size() - kFrameHeaderBytes);
  for (size_t i = 0; i < kFrameHeaderBytes; ++i) out[i] = static_cast<char>(size >> (8 * i));
  return out;
}

absl::Status ParseFrameHeader(const uint8_t header[kFrameHeaderBytes], uint32_t* bytes) {
  *bytes = 0;
  for (size_t i = 0; i < kFrameHeaderBytes; ++i) *bytes |= uint32_t{header[i]} << (8 * i);
  if (*bytes > kMaxFrameBytes) {
    return absl::DataLossError(
        absl::StrCat("a frame of ", *bytes, " bytes; at most ", kMaxFrameBytes, " are allowed"));
  }
  return absl::OkStatus();
}

absl::Status WriteFrame(int fd, const google::protobuf::MessageLite& message) {
  const std::string frame = EncodeFrame(message);
  for (size_t sent = 0; sent < frame.size();) {
    const ssize_t n = send(fd, frame.data() + sent, frame.size() - sent, MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return absl::UnavailableError(absl::StrCat("socket: ", strerror(errno)));
    sent += static_cast<size_t>(n);
  }
  return absl::OkStatus();
}

absl::Status ReadFrame(int fd, google::protobuf::MessageLite* message) {
  uint8_t header[kFrameHeaderBytes];
  SHOAL_RETURN_IF_ERROR(ReadAll(fd, header, sizeof header));
  uint32_t bytes = 0;
  SHOAL_RETURN_IF_ERROR(ParseFrameHeader(header, &bytes));
  std::string body(bytes, '\0');
  SHOAL_RETURN_IF_ERROR(ReadAll(fd, body.data(), bytes));
  if (!message->ParseFromString(body)) return absl::DataLossError("a frame that does not parse");
  return absl::OkStatus();
}

}  // namespace shoal
