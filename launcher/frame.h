// Protobuf messages over a stream socket: a length in bytes (u32, little-endian), then the message.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "google/protobuf/message_lite.h"

namespace shoal {

inline constexpr size_t kFrameHeaderBytes = 4;
// The longest prompt that fits, with room: both ends belong to one program, so more is a bug or
// damage.
inline constexpr uint32_t kMaxFrameBytes = 64u << 20;

std::string EncodeFrame(const google::protobuf::MessageLite& message);
// The length that a header announces, or kDataLoss when it is beyond kMaxFrameBytes.
absl::Status ParseFrameHeader(const uint8_t header[kFrameHeaderBytes], uint32_t* bytes);

// Blocking, for a socket that one thread writes or reads at a time. kUnavailable when the other end
// is gone.
absl::Status WriteFrame(int fd, const google::protobuf::MessageLite& message);
absl::Status ReadFrame(int fd, google::protobuf::MessageLite* message);

}  // namespace shoal
