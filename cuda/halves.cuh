// float16 and bfloat16 on the GPU: two in a word, the first in its lower 16 bits.
#pragma once

#include "launch.cuh"
#include "rule/halves.h"

namespace lopt {

#ifdef __CUDACC__
// Rounded to nearest; with kSaturate, values beyond +-65504 become that, otherwise infinity.
template <bool kSaturate>
__device__ __forceinline__ uint32_t pack_halves(float x, float y) {
  uint32_t pair;
  if (kSaturate)
    asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
  return pair;
}
__device__ __forceinline__ void unpack_halves(uint32_t pair, float& x, float& y) {
  asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}" : "=f"(x), "=f"(y) : "r"(pair));
}
// max(x, -y) of each of the two numbers; NaN stays NaN.
__device__ __forceinline__ uint32_t max_of_negative(uint32_t x, uint32_t y) {
  uint32_t larger;
  asm("{.reg .b32 n; neg.f16x2 n, %2; max.NaN.f16x2 %0, %1, n;}" : "=r"(larger) : "r"(x), "r"(y));
  return larger;
}
__device__ __forceinline__ uint32_t pack_bfloat16(float x, float y) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
  return pair;
}
#else
template <bool kSaturate>
uint32_t pack_halves(float x, float y) {
  if (kSaturate) x = clamp_of(x, -65504.0f, 65504.0f), y = clamp_of(y, -65504.0f, 65504.0f);
  return half_bits(x) | half_bits(y) << 16;
}
inline void unpack_halves(uint32_t pair, float& x, float& y) {
  x = half_value(pair & 0xffff), y = half_value(pair >> 16);
}
inline uint32_t max_of_negative(uint32_t x, uint32_t y) {
  y ^= 0x80008000u;
  float first[2], second[2];
  unpack_halves(x, first[0], first[1]);
  unpack_halves(y, second[0], second[1]);
  for (int i = 0; i < 2; ++i) first[i] = second[i] == second[i] ? max_of(first[i], second[i]) : second[i];
  return pack_halves<false>(first[0], first[1]);
}
inline uint32_t bfloat16_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return value == value ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fff;
}
inline uint32_t pack_bfloat16(float x, float y) { return bfloat16_bits(x) | bfloat16_bits(y) << 16; }
#endif

}  // namespace lopt
