// Early returns for absl::Status and absl::StatusOr.
#pragma once

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

// NOLINTBEGIN(bugprone-macro-parentheses): a declaration cannot stand in parentheses.
#define SHOAL_RETURN_IF_ERROR(expr)                               \
  do {                                                            \
    if (absl::Status shoal_status = (expr); !shoal_status.ok()) { \
      return shoal_status;                                        \
    }                                                             \
  } while (false)

#define SHOAL_MACRO_JOIN_INNER(a, b) a##b
#define SHOAL_MACRO_JOIN(a, b) SHOAL_MACRO_JOIN_INNER(a, b)
#define SHOAL_ASSIGN_OR_RETURN_IMPL(result, lhs, expr) \
  auto result = (expr);                                \
  if (!result.ok()) return result.status();            \
  lhs = *std::move(result)
// SHOAL_ASSIGN_OR_RETURN(Type name, expression);
#define SHOAL_ASSIGN_OR_RETURN(lhs, ...) \
  SHOAL_ASSIGN_OR_RETURN_IMPL(SHOAL_MACRO_JOIN(shoal_result_, __LINE__), lhs, (__VA_ARGS__))
// NOLINTEND(bugprone-macro-parentheses)
