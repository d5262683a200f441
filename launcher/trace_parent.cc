#include "launcher/trace_parent.h"

namespace shoal {

std::string_view TraceParent(std::string_view header) {
  constexpr std::string_view kShape = "xx-xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx-xxxxxxxxxxxxxxxx-xx";
  if (header.size() != kShape.size() || header.substr(0, 2) == "ff") return {};
  for (size_t i = 0; i < kShape.size(); ++i) {
    const char c = header[i];
    const bool hex = (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f');
    if (kShape[i] == '-' ? c != '-' : !hex) return {};
  }
  const auto zero = [](std::string_view id) { return id.find_first_not_of('0') == id.npos; };
  if (zero(header.substr(3, 32)) || zero(header.substr(36, 16))) return {};
  return header;
}

}  // namespace shoal
