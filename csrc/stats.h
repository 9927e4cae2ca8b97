// Per-tensor statistics and how partial results of chunks are merged, in a fixed order, into one row.
//
// Sums are plain sums; means and variances are carried as (mean, sum of squared deviations) and merged by the formula of
// Chan, Golub and LeVeque (1979), because a variance goes through a logarithm in the LSTM's input and E[x^2] - E[x]^2
// would lose it.
#pragma once

#include <cstdint>

#include "maths.h"

namespace lopt {

// Row of `stats`; means over the tensor's numel elements. A row of partials has the same columns, with sums in place of
// the mean squares and of the moments, and sums of squared deviations in place of the variances.
enum Stat {
  kGradSquare,   // mean of the squared clipped gradient
  kParamSquare,  // mean of param^2, before the update
  kNonfinite,    // number of NaN and Inf gradient elements
  kParamMean,
  kParamVar,
  kMomMean,  // over all numel * num_mom values jointly
  kMomVar,
  kRmsMean,  // over all numel * num_rms values jointly
  kRmsVar,
  kMoments  // [Features::kNumMoments] means of Features::moments
};

template <class Features>
constexpr int kNumStats = kMoments + Features::kNumMoments;

// mean and sum of squared deviations of n values, merged with those of m further values.
template <class T>
LOPT_HD void merge_moments(T& mean, T& squares, T n, T other_mean, T other_squares, T m) {
  const T delta = other_mean - mean;
  const T share = m / (n + m);
  mean += delta * share;
  squares += other_squares + delta * delta * n * share;
}

// total (of n parameters) += part (of m parameters); both rows of partials.
template <class Features, class T>
LOPT_HD void merge_partials(T* total, T n, const T* part, T m) {
  total[kGradSquare] += part[kGradSquare];
  total[kParamSquare] += part[kParamSquare];
  total[kNonfinite] += part[kNonfinite];
  merge_moments(total[kParamMean], total[kParamVar], n, part[kParamMean], part[kParamVar], m);
  merge_moments(total[kMomMean], total[kMomVar], n * Features::kNumMom, part[kMomMean], part[kMomVar],
                m * Features::kNumMom);
  merge_moments(total[kRmsMean], total[kRmsVar], n * Features::kNumRms, part[kRmsMean], part[kRmsVar],
                m * Features::kNumRms);
  for (int i = 0; i < Features::kNumMoments; ++i) total[kMoments + i] += part[kMoments + i];
}

// A merged row of partials -> the row of `stats`.
template <class Features, class T>
LOPT_HD void finish_stats(const T* total, T numel, float* stats) {
  stats[kGradSquare] = static_cast<float>(total[kGradSquare] / numel);
  stats[kParamSquare] = static_cast<float>(total[kParamSquare] / numel);
  stats[kNonfinite] = static_cast<float>(total[kNonfinite]);
  stats[kParamMean] = static_cast<float>(total[kParamMean]);
  stats[kParamVar] = static_cast<float>(total[kParamVar] / numel);
  stats[kMomMean] = static_cast<float>(total[kMomMean]);
  stats[kMomVar] = static_cast<float>(total[kMomVar] / (numel * Features::kNumMom));
  stats[kRmsMean] = static_cast<float>(total[kRmsMean]);
  stats[kRmsVar] = static_cast<float>(total[kRmsVar] / (numel * Features::kNumRms));
  for (int i = 0; i < Features::kNumMoments; ++i) stats[kMoments + i] = static_cast<float>(total[kMoments + i] / numel);
}

}  // namespace lopt
