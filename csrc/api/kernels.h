// What the kernels of all back ends share beside their structs (structs.h): formulas, sizes, and the combinations that are
// compiled. No torch, no CUDA header.
//
// Three operations, each one call for all tensors:
//   accumulate  clip gradients, update mom and rms, reduce per-tensor statistics          -> stats [R, S]
//   apply       features -> small MLP -> write parameters, or directions of matrices that are treated as a whole;
//               reduce the last hidden layer                                              -> hidden [R, width]
//   write       of those matrices: directions -> parameters
// The first two can be one sweep, for operands of apply that do not depend on this step's statistics.
#pragma once

#include <cstdint>

#include "api/structs.h"
#include "rule/features.h"
#include "rule/mlp.h"
#include "rule/rounding.h"
#include "rule/stats.h"

namespace lopt {

constexpr int64_t kNativeSide = 128;  // of matrices that the CPU kernels orthogonalise; torch does larger ones
constexpr int64_t kChunk = 8192;  // parameters per chunk: the unit of parallel work and of the first reduction level

// The formulas one parameter at a time, shared by all kernels.
template <class V>
LOPT_HD V next_accumulator(V value, float decay, V input) {
  return value * decay + input * (1.0f - decay);
}

// lr = 0 changes no bit; a tensor that rests has a step of NaN.
LOPT_HD bool moves(float step_size, float keep) {
  return step_size == step_size && (step_size != 0.0f || keep != 1.0f);
}

// Whether apply leaves a tensor to the direction stage: a matrix with an open gate.
LOPT_HD bool is_whole(const ApplyParams& params, const TensorEntry& tensor) {
  return tensor.direction != 0 && params.gate[tensor.row] > 0;
}

// What the rule of one tensor is given: a row of ApplyInputs. `whole`: the direction itself is written, which is a step of
// -1 of which nothing was there before.
struct TensorInputs {
  const float *scale, *shift, *bias;
  float clip_limit, step_size, keep;
  bool whole;

  LOPT_HD TensorInputs(const ApplyInputs& inputs, int64_t row, int columns, int width, bool whole)
      : scale(inputs.scale + row * columns),
        shift(inputs.shift + row * columns),
        bias(inputs.bias + row * width),
        clip_limit(inputs.clip_limit[row]),
        step_size(whole ? -1.0f : inputs.step_size[row]),
        keep(whole ? 0.0f : inputs.keep[row]),
        whole(whole) {}

  LOPT_HD bool moves() const { return lopt::moves(step_size, keep); }
};

// active: Features::active of the parameter. What would not stay finite, also as a bfloat16, is left as it is (of float16,
// where it is stored, what is beyond its range becomes infinite); a direction that is not finite is 0.
template <class V>
LOPT_HD V next_param(V param, V direction, const TensorInputs& inputs, V active) {
  const V step_size = active * inputs.step_size;
  const V moved = param * inputs.keep - direction * step_size;
  const V otherwise = inputs.whole ? V{} : param;
  return abs_of(moved) <= V{} + kLargestParam ? moved : otherwise;
}

template <class V>
LOPT_HD V next_param(V param, MlpOutput<V> out, const TensorInputs& inputs, V active, float magnitude_rate) {
  return next_param(param, out.direction * exp_of(out.magnitude * magnitude_rate), inputs, active);
}

// The same for a direction that was treated as a whole.
template <class V>
LOPT_HD V next_param(V param, V direction, float step_size, float keep) {
  const V moved = param * keep - direction * step_size;
  return abs_of(moved) <= V{} + kLargestParam ? moved : param;
}

template <int kValue>
struct IntConstant {
  static constexpr int value = kValue;
};

// Calls f(IntConstant<width>{}) for a compiled width; false for any other.
template <class Function>
bool with_width(int width, Function&& f) {
  switch (width) {
#ifdef LOPT_OWN_WIDTH
    case LOPT_OWN_WIDTH:
      f(IntConstant<LOPT_OWN_WIDTH>{});
      return true;
#else
    case 8:
      f(IntConstant<8>{});
      return true;
    case 16:
      f(IntConstant<16>{});
      return true;
    case 32:
      f(IntConstant<32>{});
      return true;
#endif
    default:
      return false;
  }
}

// Calls f(Features{}, IntConstant<width>{}) for a compiled combination; false for any other.
template <class Function>
bool with_kernel(int feature_set, int width, Function&& f) {
  bool compiled = false;
  with_width(width, [&](auto width_constant) {
    compiled = with_feature_set(feature_set, [&](auto features) { f(features, width_constant); });
  });
  return compiled;
}

}  // namespace lopt
