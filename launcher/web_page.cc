#include "launcher/web_page.h"

#include <openssl/sha.h>

#include <string>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "kernels/check.h"

// web/embed.S
extern "C" const char shoal_web_page_begin[];
extern "C" const char shoal_web_page_end[];

namespace shoal {
namespace {

// 'sha256-...' of what stands between the two tags.
std::string HashOf(std::string_view page, std::string_view begin_tag, std::string_view end_tag) {
  const size_t begin = page.find(begin_tag);
  const size_t end = page.find(end_tag, begin);
  SHOAL_CHECK(begin != page.npos && end != page.npos, "the page has one style and one script");
  const std::string_view body =
      page.substr(begin + begin_tag.size(), end - begin - begin_tag.size());
  unsigned char digest[SHA256_DIGEST_LENGTH];
  SHA256(reinterpret_cast<const unsigned char*>(body.data()), body.size(), digest);
  return absl::StrCat(
      "'sha256-",
      absl::Base64Escape(absl::string_view(reinterpret_cast<const char*>(digest), sizeof digest)),
      "'");
}

}  // namespace

std::string_view WebPage() {
  return {shoal_web_page_begin, static_cast<size_t>(shoal_web_page_end - shoal_web_page_begin)};
}

std::string_view WebPagePolicy() {
  static const auto* const policy = new std::string(
      absl::StrCat("default-src 'none'; script-src ", HashOf(WebPage(), "<script>", "</script>"),
                   "; style-src ", HashOf(WebPage(), "<style>", "</style>"),
                   "; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
                   "frame-ancestors 'none'"));
  return *policy;
}

}  // namespace shoal
