// Feature sets: the per-parameter inputs of the small MLP, one struct per set.
//
// A feature set names its raw columns (Column), fills them for one parameter (`columns`), and says which per-tensor
// means its column map needs (Moment, `moments`), and which parameters move (`active`). The column map itself,
// x = clamp(raw * scale + shift, +-clip), is affine with per-tensor scale and shift, so the tensor normaliser and the bias
// corrections of the accumulators never touch a kernel: `column_map`, and in Python lopt/rule/features.py, turns means into
// scale and shift.
//
// Values are of type V: float, or a SIMD vector of floats (simd.h). No loads or stores from memory here.
// `grad` is the clipped gradient, `mom` and `rms` are the updated accumulators.
// Source: arXiv:2009.11243 and the author's port, rnn_mlp_lopt in google/learned_optimization (`PaperFeatures`).
#pragma once

#include "rule/constants.h"
#include "rule/maths.h"

namespace lopt {

// The paper's 23 columns, each divided by its root mean square over the tensor.
struct PaperFeatures {
  static constexpr const char* kName = "paper";
  static constexpr int kNumMom = 5;         // decays .5 .9 .99 .999 .9999
  static constexpr int kNumRms = 5;         // the same decays, paired by index
  static constexpr int kSlow = -1;          // no second moment is a Moment
  static constexpr bool kRelative = false;  // whether it has the moments of RelativeInputs
  static constexpr float kEpsilon = 1e-5f;
  LOPT_ENUM(Column, kNumColumns, grad, param, log_param, mom0, mom1, mom2, mom3, mom4, rms0, rms1, rms2, rms3, rms4,
            mom0_over_rms0, mom1_over_rms1, mom2_over_rms2, mom3_over_rms3, mom4_over_rms4, rsqrt_rms0, rsqrt_rms1,
            rsqrt_rms2, rsqrt_rms3, rsqrt_rms4);
  static constexpr int kFirstShifted = kNumColumns;  // columns before it have no shift
  // mean(x^2) of every column
  LOPT_ENUM(Moment, kNumMoments, grad_squared, param_squared, log_param_squared, mom0_squared, mom1_squared,
            mom2_squared, mom3_squared, mom4_squared, rms0_squared, rms1_squared, rms2_squared, rms3_squared,
            rms4_squared, mom0_over_rms0_squared, mom1_over_rms1_squared, mom2_over_rms2_squared,
            mom3_over_rms3_squared, mom4_over_rms4_squared, rsqrt_rms0_squared, rsqrt_rms1_squared, rsqrt_rms2_squared,
            rsqrt_rms3_squared, rsqrt_rms4_squared);
  static_assert(int{kNumMoments} == int{kNumColumns}, "a mean square for every column");

  template <class V>
  LOPT_HD static void columns(V grad, V param, const V* mom, const V* rms, V* x) {
    x[Column::grad] = grad;
    x[Column::param] = param;
    x[Column::log_param] = log_of(abs_of(param) + 1e-8f);
    LOPT_UNROLL
    for (int k = 0; k < kNumMom; ++k) {
      const V inverse = rsqrt_of(rms[k] + 1e-6f);
      x[Column::mom0 + k] = mom[k];
      x[Column::rms0 + k] = rms[k];
      x[Column::mom0_over_rms0 + k] = mom[k] * inverse;
      x[Column::rsqrt_rms0 + k] = inverse;
    }
  }

  template <class V>
  LOPT_HD static V active(const V*) {
    return V{} + 1.0f;
  }

  template <class V>
  LOPT_HD static void moments(V grad, V param, const V* mom, const V* rms, V* q) {
    const V log_param = log_of(abs_of(param) + 1e-8f);
    q[Moment::grad_squared] = grad * grad;
    q[Moment::param_squared] = param * param;
    q[Moment::log_param_squared] = log_param * log_param;
    LOPT_UNROLL
    for (int k = 0; k < kNumMom; ++k) {
      const V inverse = reciprocal_of(rms[k] + 1e-6f);
      q[Moment::mom0_squared + k] = mom[k] * mom[k];
      q[Moment::rms0_squared + k] = rms[k] * rms[k];
      q[Moment::mom0_over_rms0_squared + k] = mom[k] * mom[k] * inverse;
      q[Moment::rsqrt_rms0_squared + k] = inverse;
    }
  }

  // Scale and shift of every column from the means of its moments; corrections[k] = 1 - decay_k^updates of mom, then rms.
  LOPT_HD static void column_map(const float* means, const float*, float* scale, float* shift) {
    for (int c = 0; c < kNumColumns; ++c) {
      scale[c] = 1.0f / ::sqrtf(means[c] + kEpsilon);
      shift[c] = 0.0f;
    }
  }
};

// Few accumulators and dimensionless columns, for large models: Adam-like ratios (scaled by the bias corrections),
// values relative to their tensor's root mean square, and two logarithms of second moments (shifted per tensor).
struct CompactFeatures {
  static constexpr const char* kName = "compact";
  static constexpr int kNumMom = 3;  // decays .9 .99 .999
  static constexpr int kNumRms = 2;  // decays .95 .999
  static constexpr int kSlow = 1;    // the second moment whose mean is a Moment
  static constexpr bool kRelative = true;
  LOPT_ENUM(Column, kNumColumns, mom0_over_slow, mom1_over_slow, mom2_over_slow, grad_over_slow, mom0_over_quick, param,
            grad, mom0, mom1, mom2, log_slow, log_ratio);
  static constexpr int kFirstShifted = Column::log_slow;  // columns before it have no shift
  LOPT_ENUM(Moment, kNumMoments, param_squared, grad_squared, mom0_squared, mom1_squared, mom2_squared, rms1);
  static constexpr int kSlowMean = Moment::rms1;
  static constexpr float kEpsilon = 1e-24f;  // small enough to keep every column independent of the gradient's scale

  template <class V>
  LOPT_HD static void columns(V grad, V param, const V* mom, const V* rms, V* x) {
    const V slow = rsqrt_of(rms[1] + kEpsilon);
    LOPT_UNROLL
    for (int k = 0; k < kNumMom; ++k) {
      x[Column::mom0_over_slow + k] = mom[k] * slow;
      x[Column::mom0 + k] = mom[k];
    }
    x[Column::grad_over_slow] = grad * slow;
    x[Column::mom0_over_quick] = mom[0] * rsqrt_of(rms[0] + kEpsilon);
    x[Column::param] = param;
    x[Column::grad] = grad;
    x[Column::log_slow] = log_of(rms[1] + kEpsilon) * 0.5f;
    x[Column::log_ratio] = log_of(rms[0] + kEpsilon) * 0.5f - x[Column::log_slow];
  }

  // 1, or 0 if there was no gradient for 180 steps, or ever: the MLP of zeros is not zero, and would let it drift.
  template <class V>
  LOPT_HD static V active(const V* rms) {
    return rms[0] > rms[kSlow] * kResting ? V{} + 1.0f : V{};
  }

  template <class V>
  LOPT_HD static void moments(V grad, V param, const V* mom, const V* rms, V* q) {
    q[Moment::param_squared] = param * param;
    q[Moment::grad_squared] = grad * grad;
    LOPT_UNROLL
    for (int k = 0; k < kNumMom; ++k) q[Moment::mom0_squared + k] = mom[k] * mom[k];
    q[Moment::rms1] = rms[kSlow];
  }

  LOPT_HD static void column_map(const float* means, const float* corrections, float* scale, float* shift) {
    const float* mom = corrections;
    const float* rms = corrections + kNumMom;
    for (int c = 0; c < kNumColumns; ++c) shift[c] = 0.0f;
    for (int k = 0; k < kNumMom; ++k) {
      scale[Column::mom0_over_slow + k] = ::sqrtf(rms[1]) / mom[k];
      scale[Column::mom0 + k] = 1.0f / ::sqrtf(means[Moment::mom0_squared + k] + kEpsilon);
    }
    scale[Column::grad_over_slow] = ::sqrtf(rms[1]);
    scale[Column::mom0_over_quick] = ::sqrtf(rms[0]) / mom[0];
    scale[Column::param] = 1.0f / ::sqrtf(means[Moment::param_squared] + kEpsilon);
    scale[Column::grad] = 1.0f / ::sqrtf(means[Moment::grad_squared] + kEpsilon);
    scale[Column::log_slow] = scale[Column::log_ratio] = 1.0f;
    shift[Column::log_slow] = -0.5f * ::logf(means[Moment::rms1] + kEpsilon);
    shift[Column::log_ratio] = 0.5f * ::logf(rms[1] / rms[0]);
  }
};

}  // namespace lopt

#ifdef LOPT_OWN_FEATURES  // a header with the struct OwnFeatures, which lopt/kernels/own.py writes
#include LOPT_OWN_FEATURES
#endif

namespace lopt {

// Calls f(Features{}) for the set of that index; false when there is none.
template <class Function>
bool with_feature_set(int index, Function&& f) {
#ifdef LOPT_OWN_FEATURES  // a library of one set, whatever its index
  (void)index;
  f(OwnFeatures{});
  return true;
#else
  switch (index) {
    case 0:
      f(PaperFeatures{});
      return true;
    case 1:
      f(CompactFeatures{});
      return true;
    default:
      return false;
  }
#endif
}

}  // namespace lopt
