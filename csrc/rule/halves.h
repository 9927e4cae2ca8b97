// float16 numbers by integer arithmetic, for processors without instructions for them: 1 bit of sign, 5 of the exponent, 10
// of the mantissa. No intermediate result is subnormal as a float, so that flushing those to zero changes nothing.
#pragma once

#include <cstdint>
#include <cstring>

#include "rule/maths.h"

namespace lopt {

// The float that a float16, in the lower 16 bits, is; NaN, as a quiet one, stays NaN.
LOPT_HD float half_value(uint32_t half) {
  constexpr uint32_t kRebias = (127 - 15) << 23, kSmallest = 0x38800000;  // 2^-14, the smallest normal number
  const uint32_t shifted = (half & 0x7fffu) << 13, exponent = shifted & 0x0f800000u;
  uint32_t bits = shifted + kRebias;
  if (exponent == 0x0f800000u) bits = (shifted & 0x007fffffu ? 0x7fc00000u : 0x7f800000u) | (shifted & 0x007fffffu);
  float magnitude, smallest;
  if (exponent == 0) {  // a number below 2^-14: the mantissa of one between that and twice that, less the 1 before it
    bits += 1u << 23;
    std::memcpy(&magnitude, &bits, sizeof bits);
    std::memcpy(&smallest, &kSmallest, sizeof smallest);
    magnitude -= smallest;
    std::memcpy(&bits, &magnitude, sizeof bits);
  }
  bits |= (half & 0x8000u) << 16;
  std::memcpy(&magnitude, &bits, sizeof bits);
  return magnitude;
}

// The nearest float16, of two the even one, in the lower 16 bits: infinity from 65520 on; NaN stays NaN.
LOPT_HD uint32_t half_bits(float x) {
  constexpr uint32_t kRebias = (127 - 15) << 23, kHalf = 0x3f000000;  // .5, whose last bit counts 2^-24
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u | (magnitude >> 13 & 0x3ffu);
  if (magnitude >= 0x47800000u)
    return sign | 0x7c00u;  // 65536; what is between 65520 and that is rounded up to it below
  if (magnitude < 0x38800000u) {
    float shifted;
    std::memcpy(&shifted, &magnitude, sizeof shifted);
    shifted += 0.5f;
    std::memcpy(&bits, &shifted, sizeof bits);
    return sign | (bits - kHalf);
  }
  return sign | (magnitude - kRebias + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
}

}  // namespace lopt
