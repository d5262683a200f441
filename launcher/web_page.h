// The page that `shoal serve` shows at "/": web/index.html, carried in the binary.
#pragma once

#include <string_view>

namespace shoal {

std::string_view WebPage();
// Content-Security-Policy: the page's own script and style by their hashes, requests to this
// server, and nothing else.
std::string_view WebPagePolicy();

}  // namespace shoal
