// `Vec`: as many floats as one SIMD register of the instruction set this file is compiled for (see CMakeLists.txt), with
// the same functions that maths.h has for `float`. Include it before features.h and mlp.h: their templates must see the
// overloads. Logarithm and exponential are polynomials after Cephes' logf and expf, exact to about one ulp.
#pragma once

#include <cstring>

#include "maths.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace lopt {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));

LOPT_HD Vec splat(float x) { return Vec{} + x; }

LOPT_HD Vec sqrt_of(Vec x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);  // the plain one warns in g++ 12
#elif defined(__AVX__)
  return (Vec)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  return (Vec)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

LOPT_HD Vec rsqrt_of(Vec x) { return 1.0f / sqrt_of(x); }
LOPT_HD Vec abs_of(Vec x) { return (Vec)((IntVec)x & 0x7fffffff); }
LOPT_HD Vec max_of(Vec x, Vec y) { return x < y ? y : x; }
LOPT_HD Vec clamp_of(Vec x, float low, float high) {
  const Vec lowest = splat(low), highest = splat(high);
  x = x < lowest ? lowest : x;
  return x > highest ? highest : x;
}
LOPT_HD Vec clip_gradient(Vec grad, float limit) { return clamp_of(grad != grad ? Vec{} : grad, -limit, limit); }

// ln(x) for normal x > 0: x = m 2^e with m in [sqrt(1/2), sqrt(2)), ln(1 + f) by a polynomial in f = m - 1.
LOPT_HD Vec log_of(Vec x) {
  const IntVec bits = (IntVec)x - 0x3f3504f3;  // exponent steps at sqrt(1/2)
  const IntVec exponent = bits >> 23;
  const Vec f = (Vec)((bits & 0x007fffff) + 0x3f3504f3) - 1.0f;
  const Vec e = __builtin_convertvector(exponent, Vec);
  Vec p = splat(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const Vec square = f * f;
  const Vec value = f + (f * square * p - 0.5f * square - 2.12194440e-4f * e) + 0.693359375f * e;
  // NaN and infinity pass through; zero and subnormals do not occur (every argument has an epsilon added).
  return x - x == x - x ? value : x;
}

// exp(x): x = n ln 2 + r, a polynomial in r, times 2^n in two factors so that neither overflows early.
LOPT_HD Vec exp_of(Vec x) {
  const Vec bounded = clamp_of(x, -104.0f, 89.0f);
  const Vec shifted = bounded * 1.44269504088896341f + 12582912.0f;  // rounds to nearest: 1.5 * 2^23
  const IntVec n = (IntVec)shifted - 0x4b400000;
  const Vec whole = shifted - 12582912.0f;
  const Vec r = bounded - whole * 0.693359375f + whole * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const IntVec half = n >> 1;
  const Vec low = (Vec)((half + 127) << 23), high = (Vec)((n - half + 127) << 23);
  return x == x ? p * low * high : x;
}

// Loads and stores of `count` (1 .. kLanes) values; the lanes beyond read as zero.
LOPT_HD Vec load(const float* source, int count) {
  Vec x{};
  if (count == kLanes)
    std::memcpy(&x, source, sizeof x);
  else
    for (int i = 0; i < kLanes && i < count; ++i) x[i] = source[i];
  return x;
}

LOPT_HD void store(float* target, Vec x, int count) {
  if (count == kLanes)
    std::memcpy(target, &x, sizeof x);
  else
    for (int i = 0; i < kLanes && i < count; ++i) target[i] = x[i];
}

// bfloat16 is the upper half of a float32.
LOPT_HD Vec load(const uint16_t* source, int count) {
  IntVec x{};
  for (int i = 0; i < kLanes && i < count; ++i) x[i] = int32_t{source[i]} << 16;
  return (Vec)x;
}

LOPT_HD void store(uint16_t* target, Vec x, int count) {
  for (int i = 0; i < kLanes && i < count; ++i) {
    float value = x[i];
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    // Round to nearest even; NaN stays NaN.
    target[i] = value == value ? static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : 0x7fc0;
  }
}

// 1 in the first `count` lanes, else 0.
LOPT_HD Vec lane_mask(int count) {
  Vec mask{};
  for (int i = 0; i < kLanes; ++i) mask[i] = i < count ? 1.0f : 0.0f;
  return mask;
}

LOPT_HD double sum_lanes(Vec x) {
  double sum = 0.0;
  for (int i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
}

}  // namespace lopt
