// Feature sets: the per-parameter inputs of the small MLP, one struct per set.
//
// A feature set names its raw columns (enum Column), fills them for one parameter (`columns`), and says which per-tensor
// means its column map needs (enum Moment, `moments`), and which parameters move (`active`). The column map itself,
// x = clamp(raw * scale + shift, +-clip), is affine with per-tensor scale and shift, so the tensor normaliser and the bias
// corrections of the accumulators never touch a kernel: `column_map`, and in Python lopt/features.py, turns means into
// scale and shift.
//
// Values are of type V: float, or a SIMD vector of floats (simd.h). No loads or stores from memory here.
// `grad` is the clipped gradient, `mom` and `rms` are the updated accumulators.
// Source: arXiv:2009.11243 and the author's port, rnn_mlp_lopt in google/learned_optimization (`PaperFeatures`).
#pragma once

#include "maths.h"

namespace lopt {

// The paper's 23 columns, each divided by its root mean square over the tensor.
struct PaperFeatures {
  static constexpr const char* kName = "paper";
  static constexpr int kNumMom = 5;  // decays .5 .9 .99 .999 .9999
  static constexpr int kNumRms = 5;  // the same decays, paired by index
  static constexpr int kSlow = -1;   // no second moment is a Moment
  enum Column {
    kGrad,
    kParam,
    kLogParam,                          // ln(|param| + 1e-8)
    kMom,                               // [5]
    kRms = kMom + kNumMom,              // [5]
    kMomOverRms = kRms + kNumRms,       // [5] mom_k * rsqrt(rms_k + 1e-6)
    kRsqrtRms = kMomOverRms + kNumMom,  // [5] rsqrt(rms_k + 1e-6)
    kNumColumns = kRsqrtRms + kNumRms
  };
  enum Moment { kColumnSquares, kNumMoments = kColumnSquares + kNumColumns };  // mean(x^2) of every column

  template <class V>
  LOPT_HD static void columns(V grad, V param, const V* mom, const V* rms, V* x) {
    x[kGrad] = grad;
    x[kParam] = param;
    x[kLogParam] = log_of(abs_of(param) + 1e-8f);
    LOPT_UNROLL
    for (int k = 0; k < kNumMom; ++k) {
      const V inverse = rsqrt_of(rms[k] + 1e-6f);
      x[kMom + k] = mom[k];
      x[kRms + k] = rms[k];
      x[kMomOverRms + k] = mom[k] * inverse;
      x[kRsqrtRms + k] = inverse;
    }
  }

  template <class V>
  LOPT_HD static V active(const V*) {
    return V{} + 1.0f;
  }

  template <class V>
  LOPT_HD static void moments(V grad, V param, const V* mom, const V* rms, V* q) {
    columns(grad, param, mom, rms, q);
    LOPT_UNROLL
    for (int c = 0; c < kNumColumns; ++c) q[c] = q[c] * q[c];
  }

  // Scale and shift of every column from the means of its moments; corrections[k] = 1 - decay_k^updates of mom, then rms.
  LOPT_HD static void column_map(const float* means, const float*, float* scale, float* shift) {
    for (int c = 0; c < kNumColumns; ++c) {
      scale[c] = rsqrt_of(means[c] + 1e-5f);
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
  enum Column {
    kMomOverSlow,                            // [3] mom_k * rsqrt(rms_1 + tiny)
    kGradOverSlow = kMomOverSlow + kNumMom,  // grad * rsqrt(rms_1 + tiny)
    kMomOverQuick,                           // mom_0 * rsqrt(rms_0 + tiny)
    kParam,
    kGrad,
    kMom,                       // [3]
    kLogSlow = kMom + kNumMom,  // ln(rms_1 + tiny) / 2
    kLogRatio,                  // ln((rms_0 + tiny) / (rms_1 + tiny)) / 2
    kNumColumns
  };
  enum Moment { kParamSquare, kGradSquare, kMomSquare, kSlowMean = kMomSquare + kNumMom, kNumMoments };
  static constexpr float kTiny = 1e-24f;  // small enough to keep every column independent of the gradient's scale

  template <class V>
  LOPT_HD static void columns(V grad, V param, const V* mom, const V* rms, V* x) {
    const V slow = rsqrt_of(rms[1] + kTiny);
    LOPT_UNROLL
    for (int k = 0; k < kNumMom; ++k) {
      x[kMomOverSlow + k] = mom[k] * slow;
      x[kMom + k] = mom[k];
    }
    x[kGradOverSlow] = grad * slow;
    x[kMomOverQuick] = mom[0] * rsqrt_of(rms[0] + kTiny);
    x[kParam] = param;
    x[kGrad] = grad;
    x[kLogSlow] = log_of(rms[1] + kTiny) * 0.5f;
    x[kLogRatio] = log_of(rms[0] + kTiny) * 0.5f - x[kLogSlow];
  }

  // 1, or 0 if there was no gradient for 180 steps, or ever: the MLP of zeros is not zero, and would let it drift.
  template <class V>
  LOPT_HD static V active(const V* rms) {
    return rms[0] > rms[kSlow] * 1e-4f ? V{} + 1.0f : V{};
  }

  template <class V>
  LOPT_HD static void moments(V grad, V param, const V* mom, const V* rms, V* q) {
    q[kParamSquare] = param * param;
    q[kGradSquare] = grad * grad;
    LOPT_UNROLL
    for (int k = 0; k < kNumMom; ++k) q[kMomSquare + k] = mom[k] * mom[k];
    q[kSlowMean] = rms[kSlow];
  }

  LOPT_HD static void column_map(const float* means, const float* corrections, float* scale, float* shift) {
    const float* mom = corrections;
    const float* rms = corrections + kNumMom;
    for (int c = 0; c < kNumColumns; ++c) shift[c] = 0.0f;
    for (int k = 0; k < kNumMom; ++k) {
      scale[kMomOverSlow + k] = ::sqrtf(rms[1]) / mom[k];
      scale[kMom + k] = rsqrt_of(means[kMomSquare + k] + kTiny);
    }
    scale[kGradOverSlow] = ::sqrtf(rms[1]);
    scale[kMomOverQuick] = ::sqrtf(rms[0]) / mom[0];
    scale[kParam] = rsqrt_of(means[kParamSquare] + kTiny);
    scale[kGrad] = rsqrt_of(means[kGradSquare] + kTiny);
    scale[kLogSlow] = scale[kLogRatio] = 1.0f;
    shift[kLogSlow] = -0.5f * ::logf(means[kSlowMean] + kTiny);
    shift[kLogRatio] = 0.5f * ::logf(rms[1] / rms[0]);
  }
};

// Calls f(Features{}) for the set of that name; false when there is none.
template <class Function>
bool with_feature_set(int index, Function&& f) {
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
}

}  // namespace lopt
