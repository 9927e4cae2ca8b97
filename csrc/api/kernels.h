// What the kernels of all back ends share beside their structs (structs.h): formulas, sizes, and the combinations that are
// compiled. No torch, no CUDA header.
//
// Two operations, each one call for all tensors:
//   accumulate  clip gradients, update mom and rms, reduce per-tensor statistics          -> stats [R, S]
//   apply       features -> small MLP -> write parameters, reduce the last hidden layer   -> hidden [R, width]
// or both in one sweep, for operands of apply that do not depend on this step's statistics.
#pragma once

#include <cstdint>

#include "api/structs.h"
#include "rule/features.h"
#include "rule/mlp.h"
#include "rule/rounding.h"
#include "rule/stats.h"

namespace lopt {

constexpr int64_t kChunk = 8192;  // parameters per chunk: the unit of parallel work and of the first reduction level

// The formulas one parameter at a time, shared by all kernels.
template <class V>
LOPT_HD V next_accumulator(V value, float decay, V input) {
  return value * decay + input * (1.0f - decay);
}

// step_size: of the tensor, times Features::active.
template <class V>
LOPT_HD V next_param(V param, MlpOutput<V> out, float keep, V step_size, float magnitude_rate) {
  return param * keep - out.direction * exp_of(out.magnitude * magnitude_rate) * step_size;
}

// Calls f(Features{}, integral_constant<int, width>) for a compiled combination.
template <int kValue>
struct IntConstant {
  static constexpr int value = kValue;
};

template <class Function>
bool with_kernel(int feature_set, int width, Function&& f) {
  bool compiled = width == 8 || width == 16 || width == 32;
  return compiled && with_feature_set(feature_set, [&](auto features) {
           if (width == 8) f(features, IntConstant<8>{});
           if (width == 16) f(features, IntConstant<16>{});
           if (width == 32) f(features, IntConstant<32>{});
         });
}

}  // namespace lopt
