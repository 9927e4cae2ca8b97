// Stochastic rounding of accumulators to bfloat16. An accumulator with decay .9999 moves by less than a bfloat16 step, so
// that rounding to nearest would never move it; a value rounded up with the probability of its rest is right on average.
//
// The random bits belong to (seed, step, tensor, element, accumulator) and to nothing else: a counter-based generator, the
// same in all back ends and in lopt/rule/rounding.py, for any number of threads and after a restart. A 64-bit hash makes two
// words of the first three and the accumulator; a 32-bit hash mixes two of them with the element. 16 bits decide, as bfloat16
// is the upper half of a float32: the halves of the element's hash serve two accumulators, and of each further one the upper
// half of hash * odd word + word, which is as good as independent of the others (Dietzfelbinger 1996).
// Source: finaliser of splitmix64 (Steele et al. 2014), 32-bit hash with the constants of C. Wellons' hash-prospector.
#pragma once

#include <cstdint>

#include "rule/maths.h"

namespace lopt {

LOPT_HD uint64_t mix_bits(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// Of one tensor and step: what the keys of its pairs start from.
LOPT_HD uint64_t rounding_key(uint64_t seed, uint64_t step, uint64_t tensor) {
  constexpr uint64_t kOdd = 0x9e3779b97f4a7c15ull;
  return mix_bits(mix_bits(mix_bits(seed + kOdd) + step) + tensor);
}

// The words of kAccumulators.
template <int kAccumulators>
struct RoundingWords {
  static constexpr int kWords = kAccumulators < 3 ? 1 : kAccumulators - 1;
  uint32_t first[kWords], second[kWords];  // of the hash, then of accumulators 2, 3, ..

  // For the elements of a tensor from `begin` on, up to the next multiple of 2^32.
  LOPT_HD static RoundingWords of(uint64_t key, int64_t begin) {
    RoundingWords words{};
    LOPT_UNROLL
    for (int i = 0; i < kWords; ++i) {
      const uint64_t word = mix_bits(key + static_cast<uint64_t>(begin >> 32) * 16 + static_cast<uint64_t>(i) + 1);
      words.first[i] = static_cast<uint32_t>(word) | (i > 0);
      words.second[i] = static_cast<uint32_t>(word >> 32);
    }
    return words;
  }

  // Of each element, a number or a SIMD vector.
  template <class Bits>
  LOPT_HD Bits hash(Bits element) const {
    Bits x = element ^ first[0];
    x = (x ^ (x >> 16)) * 0x7feb352du + second[0];
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
  }

  // 16 bits for an accumulator.
  template <class Bits>
  LOPT_HD Bits bits(int accumulator, Bits hash) const {
    if (accumulator == 0) return hash & 0xffffu;
    return (accumulator == 1 ? hash : hash * first[accumulator - 1] + second[accumulator - 1]) >> 16;
  }
};

// value as float32 bits -> the bfloat16 below or above, as float32 bits; NaN, as a quiet one, stays NaN.
template <class Bits>
LOPT_HD Bits rounded_bits(Bits value, Bits random) {
  return (value + random) & 0xffff0000u;
}

}  // namespace lopt
