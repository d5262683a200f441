// What the product kernels share: which panel and which rows a block has, and how results are
// stored.
#pragma once

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/linear_ops.h"

namespace shoal::cuda {

// The rows of one block: entries begin .. begin + count - 1 of the product's rows or of a group.
struct BlockRows {
  int expert, begin, count;
};

// `index`: the block's number along the rows, `rows_max`: most rows of a block.
__device__ inline BlockRows RowsOfBlock(const ProductRows& rows, int index, int rows_max) {
  if (rows.groups == nullptr) {
    const int begin = index * rows_max;
    return {0, begin, min(rows_max, rows.count - begin)};
  }
  if (index >= *rows.group_count) return {0, 0, 0};
  const RowGroup& group = rows.groups[index];
  return {group.expert, group.begin, group.count};
}

// Entry i of the block; past the last one its first, so that every lane has a row to read.
struct RowPair {
  int operand, output;
};
__device__ inline RowPair RowOf(const ProductRows& rows, const BlockRows& block, int i) {
  const int at = block.begin + (i < block.count ? i : 0);
  if (rows.groups == nullptr) return {at, at};
  const int slot = rows.slots[at];
  return {slot / rows.slots_per_row, slot};
}

// The output whose panel number `panel` is, counted through all outputs; *panel becomes its own
// number.
__device__ inline int OutputOfPanel(const Product& p, int* panel) {
  int i = 0;
#pragma unroll
  for (int k = 1; k < kMaxOutputs; ++k) {
    if (k < p.output_count && *panel >= p.outputs[k].panel_begin) i = k;
  }
  *panel -= p.outputs[i].panel_begin;
  return i;
}

__device__ inline const uint8_t* WeightOf(const ProductOutput& o, int expert) {
  return o.experts != nullptr ? o.experts[expert] : o.weight;
}

__device__ inline void StoreOutput(const ProductOutput& o, int expert, int row, int col, float v) {
  if (col >= o.rows) return;
  if (o.bias != nullptr) v += o.bias[col];
  if (o.expert_bias != nullptr) v += o.expert_bias[expert][col];
  float* out = o.out + row * o.stride + col;
  *out = o.accumulate ? *out + v : v;
}

// ---- Host

// Numbers the outputs' panels; returns how many there are.
inline int NumberPanels(Product* p) {
  int panels = 0;
  for (int i = 0; i < p->output_count; ++i) {
    p->outputs[i].panel_begin = panels;
    panels += (p->outputs[i].rows + kPanelRows - 1) / kPanelRows;
  }
  return panels;
}
// Blocks along the rows.
inline int RowBlocks(const ProductRows& rows, int rows_max) {
  return rows.groups != nullptr ? rows.groups_max : (rows.count + rows_max - 1) / rows_max;
}

}  // namespace shoal::cuda
