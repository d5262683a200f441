#include "launcher/auth.h"

#include <openssl/crypto.h>
#include <openssl/sha.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <iterator>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace shoal {
namespace {

constexpr size_t kShortestKey = 8;
constexpr size_t kMaxKeys = 10000;

}  // namespace

ApiKeys::Digest ApiKeys::Hash(std::string_view key) {
  Digest digest;
  SHA256(reinterpret_cast<const unsigned char*>(key.data()), key.size(), digest.data());
  return digest;
}

absl::StatusOr<ApiKeys> ApiKeys::Load(const std::string& path) {
  std::ifstream in(path);
  const std::string text((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  if (!in) return absl::NotFoundError(absl::StrCat("cannot read the key file ", path));
  absl::StatusOr<ApiKeys> keys = Parse(text);
  if (!keys.ok()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", keys.status().message()));
  }
  return keys;
}

absl::StatusOr<ApiKeys> ApiKeys::Parse(std::string_view text) {
  ApiKeys keys;
  int number = 0;
  for (absl::string_view raw : absl::StrSplit(absl::string_view(text.data(), text.size()), '\n')) {
    ++number;
    const std::string line(absl::StripAsciiWhitespace(raw));
    if (line.empty() || line[0] == '#') continue;
    const size_t colon = line.find(':');
    const std::string key = colon == std::string::npos ? line : line.substr(colon + 1);
    std::string name = colon == std::string::npos || colon == 0
                           ? absl::StrCat("key-", keys.keys_.size() + 1)
                           : line.substr(0, colon);
    if (key.size() < kShortestKey) {
      return absl::InvalidArgumentError(
          absl::StrCat("line ", number, ": a key has at least ", kShortestKey, " characters"));
    }
    if (keys.keys_.size() >= kMaxKeys) {
      return absl::InvalidArgumentError(absl::StrCat("more than ", kMaxKeys, " keys"));
    }
    keys.keys_.emplace_back(std::move(name), Hash(key));
  }
  if (keys.keys_.empty()) return absl::InvalidArgumentError("no key in the file");
  return keys;
}

std::optional<std::string> ApiKeys::Identify(std::string_view key) const {
  const Digest digest = Hash(key);
  const std::string* found = nullptr;
  for (const auto& [name, known] : keys_) {
    if (CRYPTO_memcmp(known.data(), digest.data(), digest.size()) == 0) found = &name;
  }
  if (found == nullptr) return std::nullopt;
  return *found;
}

std::string KeyFromAuthorization(std::string_view header) {
  const size_t space = header.find(' ');
  if (space == std::string_view::npos) return "";
  const std::string scheme = absl::AsciiStrToLower(std::string(header.substr(0, space)));
  const std::string value(absl::StripAsciiWhitespace(std::string(header.substr(space + 1))));
  if (scheme == "bearer") return value;
  std::string decoded;
  if (scheme != "basic" || !absl::Base64Unescape(value, &decoded)) return "";
  const size_t colon = decoded.find(':');
  return colon == std::string::npos ? "" : decoded.substr(colon + 1);
}

std::optional<int> ClientLimiter::Begin(const std::string& client,
                                        std::chrono::steady_clock::time_point now) {
  MutexLock lock(&mu_);
  const auto [it, added] = clients_.try_emplace(client);
  Client& c = it->second;
  if (limits_.concurrent > 0 && c.concurrent >= limits_.concurrent) return 1;
  if (limits_.requests_per_minute > 0) {
    const double rate = limits_.requests_per_minute / 60.0;
    const double full = std::max(1.0, limits_.requests_per_minute / 6.0);  // ten seconds' worth
    if (added) {
      c.tokens = full;
    } else {
      c.tokens += std::chrono::duration<double>(now - c.filled).count() * rate;
      c.tokens = std::min(c.tokens, full);
    }
    c.filled = now;
    if (c.tokens < 1) return static_cast<int>(std::ceil((1 - c.tokens) / rate));
    c.tokens -= 1;
  }
  ++c.concurrent;
  return std::nullopt;
}

void ClientLimiter::End(const std::string& client) {
  MutexLock lock(&mu_);
  const auto it = clients_.find(client);
  if (it != clients_.end() && it->second.concurrent > 0) --it->second.concurrent;
}

}  // namespace shoal
