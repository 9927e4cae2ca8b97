// Stochastic rounding of accumulators to bfloat16. An accumulator with decay .9999 moves by less than a bfloat16 step, so
// that rounding to nearest would never move it; a value rounded up with the probability of its rest is right on average.
//
// The random bits belong to (seed, step, tensor, element, accumulator) and to nothing else: a counter-based generator, the
// same in all back ends and in lopt/rule/reference.py, for any number of threads and after a restart. A 64-bit hash makes two
// words of the first three, and of a pair of accumulators; a 32-bit hash mixes them with the element. Each half of the
// result serves one accumulator of the pair: bfloat16 is the upper half of a float32, so 16 bits decide.
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

// The words of up to 2 * kPairs accumulators.
template <int kPairs>
struct RoundingWords {
  uint32_t before[kPairs], between[kPairs];

  // For the elements of a tensor from `begin` on, up to the next multiple of 2^32.
  LOPT_HD static RoundingWords of(uint64_t key, int64_t begin) {
    RoundingWords words{};
    LOPT_UNROLL
    for (int pair = 0; pair < kPairs; ++pair) {
      const uint64_t word = mix_bits(key + static_cast<uint64_t>(begin >> 32) * 16 + static_cast<uint64_t>(pair) + 1);
      words.before[pair] = static_cast<uint32_t>(word);
      words.between[pair] = static_cast<uint32_t>(word >> 32);
    }
    return words;
  }

  // 32 bits of each element, a number or a SIMD vector: its low half for accumulator 2 pair, the high one for the next.
  template <class Bits>
  LOPT_HD Bits bits(int pair, Bits element) const {
    Bits x = element ^ before[pair];
    x = (x ^ (x >> 16)) * 0x7feb352du + between[pair];
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
  }
};

// value as float32 bits -> the bfloat16 below or above, as float32 bits; NaN, as a quiet one, stays NaN.
template <class Bits>
LOPT_HD Bits rounded_bits(Bits value, Bits random, int accumulator) {
  return (value + (accumulator % 2 ? random >> 16 : random & 0xffffu)) & 0xffff0000u;
}

}  // namespace lopt
