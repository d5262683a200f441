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

// What row-parallel layers add to.
struct Residual {
  float* hidden = nullptr;   // [rows, dim]
  float* partial = nullptr;  // scratch of its size: this rank's part of what is added
  const float* norm =
      nullptr;    // [dim] or null: weights of an RMSNorm of the sum before it is added
  float eps = 0;  // of the norm
};

// Adds residual.partial, summed over the group, to residual.hidden.
inline absl::Status ReduceInto(Backend& backend, Communicator& tp, Wire wire,
                               const Residual& residual, int rows, int dim) {
  float* const sum = residual.partial;
  if (absl::Status s = tp.AllReduceSum(sum, int64_t{rows} * dim, wire); !s.ok()) return s;
  if (residual.norm != nullptr) {
    backend.Norm(LinearInput::RmsNorm(sum, dim, residual.norm, residual.eps), rows, dim, sum, dim);
  }
  backend.Add(residual.hidden, dim, sum, dim, rows, dim);
  return absl::OkStatus();
}

// residual.hidden += sum over the group of weight * input.
inline absl::Status RowLinear(Backend& backend, Communicator& tp, Wire wire,
                              const LinearInput& input, int cols, RowCount rows,
                              const PackedMatrix& weight, const float* bias,
                              const Residual& residual) {
  const int dim = static_cast<int>(weight.shape.rows);
  if (tp.size() == 1 && residual.norm == nullptr) {  // straight into the residual
    backend.Linear(input, cols, rows, {{&weight, bias, residual.hidden, dim, true}});
    return absl::OkStatus();
  }
  backend.Linear(input, cols, rows,
                 {{&weight, tp.rank() == 0 ? bias : nullptr, residual.partial, dim, false}});
  return ReduceInto(backend, tp, wire, residual, rows.total(), dim);
}

// residual.hidden += sum over the group of down * activation(gate, up). gate and up are scratch of
// [rows, ffn] each.
inline absl::Status ParallelFfn(Backend& backend, Communicator& tp, Wire wire,
                                const LinearInput& input, int cols, RowCount rows,
                                const FfnWeights& ffn, const PackedMatrix& down, float* gate,
                                float* up, const Residual& residual) {
  const int dim = static_cast<int>(down.shape.rows);
  if (tp.size() == 1 && residual.norm == nullptr) {
    backend.Ffn(input, cols, rows, ffn, gate, up, {&down, nullptr, residual.hidden, dim, true});
    return absl::OkStatus();
  }
  backend.Ffn(input, cols, rows, ffn, gate, up, {&down, nullptr, residual.partial, dim, false});
  return ReduceInto(backend, tp, wire, residual, rows.total(), dim);
}

}  // namespace shoal
