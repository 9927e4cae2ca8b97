// Learned optimizers of others: what their MLP sees of one parameter, with factored second moments or without, the MLP; and
// Adam's step, where an LSTM drives it or it does what is no matrix.
//
// A tensor in memory is [outer, lines, groups, length, inner], where `lines` and `length` are its two largest dimensions and
// the others are all those before, between and behind them. A line, [groups, length, inner], is contiguous. Second moments
// are means along both: `along` is the mean over length, [outer, lines, groups, inner], and `across` the mean over lines,
// [outer, groups, length, inner]. The one that keeps the second largest dimension is Adafactor's row, the other its column.
//
// Values are of type V: float, or a SIMD vector of floats (simd.h). No loads or stores from memory here.
// Source: lopt/rule/published/{parts,small_fc,adafactor_mlp,nn_adam,celo2}.py, which are the definition.
#pragma once

#include "rule/constants.h"
#include "rule/maths.h"
#include "rule/mlp.h"

namespace lopt {

constexpr int kFactoredDecays = 3;

// What is known of one parameter's second moments, for each decay: the means along and across, their inverse roots, and what
// gradients and momenta are multiplied by.
template <class V>
struct Factors {
  V along[kFactoredDecays], across[kFactoredDecays], along_root[kFactoredDecays], across_root[kFactoredDecays];
  V of_grad[kFactoredDecays], of_mom[kFactoredDecays];

  // From an entry of `along` and one of `across`: mean, inverse root and factor, each for all decays.
  LOPT_HD static Factors of(const V* along, const V* across) {
    Factors f;
    LOPT_UNROLL
    for (int k = 0; k < kFactoredDecays; ++k) {
      f.along[k] = along[k];
      f.across[k] = across[k];
      f.along_root[k] = along[kFactoredDecays + k];
      f.across_root[k] = across[kFactoredDecays + k];
      f.of_grad[k] = f.of_mom[k] = along[2 * kFactoredDecays + k] * across[2 * kFactoredDecays + k];
    }
    return f;
  }
};
constexpr int kFactorPlanes = 3 * kFactoredDecays;

// The same of an element's own columns alone: from factors along and across.
template <class V>
LOPT_HD Factors<V> own_factors(const V* along, const V* across) {
  Factors<V> f{};
  LOPT_UNROLL
  for (int k = 0; k < kFactoredDecays; ++k) f.of_grad[k] = f.of_mom[k] = along[k] * across[k];
  return f;
}

// One entry of a row or column: its inverse root as a column of the MLP's input, and its factor.
template <class V>
LOPT_HD V inverse_root(V moment) {
  return rsqrt_of(moment + 1e-8f);
}
template <class V>
LOPT_HD V safe_inverse_root(V moment) {
  return rsqrt_of(max_of(moment, V{} + 1e-9f));
}

// Columns are in the order of the rule, but those that all elements of an entry have in common come last; `along` stands
// where the rule has the row and `across` where it has the column; `turned` is the place of a column where it is the other
// way around.

// Those that rules with three momenta, a second moment and factored ones have in common; epsilon: of its inverse root.
template <class Column, class V>
LOPT_HD void factored_columns(V grad, V param, const V* mom, const V* rms, const Factors<V>& f, float epsilon, V* x) {
  const V inverse = rsqrt_of(rms[0] + epsilon);
  x[Column::grad] = grad;
  x[Column::param] = param;
  x[Column::rms] = rms[0];
  x[Column::rsqrt_rms] = inverse;
  LOPT_UNROLL
  for (int k = 0; k < kFactoredDecays; ++k) {
    x[Column::mom0 + k] = mom[k];
    x[Column::mom0_over_rms + k] = mom[k] * inverse;
    x[Column::grad_factored0 + k] = grad * f.of_grad[k];
    x[Column::mom_factored0 + k] = mom[k] * f.of_mom[k];
    x[Column::along0 + k] = f.along[k];
    x[Column::across0 + k] = f.across[k];
    x[Column::rsqrt_along0 + k] = f.along_root[k];
    x[Column::rsqrt_across0 + k] = f.across_root[k];
  }
}

// Of which four things a rule's LSTM sees mean and variance in every tensor: the accumulators before the step (three momenta
// and a second moment), or gradient, parameter and the next momentum and second moment.
enum class Sees { kNothing, kBefore, kStep };

// What all rules have but where they say otherwise: an MLP, which writes parameters, and no step of Adam's.
struct RuleColumns {
  static constexpr bool kMlp = true;
  static constexpr bool kAdam = false;   // whether tensors that say so are stepped by adam_direction
  static constexpr bool kWhole = false;  // whether a tensor's directions are kept, treated as a whole, and then written
  static constexpr Sees kSees = Sees::kNothing;
  static constexpr float kRmsEpsilon = 1e-6f, kScaleEpsilon = 1e-5f;
  static constexpr float kGradientBound = kLargest;
};

// small_fc_lopt: 28 columns, and eleven times.
struct SmallFCColumns : RuleColumns {
  static constexpr int kNumMom = 3, kNumRms = 1;
  LOPT_ENUM(Column, kNumColumns, grad, param, mom0, mom1, mom2, rms, mom0_over_rms, mom1_over_rms, mom2_over_rms,
            rsqrt_rms, grad_factored0, grad_factored1, grad_factored2, mom_factored0, mom_factored1, mom_factored2,
            along0, along1, along2, across0, across1, across2, rsqrt_along0, rsqrt_along1, rsqrt_along2, rsqrt_across0,
            rsqrt_across1, rsqrt_across2);
  static constexpr int kNumTimes = 11;
  static constexpr bool kFactored = true;

  // Of a tensor of less than two dimensions, which is not factored: row and column are the second moments themselves.
  template <class V>
  LOPT_HD static Factors<V> not_factored(const V* moments) {
    Factors<V> f;
    LOPT_UNROLL
    for (int k = 0; k < kFactoredDecays; ++k) {
      f.along[k] = f.across[k] = moments[k];
      f.along_root[k] = f.across_root[k] = inverse_root(moments[k]);
      f.of_grad[k] = safe_inverse_root(moments[k] + 1e-9f);
      f.of_mom[k] = rsqrt_of(moments[k] + 1e-6f);
    }
    return f;
  }

  template <class V>
  LOPT_HD static void columns(V grad, V param, const V* mom, const V* rms, const Factors<V>& f, V* x) {
    factored_columns<Column>(grad, param, mom, rms, f, kRmsEpsilon, x);
  }
};

// VeLO: 30 columns, and nothing else.
struct VeLOColumns : RuleColumns {
  static constexpr int kNumMom = 3, kNumRms = 1;
  LOPT_ENUM(Column, kNumColumns, grad, small_grad, param, mom0, mom1, mom2, rms, mom0_over_rms, mom1_over_rms,
            mom2_over_rms, rsqrt_rms, grad_factored0, grad_factored1, grad_factored2, grad_over_rms, mom_factored0,
            mom_factored1, mom_factored2, along0, along1, along2, across0, across1, across2, rsqrt_along0, rsqrt_along1,
            rsqrt_along2, rsqrt_across0, rsqrt_across1, rsqrt_across2);
  static constexpr int kNumTimes = 0;
  static constexpr bool kFactored = true;
  static constexpr Sees kSees = Sees::kBefore;
  static constexpr float kGradientBound = 1000.0f, kSmallGradient = 0.1f;
  static constexpr float kLeastMoment = 1e-37f;  // below all that there are: a lane without one is 0

  template <class V>
  LOPT_HD static Factors<V> not_factored(const V* moments) {
    Factors<V> f = SmallFCColumns::not_factored(moments);
    LOPT_UNROLL
    for (int k = 0; k < kFactoredDecays; ++k) f.of_mom[k] = rsqrt_of(max_of(moments[k], V{} + kLeastMoment));
    return f;
  }

  template <class V>
  LOPT_HD static void columns(V grad, V param, const V* mom, const V* rms, const Factors<V>& f, V* x) {
    columns(grad, param, mom, rms, f, kRmsEpsilon, x);
  }
  template <class V>
  LOPT_HD static void columns(V grad, V param, const V* mom, const V* rms, const Factors<V>& f, float epsilon, V* x) {
    factored_columns<Column>(grad, param, mom, rms, f, epsilon, x);
    x[Column::small_grad] = clamp_of(grad, kSmallGradient);
    x[Column::grad_over_rms] = grad * x[Column::rsqrt_rms];
  }
};

// Celo2: VeLO's columns with other epsilons, of every matrix of a tensor; Adam for the rest.
struct Celo2Columns : VeLOColumns {
  static constexpr bool kAdam = true, kWhole = true;
  static constexpr Sees kSees = Sees::kNothing;
  static constexpr float kRmsEpsilon = 1e-8f, kScaleEpsilon = 1e-9f;

  template <class V>
  LOPT_HD static void columns(V grad, V param, const V* mom, const V* rms, const Factors<V>& f, V* x) {
    VeLOColumns::columns(grad, param, mom, rms, f, kRmsEpsilon, x);
  }
};

// nn_adam: Adam for all tensors, no MLP.
struct NNAdamColumns : RuleColumns {
  static constexpr int kNumMom = 1, kNumRms = 1, kNumColumns = 0, kNumTimes = 0;
  static constexpr bool kMlp = false, kAdam = true, kFactored = false;
  static constexpr Sees kSees = Sees::kStep;
  static constexpr float kGradientBound = 1000.0f;
};

// mlp_lopt: 8 columns, and eleven times; no second moments.
struct MLPLOptColumns : RuleColumns {
  static constexpr int kNumMom = 6, kNumRms = 0;
  LOPT_ENUM(Column, kNumColumns, grad, param, mom0, mom1, mom2, mom3, mom4, mom5);
  static constexpr int kNumTimes = 11;
  static constexpr bool kFactored = false;

  template <class V>
  LOPT_HD static void columns(V grad, V param, const V* mom, const V*, const Factors<V>&, V* x) {
    x[Column::grad] = grad;
    x[Column::param] = param;
    LOPT_UNROLL
    for (int k = 0; k < kNumMom; ++k) x[Column::mom0 + k] = mom[k];
  }
};

// How many columns, the first ones, are an element's own.
template <class Columns>
LOPT_HD constexpr int element_columns() {
  if constexpr (Columns::kFactored)
    return Columns::along0;
  else
    return Columns::kNumColumns;
}

template <class Columns>
LOPT_HD int turned(int column) {
  if constexpr (Columns::kFactored) {
    constexpr int kMeans = Columns::along0, kRoots = Columns::rsqrt_along0, kSide = kFactoredDecays;
    static_assert(Columns::across0 == kMeans + kSide && Columns::rsqrt_across0 == kRoots + kSide,
                  "along before across");
    for (int first : {kMeans, kRoots})
      if (column >= first && column < first + 2 * kSide)
        return column < first + kSide ? column + kSide : column - kSide;
  }
  return column;
}

// ---- Adam ---------------------------------------------------------------------------------------------------------------

// What a tensor's step by Adam is made of.
struct AdamControl {
  LOPT_ENUM(Control, kCount, mom_decay, rms_decay, gain, rms_gain, inside, epsilon);
};

// gain mom / (epsilon + sqrt(rms_gain rms + inside)), of the next mom and rms.
template <class V>
LOPT_HD V adam_direction(V mom, V rms, const float* control) {
  const V root = sqrt_of(rms * control[AdamControl::rms_gain] + control[AdamControl::inside]);
  return mom * control[AdamControl::gain] * reciprocal_of(root + control[AdamControl::epsilon]);
}

// ---- The MLP: two hidden layers ----------------------------------------------------------------------------------------

// Offsets into one row of weights, in floats: the first layer has `times` more inputs, which are the same for all
// parameters. A tensor's own row, with the columns' scales and the times folded into the first layer, has none of them.
template <int kColumns, int kWidth, int kTimes = 0>
struct FactoredMlp {
  static constexpr int kW1 = 0;                                   // [columns + times, width]
  static constexpr int kB1 = kW1 + (kColumns + kTimes) * kWidth;  // [width]
  static constexpr int kW2 = kB1 + kWidth;                        // [width, width]
  static constexpr int kB2 = kW2 + kWidth * kWidth;               // [width]
  static constexpr int kW3 = kB2 + kWidth;                        // [width, 2]: direction, magnitude
  static constexpr int kB3 = kW3 + 2 * kWidth;                    // [2]
  static constexpr int kSize = (kB3 + 2 + 3) / 4 * 4;             // padded to 16 bytes
};

// tanh(step / 1 - 1), tanh(step / 3 - 1), ..
LOPT_HD float tanh_time(int i, float step) { return ::tanhf(step / wave(i) - 1.0f); }

// A column's factor: it is divided by its root mean square over the tensor, or matrix.
template <class Columns>
LOPT_HD float column_scale(double mean_square) {
  return 1.0f / ::sqrtf(Columns::kScaleEpsilon + static_cast<float>(mean_square));
}

// Element i of a tensor's own row of weights, from the rule's, the columns' scales (or null, where each matrix has its own)
// and `tanh_time`s; along_is_row: see above.
template <class Columns, int kWidth>
LOPT_HD float folded_weight(int i, const float* weights, const float* scale, bool along_is_row, const float* times) {
  using From = FactoredMlp<Columns::kNumColumns, kWidth, Columns::kNumTimes>;
  using To = FactoredMlp<Columns::kNumColumns, kWidth>;
  if (i < To::kB1) {
    const int c = i / kWidth;
    return weights[(along_is_row ? c : turned<Columns>(c)) * kWidth + i % kWidth] * (scale ? scale[c] : 1.0f);
  }
  if (i >= To::kB3 + 2) return 0.0f;  // padding
  if (i >= To::kW2) return weights[i - To::kW2 + From::kW2];
  const int j = i - To::kB1;
  float bias = weights[From::kB1 + j];
  for (int t = 0; t < Columns::kNumTimes; ++t) bias += times[t] * weights[(Columns::kNumColumns + t) * kWidth + j];
  return bias;
}

// The direction of kRows rows of x [kIn, kRows], the first kIn columns, by a tensor's own row of weights. start(j, row):
// what unit j of the first layer has from its bias and all other columns.
template <class Columns, int kIn, int kWidth, int kRows, int kBlock, class V, class Start>
LOPT_HD void factored_direction(const V* x, const float* weights, float magnitude_rate, const Start& start,
                                V* direction) {
  using Layout = FactoredMlp<Columns::kNumColumns, kWidth>;
  V hidden[kWidth * kRows], magnitude[kRows];
  LOPT_UNROLL_ON_DEVICE
  for (int first = 0; first < kWidth; first += kBlock) {
    V sum[kBlock * kRows];
    unrolled<kBlock * kRows>([&](auto k) LOPT_INLINE { sum[k] = start(first + k / kRows, k % kRows); });
    LOPT_UNROLL_ON_DEVICE
    for (int i = 0; i < kIn; ++i) {
      unrolled<kBlock>([&](auto j) LOPT_INLINE {
        const float weight = weights[Layout::kW1 + i * kWidth + first + j];
        unrolled<kRows>([&](auto r) LOPT_INLINE { sum[j * kRows + r] += x[i * kRows + r] * weight; });
      });
    }
    unrolled<kBlock * kRows>([&](auto k) LOPT_INLINE { hidden[first * kRows + k] = max_of(sum[k], V{}); });
  }
  unrolled<kRows>([&](auto r) LOPT_INLINE {
    direction[r] = weights[Layout::kB3] - V{};
    magnitude[r] = weights[Layout::kB3 + 1] - V{};
  });
  relu_layer<kWidth, kWidth, kRows, kBlock>(hidden, weights + Layout::kW2, weights + Layout::kB2,
                                            [&](int j, int r, const V& value) LOPT_INLINE {
                                              direction[r] += value * weights[Layout::kW3 + 2 * j];
                                              magnitude[r] += value * weights[Layout::kW3 + 2 * j + 1];
                                            });
  unrolled<kRows>([&](auto r) LOPT_INLINE { direction[r] = direction[r] * exp_of(magnitude[r] * magnitude_rate); });
}

}  // namespace lopt
