// Sharded linear layers, after Megatron-LM (arXiv:1909.08053): a column-parallel layer needs
// nothing from its peers, a row-parallel layer ends with the all-reduce that makes the hidden state
// whole again.
#pragma once

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "comm/communicator.h"
#include "kernels/backend.h"

namespace shoal {

// Outputs are this rank's slices. REQUIRES: input is whole on every rank.
inline absl::Status ColumnLinear(Backend& backend, const LinearInput& input, int cols,
                                 RowCount rows, absl::Span<const LinearOutput> outputs) {
  backend.Linear(input, cols, rows, outputs);
  return absl::OkStatus();
}

// Adds partial [rows, dim], summed over the group, to hidden.
inline absl::Status ReduceInto(Backend& backend, Communicator& tp, Wire wire, float* partial,
                               float* hidden, int rows, int dim) {
  if (absl::Status s = tp.AllReduceSum(partial, int64_t{rows} * dim, wire); !s.ok()) return s;
  backend.Add(hidden, dim, partial, dim, rows, dim);
  return absl::OkStatus();
}

// hidden [rows, dim] += sum over the group of weight * input. partial is scratch of hidden's size.
inline absl::Status RowLinear(Backend& backend, Communicator& tp, Wire wire,
                              const LinearInput& input, int cols, RowCount rows,
                              const PackedMatrix& weight, const float* bias, float* partial,
                              float* hidden) {
  const int dim = static_cast<int>(weight.shape.rows);
  if (tp.size() == 1) {  // nothing to sum: straight into the residual
    backend.Linear(input, cols, rows, {{&weight, bias, hidden, dim, true}});
    return absl::OkStatus();
  }
  backend.Linear(input, cols, rows,
                 {{&weight, tp.rank() == 0 ? bias : nullptr, partial, dim, false}});
  return ReduceInto(backend, tp, wire, partial, hidden, rows.total(), dim);
}

}  // namespace shoal
