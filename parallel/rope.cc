#include "parallel/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <vector>

#include "kernels/status_macros.h"

namespace shoal {
namespace {

// The dimension at which a wave makes `turns` turns over the original context.
double CorrectionDim(const ModelConfig& c, double turns) {
  return c.rotary_dim * std::log(c.rope_scaling.original_context / (turns * 2 * std::numbers::pi)) /
         (2 * std::log(c.rope_base));
}

// Angle per position of each pair of dimensions.
std::vector<double> Frequencies(const ModelConfig& c) {
  const RopeScaling& s = c.rope_scaling;
  const int half = c.rotary_dim / 2;
  std::vector<double> frequencies(half);
  const bool yarn = s.kind == RopeScaling::Kind::kYarn;
  double low = yarn ? CorrectionDim(c, s.beta_fast) : 0;
  double high = yarn ? CorrectionDim(c, s.beta_slow) : 0;
  if (s.whole_bounds) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(0.0, low);
  high = std::min(c.rotary_dim - 1.0, high);
  for (int i = 0; i < half; ++i) {
    double f = std::pow(static_cast<double>(c.rope_base), -2.0 * i / c.rotary_dim);
    if (!c.rope_factors.empty()) f /= c.rope_factors[i];
    if (s.kind == RopeScaling::Kind::kLinear) {
      f /= s.factor;
    } else if (yarn) {
      // 0: many turns, keep the frequency; 1: few turns, interpolate.
      const double ramp = std::clamp((i - low) / std::max(0.001, high - low), 0.0, 1.0);
      f = f / s.factor * ramp + f * (1 - ramp);
    }
    frequencies[i] = f;
  }
  return frequencies;
}

int64_t AngleBytes(const ModelConfig& c, int positions) {
  return int64_t{positions} * (c.rotary_dim / 2) * static_cast<int64_t>(sizeof(float));
}

int64_t TemperatureBytes(int positions) {
  return int64_t{positions} * static_cast<int64_t>(sizeof(float));
}

}  // namespace

absl::StatusOr<RopeTables::Angles> RopeTables::MakeAngles(Backend& backend,
                                                          const ModelConfig& config,
                                                          int positions) {
  const std::vector<double> frequencies = Frequencies(config);
  const RopeScaling& s = config.rope_scaling;
  const double magnitude =
      s.kind == RopeScaling::Kind::kYarn ? s.attn_factor * (1 + 0.1 * std::log(s.factor)) : 1.0;
  const size_t half = frequencies.size();
  std::vector<float> cos(positions * half), sin(positions * half);
  for (int p = 0; p < positions; ++p) {
    for (size_t i = 0; i < half; ++i) {
      cos[p * half + i] = static_cast<float>(std::cos(p * frequencies[i]) * magnitude);
      sin[p * half + i] = static_cast<float>(std::sin(p * frequencies[i]) * magnitude);
    }
  }
  Angles angles;
  const int64_t bytes = AngleBytes(config, positions);
  SHOAL_ASSIGN_OR_RETURN(angles.cos, backend.Allocate(bytes));
  SHOAL_ASSIGN_OR_RETURN(angles.sin, backend.Allocate(bytes));
  backend.Copy(angles.cos.data(), cos.data(), bytes);
  backend.Copy(angles.sin.data(), sin.data(), bytes);
  return angles;
}

int64_t RopeTables::Bytes(const ModelConfig& config, int positions) {
  const int tables = config.window_rope_base > 0 ? 2 : 1;
  const int64_t temperatures = config.temperature_length > 0 ? TemperatureBytes(positions) : 0;
  return 2 * tables * AngleBytes(config, positions) + temperatures;
}

absl::StatusOr<RopeTables> RopeTables::Create(Backend& backend, const ModelConfig& config,
                                              int positions) {
  RopeTables tables;
  tables.rotary_dim_ = config.rotary_dim;
  tables.positions_ = positions;
  tables.neox_ = config.rope_neox;
  SHOAL_ASSIGN_OR_RETURN(tables.all_, MakeAngles(backend, config, positions));
  if (config.window_rope_base > 0) {
    ModelConfig windowed = config;
    windowed.rope_base = config.window_rope_base;
    windowed.rope_scaling = {};
    SHOAL_ASSIGN_OR_RETURN(tables.window_, MakeAngles(backend, windowed, positions));
  }
  if (config.temperature_length > 0) {
    std::vector<float> t(positions);
    for (int p = 0; p < positions; ++p) {
      const double length = config.temperature_length;
      t[p] = static_cast<float>(
          1 + config.temperature_scale *
                  std::log(std::floor((p + config.temperature_offset) / length) + 1));
    }
    const int64_t size = TemperatureBytes(positions);
    SHOAL_ASSIGN_OR_RETURN(tables.temperatures_, backend.Allocate(size));
    backend.Copy(tables.temperatures_.data(), t.data(), size);
  }
  return tables;
}

RopeTable RopeTables::view(bool of_window) const {
  const Angles& angles = of_window && window_.cos.data() != nullptr ? window_ : all_;
  return {angles.cos.as<float>(), angles.sin.as<float>(), rotary_dim_, positions_, neox_};
}

}  // namespace shoal
