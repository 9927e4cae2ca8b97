// Means over tensors that none of them can dominate (lopt.rule.tensor_lstm.bounded_mean), by a team of threads (Note [Team] in
// tensor_lstm.h): `team.total` and `team.largest` of a value for each tensor.
#pragma once

#include <cmath>
#include <cstdint>

#include "rule/maths.h"

namespace lopt {
namespace {  // compiled once per instruction set: no function may be shared between them

LOPT_HD uint32_t bits_of(float x) {
  union {
    float value;
    uint32_t bits;
  } both;
  both.value = x;
  return both.bits;
}

LOPT_HD float float_of(uint32_t bits) {
  union {
    float value;
    uint32_t bits;
  } both;
  both.bits = bits;
  return both.value;
}

// Value number `rank` in ascending order, from 1 on, of the values (>= 0) that count: digit by digit of their bits, which
// are in the same order.
template <class Team, class Value, class Counts>
LOPT_HD float value_of_rank(const Team& team, int tensors, double rank, const Value& value, const Counts& counts) {
  constexpr int kField = 17;  // bits of a count; several are added as one double
  const int digit = tensors < 1 << kField ? 2 : 1, digits = (1 << digit) - 1;
  uint32_t low = 0;
  for (int shift = 30; shift >= 0; shift -= digit) {
    const uint64_t below = static_cast<uint64_t>(team.total(tensors, [&](int t) -> double {
      if (!counts(t)) return 0.0;
      const uint32_t bits = bits_of(value(t));
      uint64_t fields = 0;
      for (int d = digits; d > 0; --d) fields = fields << kField | (bits < low + (static_cast<uint32_t>(d) << shift));
      return static_cast<double>(fields);
    }));
    int chosen = 0;
    for (int d = 1; d <= digits; ++d) {
      const uint64_t count = digits == 1 ? below : below >> kField * (d - 1) & ((uint64_t{1} << kField) - 1);
      if (static_cast<double>(count) < rank) chosen = d;
    }
    low += static_cast<uint32_t>(chosen) << shift;
  }
  return float_of(low);
}

// Mean of the values (>= 0) of those `number` tensors that count, none taken for more than `outlier` times their lower
// median: no tensor can dominate it (lopt.rule.tensor_lstm.bounded_mean). 0 where none counts.
template <class Team, class Value, class Counts>
LOPT_HD float bounded_mean(const Team& team, int tensors, double number, float outlier, const Value& value,
                           const Counts& counts) {
  if (!(number > 0)) return 0.0f;
  const double rank = ::floor((number + 1) / 2);
  float most = team.largest(tensors, [&](int t) -> float { return counts(t) ? value(t) : 0.0f; });
  const double near =
      team.total(tensors, [&](int t) -> double { return counts(t) && value(t) * outlier >= most ? 1.0 : 0.0; });
  if (near <= number - rank) most = outlier * value_of_rank(team, tensors, rank, value, counts);
  return static_cast<float>(
      team.total(tensors, [&](int t) -> double { return counts(t) ? ::fminf(value(t), most) : 0.0f; }) / number);
}

}  // namespace
}  // namespace lopt
