// W3C Trace Context's `traceparent`, which is handed through: into the log and back to the client.
#pragma once

#include <string_view>

namespace shoal {

// `header` when it is well-formed ("00-<32 hex>-<16 hex>-<2 hex>", ids not zero), else empty: what
// a client sends goes into logs.
std::string_view TraceParent(std::string_view header);

}  // namespace shoal
