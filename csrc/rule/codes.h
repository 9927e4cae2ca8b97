// Accumulators in 8 bits. Of each accumulator, kCodeBlock neighbouring parameters share a scale s, a byte; a byte c for each is
//   a momentum       c^3 2^(s - 99),   c = -127 .. 127
//   a second moment  c^6 2^(s - 126),  c = 0 .. 255
// A code c^3 is fine where a number is large in its block, and reaches down to 5e-7 of the largest; a second moment has the
// units of a gradient squared, so its root has the same code. Of those tried (benchmarks/codes.py) they are off least.
//
// Numbers are rounded up or down at random, right on average, by the bits of rounding.h: steps of a slow accumulator are
// smaller than those between codes. A positive second moment does not become zero, since a momentum is divided by its root.
//
// Scales are powers of two, numbers of codes and distances to them are floats without a rounding but for c^6, whose is the
// same everywhere, and the estimate of a root is put right: all back ends and lopt/rule/codes.py choose the same codes.
#pragma once

#include <cstdint>
#include <cstring>

#include "rule/maths.h"

namespace lopt {

constexpr int64_t kCodeBlock = 128;
constexpr uint32_t kSmallestExponent = 48;  // of a block's largest number, biased: beneath, rms could underflow

LOPT_HD int64_t code_blocks(int64_t numel) { return (numel + kCodeBlock - 1) / kCodeBlock; }

LOPT_HD float power_of_two(uint32_t biased_exponent) {
  const uint32_t bits = biased_exponent << 23;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

struct MomCode {
  using Byte = int8_t;
  static constexpr uint32_t kUnit = 28;  // biased exponent of code 1 where the scale is 0
  static constexpr int kPower = 3;
  static constexpr float kTop = 127.0f * 127.0f * 127.0f;
  template <class V>
  LOPT_HD static V number(V code) {
    return code * code * code;
  }
  template <class V>
  LOPT_HD static V with_sign(V code, V value) {
    return value < V{} ? -code : code;
  }
};

struct RmsCode {
  using Byte = uint8_t;
  static constexpr uint32_t kUnit = 1;
  static constexpr int kPower = 6;
  static constexpr float kTop = (255.0f * 255.0f * 255.0f) * (255.0f * 255.0f * 255.0f);
  template <class V>
  LOPT_HD static V number(V code) {
    const V cube = code * code * code;
    return cube * cube;
  }
  template <class V>
  LOPT_HD static V with_sign(V code, V value) {
    return value > V{} ? max_of(code, V{} + 1.0f) : V{};
  }
};

// The scale of a block, from the bits of its largest magnitude: so that it is at most 127^3 or 255^6 units, 61/64 of a power
// of two.
LOPT_HD uint32_t code_scale(uint32_t largest) {
  const uint32_t exponent = (largest + 0x5ffffu) >> 23;
  return exponent > kSmallestExponent ? exponent - kSmallestExponent : 0;
}

template <class Code>
LOPT_HD float code_unit(uint32_t scale) {
  return power_of_two(scale + Code::kUnit);
}
template <class Code>
LOPT_HD float code_inverse(uint32_t scale) {
  return power_of_two(254 - scale - Code::kUnit);
}

// A code of a block with this unit -> the number.
template <class Code, class V>
LOPT_HD V decoded(V code, float unit) {
  return Code::number(code) * unit;
}

// A number, by the inverse of its block's unit and 16 random bits -> one of the two codes next to it. NaN counts as zero.
template <class Code, class V, class Bits>
LOPT_HD V encoded(V value, float inverse, Bits random) {
  const V size = abs_of(value) * inverse;
  const V x = size == size ? clamp_of(size, 0.0f, Code::kTop) : V{};
  V code = whole_of(root_estimate<Code::kPower>(x));
  code = Code::number(code) > x ? code - 1.0f : code;
  code = Code::number(code + 1.0f) > x ? code : code + 1.0f;
  const V low = Code::number(code), next = Code::number(code + 1.0f);
  code = x - low > (number_of(random) + 0.5f) * 0x1p-16f * (next - low) ? code + 1.0f : code;
  return Code::with_sign(code, value);
}

}  // namespace lopt
