// Per-tensor statistics and how partial results of chunks are merged, in a fixed order, into one row.
//
// Sums are plain sums; means and variances are carried as (mean, sum of squared deviations) and merged by the formula of
// Chan, Golub and LeVeque (1979), because a variance goes through a logarithm in the LSTM's input and E[x^2] - E[x]^2
// would lose it.
#pragma once

#include <cstdint>

#include "rule/constants.h"
#include "rule/maths.h"

namespace lopt {

// Row of `stats`; means over the tensor's numel elements. A row of partials has the same columns, with sums in place of
// the mean squares and of the moments, and sums of squared deviations in place of the variances.
//   grad_square        mean of the squared clipped gradient
//   param_square       mean of param^2, before the update; parameters in statistics are `bounded`
//   nonfinite          number of NaN and Inf gradient elements
//   mom_mean, mom_var  over all numel * num_mom values jointly; those of rms likewise
// The Features::kNumMoments means of Features::moments follow.
struct Stat {
  LOPT_ENUM(Column, kCount, grad_square, param_square, nonfinite, param_mean, param_var, mom_mean, mom_var, rms_mean,
            rms_var);
};
constexpr int kMoments = Stat::kCount;

template <class Features>
constexpr int kNumStats = kMoments + Features::kNumMoments;

// Of a moment that is one of the statistics above, but for the division: which; of others -1.
template <class Features>
LOPT_HD constexpr int stat_of(int moment) {
  return moment == int{Features::grad_squared}    ? int{Stat::grad_square}
         : moment == int{Features::param_squared} ? int{Stat::param_square}
                                                  : -1;
}

// A parameter as statistics see it: so small that the squares of a tensor can be summed; NaN where it is not finite, so that
// the statistics of its tensor are not.
template <class V>
LOPT_HD V bounded(V param) {
  return clamp_of(param, kLargest) + param * 0.0f;
}

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
  total[Stat::grad_square] += part[Stat::grad_square];
  total[Stat::param_square] += part[Stat::param_square];
  total[Stat::nonfinite] += part[Stat::nonfinite];
  merge_moments(total[Stat::param_mean], total[Stat::param_var], n, part[Stat::param_mean], part[Stat::param_var], m);
  merge_moments(total[Stat::mom_mean], total[Stat::mom_var], n * Features::kNumMom, part[Stat::mom_mean],
                part[Stat::mom_var], m * Features::kNumMom);
  merge_moments(total[Stat::rms_mean], total[Stat::rms_var], n * Features::kNumRms, part[Stat::rms_mean],
                part[Stat::rms_var], m * Features::kNumRms);
  for (int i = 0; i < Features::kNumMoments; ++i) total[kMoments + i] += part[kMoments + i];
}

// A merged row of partials -> the row of `stats`.
template <class Features, class T>
LOPT_HD void finish_stats(const T* total, T numel, float* stats) {
  stats[Stat::grad_square] = static_cast<float>(total[Stat::grad_square] / numel);
  stats[Stat::param_square] = static_cast<float>(total[Stat::param_square] / numel);
  stats[Stat::nonfinite] = static_cast<float>(total[Stat::nonfinite]);
  stats[Stat::param_mean] = static_cast<float>(total[Stat::param_mean]);
  stats[Stat::param_var] = static_cast<float>(total[Stat::param_var] / numel);
  stats[Stat::mom_mean] = static_cast<float>(total[Stat::mom_mean]);
  stats[Stat::mom_var] = static_cast<float>(total[Stat::mom_var] / (numel * Features::kNumMom));
  stats[Stat::rms_mean] = static_cast<float>(total[Stat::rms_mean]);
  stats[Stat::rms_var] = static_cast<float>(total[Stat::rms_var] / (numel * Features::kNumRms));
  for (int i = 0; i < Features::kNumMoments; ++i) stats[kMoments + i] = static_cast<float>(total[kMoments + i] / numel);
}

}  // namespace lopt
