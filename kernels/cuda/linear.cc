#include "kernels/cuda/linear.h"

#include <algorithm>
#include <cstdlib>

#include "absl/strings/numbers.h"
#include "kernels/check.h"

namespace shoal::cuda {
namespace {

constexpr int kShortPrompt = 16;  // rows below which a prompt takes the decode path: half a tile

int64_t RoundUp(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

InputRows ToRows(const LinearInput& input, int cols, int rows, int first) {
  InputRows out;
  out.kind = static_cast<InputRows::Kind>(input.kind);
  out.x = input.x + first * input.stride;
  out.up = input.up != nullptr ? input.up + first * input.stride : nullptr;
  out.weight = input.weight;
  out.stride = input.stride;
  out.eps = input.eps;
  out.scale = input.scale;
  out.row_scale = input.row_scale != nullptr ? input.row_scale + first : nullptr;
  out.rows = rows;
  out.cols = cols;
  out.activation = input.activation;
  return out;
}
static_assert(static_cast<int>(InputRows::Kind::kGated) ==
                  static_cast<int>(LinearInput::Kind::kGated) &&
              static_cast<int>(InputRows::Kind::kRmsNorm) ==
                  static_cast<int>(LinearInput::Kind::kRmsNorm) &&
              static_cast<int>(InputRows::Kind::kLayerNorm) ==
                  static_cast<int>(LinearInput::Kind::kLayerNorm));

Product ProductOf(const PackedShape& shape) {
  Product p;
  p.type = shape.type;
  p.cols = static_cast<int>(shape.cols);
  p.lead = shape.lead;
  p.panel_bytes = shape.panel_bytes();
  return p;
}

}  // namespace

// One call's rows of one phase.
struct LinearEngine::ExpertBatch {
  LinearInput input;
  int cols, rows;
  bool prefill;
  const int32_t* ids;
  const float* weights;
  int used;
  const ExpertWeights& experts;
  float* out;
  int64_t out_stride;
};

LinearWorkspace LinearEngine::LayoutOf(const Backend::Limits& limits) const {
  return LinearWorkspace(limits, gemm_ != nullptr ? unpacked_bytes_ : 0);
}

int LinearEngine::DefaultPassRows() {
  const char* const wanted = std::getenv("SHOAL_CUDA_PASS_ROWS");
  int rows = 0;
  const bool known = wanted != nullptr && absl::SimpleAtoi(wanted, &rows) &&
                     (rows == 8 || rows == 16 || rows == 32);
  return known ? rows : 16;
}

int64_t LinearEngine::WorkspaceBytes(const Backend::Limits& limits) const {
  return LayoutOf(limits).bytes;
}

void LinearEngine::SetWorkspace(const Backend::Limits& limits, uint8_t* workspace) {
  limits_ = limits;
  workspace_ = workspace;
  pointers_.reserve(6 * kExpertsMax);
}

LinearEngine::Operand LinearEngine::OperandOf(DType type, bool prefill) const {
  switch (type) {
    case DType::kF32:
      return Operand::kFloat;
    case DType::kF16:
      return prefill ? Operand::kF16 : Operand::kFloat;
    case DType::kBF16:
      return prefill && bf16_mma_ ? Operand::kBf16 : Operand::kFloat;
    default:
      return prefill ? Operand::kF16 : Operand::kInt8;
  }
}

namespace {

// The operand's fields within its part of the workspace.
struct OperandViews {
  Int8Rows int8;
  HalfRows half;
  FloatRows f32;
  OperandViews(uint8_t* at, int64_t rows, int64_t cols) {
    const int64_t blocks = (cols + 31) / 32;
    int8.row_stride = RoundUp(rows, 2);
    int8.q = reinterpret_cast<int8_t*>(at);
    int8.scale = reinterpret_cast<float*>(at + blocks * int8.row_stride * 32);
    int8.half_sums = int8.scale + RoundUp(blocks * int8.row_stride, 4);
    half.data = reinterpret_cast<uint16_t*>(at);
    half.scale = reinterpret_cast<float*>(at + blocks * rows * 64);
    half.row_stride = rows;
    f32.data = reinterpret_cast<float*>(at);
    f32.stride = blocks * 32;
  }
};

}  // namespace

void LinearEngine::Prepare(const LinearInput& input, int cols, int rows, Operand operand,
                           Stream stream) {
  const OperandViews views(workspace_ + LayoutOf(limits_).operand, rows, cols);
  const InputRows in = ToRows(input, cols, rows, 0);
  switch (operand) {
    case Operand::kInt8:
      return QuantizeRows(in, views.int8, stream);
    case Operand::kFloat:
      return CopyRows(in, views.f32, stream);
    case Operand::kF16:
    case Operand::kBf16:
      return HalveRows(in, operand == Operand::kBf16, views.half, stream);
  }
}

void LinearEngine::Multiply(const Product& product, Operand operand, int rows, Stream stream) {
  const OperandViews views(workspace_ + LayoutOf(limits_).operand, rows, product.cols);
  switch (operand) {
    case Operand::kInt8:
      return Int8Product(product, views.int8, stream);
    case Operand::kFloat:
      return FloatProduct(product, views.f32, stream);
    case Operand::kF16:
    case Operand::kBf16:
      return HalfProduct(product, views.half, stream);
  }
}

bool LinearEngine::TakesGemm(const LinearOutput& output, Operand operand, int rows) const {
  const PackedShape& shape = output.weight->shape;
  return gemm_ != nullptr && rows >= kGemmRows && operand == Operand::kF16 &&
         shape.type != DType::kF16 && output.bias == nullptr &&
         shape.cols * kPanelRows * 2 <= unpacked_bytes_;
}

PlainHalves LinearEngine::GemmRows(int rows, int64_t cols, float** extremes) const {
  uint8_t* const at = workspace_ + LayoutOf(limits_).operand;
  *extremes = reinterpret_cast<float*>(at + AlignWorkspace(rows * cols * 2));
  return {reinterpret_cast<uint16_t*>(at), *extremes + rows};
}

void LinearEngine::Multiply(const LinearOutput& output, int rows, int first_row, Stream stream) {
  const PackedShape& shape = output.weight->shape;
  float* extremes = nullptr;
  const PlainHalves in = GemmRows(rows, shape.cols, &extremes);
  auto* unpacked = reinterpret_cast<uint16_t*>(workspace_ + LayoutOf(limits_).unpacked);
  const int64_t panels_max = unpacked_bytes_ / (shape.cols * kPanelRows * 2);
  const int64_t panels = shape.panels();
  for (int64_t first = 0, n; first < panels; first += n) {
    n = std::min(panels_max, panels - first);
    const int64_t begin = first * kPanelRows, end = std::min(begin + n * kPanelRows, shape.rows);
    UnpackHalves(*output.weight, static_cast<int>(first), static_cast<int>(n), unpacked, stream);
    gemm_->Multiply(static_cast<int>(end - begin), rows, static_cast<int>(shape.cols), unpacked,
                    in.data, in.factor, output.accumulate,
                    output.out + first_row * output.stride + begin, output.stride);
  }
}

// Outputs that take the same operand follow its preparation; those of one type share a launch.
void LinearEngine::Rows(const LinearInput& input, int cols, int rows, bool prefill, int first_row,
                        absl::Span<const LinearOutput> outputs, Stream stream) {
  if (rows == 0) return;
  SHOAL_CHECK(outputs.size() <= kMaxOutputs, "too many outputs of one linear layer");
  prefill = prefill && rows >= kShortPrompt;
  LinearInput from = input;
  from.x += first_row * input.stride;
  if (from.up != nullptr) from.up += first_row * input.stride;
  if (from.row_scale != nullptr) from.row_scale += first_row;
  for (const Operand operand : {Operand::kInt8, Operand::kFloat, Operand::kF16, Operand::kBf16}) {
    bool done[kMaxOutputs] = {}, prepared = false;
    for (size_t i = 0; i < outputs.size(); ++i) {  // those of a library first: its rows are others
      if (OperandOf(outputs[i].weight->shape.type, prefill) != operand) continue;
      done[i] = TakesGemm(outputs[i], operand, rows);
      if (!done[i]) continue;
      if (!prepared) {
        float* extremes = nullptr;
        const PlainHalves to = GemmRows(rows, cols, &extremes);
        HalveAll(ToRows(from, cols, rows, 0), extremes, to, stream);
        prepared = true;
      }
      SHOAL_CHECK(outputs[i].weight->shape.cols == cols,
                  "the weight's columns must match the input's");
      Multiply(outputs[i], rows, first_row, stream);
    }
    prepared = false;
    for (size_t i = 0; i < outputs.size(); ++i) {
      const PackedShape& shape = outputs[i].weight->shape;
      if (done[i] || OperandOf(shape.type, prefill) != operand) continue;
      if (!prepared) {
        Prepare(from, cols, rows, operand, stream);
        prepared = true;
      }
      Product p = ProductOf(shape);
      p.rows.count = rows;
      p.pass_rows = pass_rows_;
      for (size_t k = i; k < outputs.size(); ++k) {
        const LinearOutput& o = outputs[k];
        SHOAL_CHECK(o.weight->shape.cols == cols, "the weight's columns must match the input's");
        if (o.weight->shape.type != shape.type || o.weight->shape.lead != shape.lead) continue;
        done[k] = true;
        ProductOutput& to = p.outputs[p.output_count++];
        to.weight = o.weight->data;
        to.bias = o.bias;
        to.out = o.out + first_row * o.stride;
        to.stride = o.stride;
        to.rows = static_cast<int>(o.weight->shape.rows);
        to.accumulate = o.accumulate;
      }
      Multiply(p, operand, rows, stream);
    }
  }
}

void LinearEngine::Linear(const LinearInput& input, int cols, RowCount rows,
                          absl::Span<const LinearOutput> outputs, Stream stream) {
  SHOAL_CHECK(rows.total() <= limits_.rows && cols <= limits_.cols, "Reserve() for larger batches");
  Rows(input, cols, rows.decode, false, 0, outputs, stream);
  Rows(input, cols, rows.prefill, true, rows.decode, outputs, stream);
}

void LinearEngine::Experts(const LinearInput& input, int cols, RowCount rows, const int32_t* ids,
                           const float* weights, int used, const ExpertWeights& experts, float* out,
                           int64_t out_stride, Stream stream) {
  const int count = static_cast<int>(experts.gate.size());
  SHOAL_CHECK(rows.total() <= limits_.rows && cols <= limits_.cols &&
                  used <= limits_.experts_used &&
                  experts.gate[0].shape.rows <= limits_.expert_cols && count <= kExpertsMax,
              "Reserve() for larger batches or more experts");
  if (rows.total() == 0) return;
  const LinearWorkspace at = LayoutOf(limits_);
  auto* pointers = reinterpret_cast<const uint8_t**>(workspace_ + at.pointers);
  pointers_.clear();
  for (const auto& part : {experts.gate, experts.up, experts.down}) {
    for (const PackedMatrix& m : part) pointers_.push_back(m.data);
  }
  for (const auto& part : {experts.gate_bias, experts.up_bias, experts.down_bias}) {
    for (const float* bias : part) pointers_.push_back(reinterpret_cast<const uint8_t*>(bias));
    if (part.empty()) pointers_.resize(pointers_.size() + count, nullptr);
  }
  const bool biased = !experts.gate_bias.empty() || !experts.down_bias.empty();
  WritePointers(pointers_.data(), (biased ? 6 : 3) * count, pointers, stream);
  for (int first = 0, n; first < rows.total(); first += n) {
    const bool prefill = first >= rows.decode;
    n = std::min((prefill ? rows.total() : rows.decode) - first, kExpertRows);
    LinearInput from = input;
    from.x += first * input.stride;
    if (from.up != nullptr) from.up += first * input.stride;
    if (from.row_scale != nullptr) from.row_scale += first;
    ExpertRows({from, cols, n, prefill && n >= kShortPrompt, ids + int64_t{first} * used,
                weights != nullptr ? weights + int64_t{first} * used : nullptr, used, experts,
                out + first * out_stride, out_stride},
               stream);
  }
}

void LinearEngine::ExpertRows(const ExpertBatch& b, Stream stream) {
  const LinearWorkspace at = LayoutOf(limits_);
  const int count = static_cast<int>(b.experts.gate.size());
  const int slots = b.rows * b.used;
  const auto* pointers = reinterpret_cast<const uint8_t* const*>(workspace_ + at.pointers);
  auto* gate = reinterpret_cast<float*>(workspace_ + at.gate);
  auto* up = reinterpret_cast<float*>(workspace_ + at.up);
  auto* down = reinterpret_cast<float*>(workspace_ + at.down);
  const Grouping grouping = {reinterpret_cast<RowGroup*>(workspace_ + at.grouping),
                             reinterpret_cast<int32_t*>(workspace_ + at.group_count),
                             reinterpret_cast<int32_t*>(workspace_ + at.sorted)};
  int grouped = 0;  // rows of the groups that are there now
  // Rows of `input` times one matrix of each expert.
  const auto multiply = [&](const LinearInput& input, int rows, int slots_per_row,
                            absl::Span<const PackedMatrix> matrices, int table, bool biased,
                            float* out, int64_t stride, bool prepared) {
    const PackedShape& shape = matrices[0].shape;
    const Operand operand = OperandOf(shape.type, b.prefill);
    const int group_rows = operand == Operand::kInt8    ? kInt8GroupRows
                           : operand == Operand::kFloat ? kFloatGroupRows
                                                        : kHalfGroupRows;
    if (group_rows != grouped) GroupByExpert(b.ids, slots, count, group_rows, grouping, stream);
    grouped = group_rows;
    if (!prepared) Prepare(input, static_cast<int>(shape.cols), rows, operand, stream);
    Product p = ProductOf(shape);
    p.output_count = 1;
    p.outputs[0].experts = pointers + table * count;
    if (biased) {
      p.outputs[0].expert_bias =
          reinterpret_cast<const float* const*>(pointers + (3 + table) * count);
    }
    p.outputs[0].out = out;
    p.outputs[0].stride = stride;
    p.outputs[0].rows = static_cast<int>(shape.rows);
    p.rows = {slots,
              grouping.groups,
              grouping.group_count,
              grouping.slots,
              GroupsMax(slots, count, group_rows),
              slots_per_row};
    Multiply(p, operand, rows, stream);
  };
  const bool same = OperandOf(b.experts.gate[0].shape.type, b.prefill) ==
                    OperandOf(b.experts.up[0].shape.type, b.prefill);
  multiply(b.input, b.rows, b.used, b.experts.gate, 0, !b.experts.gate_bias.empty(), gate,
           at.expert_stride, false);
  multiply(b.input, b.rows, b.used, b.experts.up, 1, !b.experts.up_bias.empty(), up,
           at.expert_stride, same);
  // Slots of experts that live elsewhere hold what was there before; nobody reads their products.
  multiply(LinearInput::Gated(b.experts.activation, gate, up, at.expert_stride), slots, 1,
           b.experts.down, 2, !b.experts.down_bias.empty(), down, at.out_stride, false);
  WeightedSum(down, at.out_stride, b.ids, b.weights, b.used, b.rows,
              static_cast<int>(b.experts.down[0].shape.rows), b.out, b.out_stride, stream);
}

}  // namespace shoal::cuda
