// apply for a run of parameters, the loop that apply_cpu.cpp and unroll_cpu.cpp share:
//   x      = clamp(columns(grad, param, mom, rms) * scale + shift, +-feature_clip)
//   o, h   = small_mlp(x)
//   param  = keep * param - step_size * o.direction * exp(magnitude_rate * o.magnitude)
// and the sum of the last hidden layer h, in the order of Note [Order of summation] (accumulate_block.h).
#pragma once

#include "simd.h"
// simd.h comes first: see there.
#include "kernels.h"

namespace lopt {
namespace LOPT_ISA {
namespace {

template <class Features, int kWidth, class Param, class Grad>
struct Applier {
  static constexpr int kColumns = Features::kNumColumns;
  Param* param;
  const Grad* grad;
  const float* mom;  // [kNumMom, stride]
  const float* rms;  // [kNumRms, stride]
  const int64_t stride;
  const float* scale;    // [columns]
  const float* shift;    // [columns]
  const float* bias;     // [width]
  const float* weights;  // MlpLayout
  const float limit, keep, step_size, magnitude_rate, feature_clip;

  // The first `count` parameters; total[width] is the sum of their last hidden layers.
  void run(int64_t count, double* total) const {
    constexpr int kBlock = 32;                             // vectors summed in float
    const bool moves = step_size != 0.0f || keep != 1.0f;  // lr = 0 changes no bit
    for (int j = 0; j < kWidth; ++j) total[j] = 0.0;
    for (int64_t begin = 0; begin < count; begin += kBlock * kLanes) {
      const int64_t end = count - begin < kBlock * kLanes ? count : begin + kBlock * kLanes;
      Vec hidden_sum[kWidth]{};
      for (int64_t i = begin; i < end; i += kLanes) {
        const int lanes = end - i < kLanes ? static_cast<int>(end - i) : kLanes;
        const Vec mask = lane_mask(lanes);
        const Vec g = clip_gradient(load(grad + i, lanes), limit), p = load(param + i, lanes);
        Vec m[Features::kNumMom], r[Features::kNumRms], x[kColumns], hidden[kWidth];
        for (int k = 0; k < Features::kNumMom; ++k) m[k] = load(mom + k * stride + i, lanes);
        for (int k = 0; k < Features::kNumRms; ++k) r[k] = load(rms + k * stride + i, lanes);
        Features::columns(g, p, m, r, x);
        LOPT_UNROLL
        for (int c = 0; c < kColumns; ++c) x[c] = clamp_of(x[c] * scale[c] + shift[c], -feature_clip, feature_clip);
        const MlpOutput<Vec> out = small_mlp<kColumns, kWidth>(x, weights, bias, hidden);
        if (moves) store(param + i, next_param(p, out, keep, step_size, magnitude_rate), lanes);
        for (int j = 0; j < kWidth; ++j) hidden_sum[j] += hidden[j] * mask;
      }
      for (int j = 0; j < kWidth; ++j) total[j] += sum_lanes(hidden_sum[j]);
    }
  }
};

}  // namespace
}  // namespace LOPT_ISA
}  // namespace lopt
