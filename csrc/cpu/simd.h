// `Vec`: as many floats as one SIMD register of the instruction set this file is compiled for (see CMakeLists.txt), with
// the same functions that maths.h has for `float`. Include it before features.h and mlp.h: their templates must see the
// overloads. Logarithm and exponential are polynomials after Cephes' logf and expf, exact to about one ulp.
#pragma once

#include <cstring>

#include "rule/maths.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace lopt {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRegisters = 32;
#elif defined(__AVX__)
constexpr int kLanes = 8, kRegisters = 16;
#else
constexpr int kLanes = 4, kRegisters = 16;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));

LOPT_HD Vec splat(float x) { return x - Vec{}; }  // x + 0 would be an addition: it changes -0

// max_of and min_of return x where x is NaN.
#if defined(__AVX512F__)  // the forms without a mask warn in g++ 12
LOPT_HD Vec sqrt_of(Vec x) { return (Vec)_mm512_maskz_sqrt_ps(0xffff, (__m512)x); }
LOPT_HD Vec max_of(Vec x, Vec y) { return (Vec)_mm512_maskz_max_ps(0xffff, (__m512)y, (__m512)x); }
LOPT_HD Vec min_of(Vec x, Vec y) { return (Vec)_mm512_maskz_min_ps(0xffff, (__m512)y, (__m512)x); }
#elif defined(__AVX__)
LOPT_HD Vec sqrt_of(Vec x) { return (Vec)_mm256_sqrt_ps((__m256)x); }
LOPT_HD Vec max_of(Vec x, Vec y) { return (Vec)_mm256_max_ps((__m256)y, (__m256)x); }
LOPT_HD Vec min_of(Vec x, Vec y) { return (Vec)_mm256_min_ps((__m256)y, (__m256)x); }
#elif defined(__SSE2__)
LOPT_HD Vec sqrt_of(Vec x) { return (Vec)_mm_sqrt_ps((__m128)x); }
LOPT_HD Vec max_of(Vec x, Vec y) { return (Vec)_mm_max_ps((__m128)y, (__m128)x); }
LOPT_HD Vec min_of(Vec x, Vec y) { return (Vec)_mm_min_ps((__m128)y, (__m128)x); }
#else
LOPT_HD Vec sqrt_of(Vec x) {
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}
LOPT_HD Vec max_of(Vec x, Vec y) { return x < y ? y : x; }
LOPT_HD Vec min_of(Vec x, Vec y) { return x > y ? y : x; }
#endif

LOPT_HD Vec rsqrt_of(Vec x) {
#if defined(__AVX512F__)  // an estimate with an error below 2^-14, and one step of Newton's method; 0 of infinity
  const Vec y = (Vec)_mm512_maskz_rsqrt14_ps(0xffff, (__m512)x);
  const Vec error = 1.0f - (x * y) * y;
  return error == error ? y + 0.5f * y * error : y;
#else
  return 1.0f / sqrt_of(x);
#endif
}
LOPT_HD Vec reciprocal_of(Vec x) { return 1.0f / x; }
LOPT_HD Vec abs_of(Vec x) { return (Vec)((IntVec)x & 0x7fffffff); }
LOPT_HD Vec clamp_of(Vec x, float low, float high) { return min_of(max_of(x, splat(low)), splat(high)); }
LOPT_HD Vec clamp_of(Vec x, float bound) { return clamp_of(x, -bound, bound); }
LOPT_HD Vec clip_gradient(Vec grad, float limit) { return clamp_of(grad != grad ? Vec{} : grad, limit); }

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

// exp(x): x = n ln 2 + r, a polynomial in r, times 2^n, without an instruction for that in two factors so that neither
// overflows early.
LOPT_HD Vec exp_of(Vec x) {
  const Vec bounded = clamp_of(x, -104.0f, 89.0f);
  const Vec shifted = bounded * 1.44269504088896341f + 12582912.0f;  // rounds to nearest: 1.5 * 2^23
  const Vec whole = shifted - 12582912.0f;
  const Vec r = bounded - whole * 0.693359375f + whole * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)whole);
#else
  const IntVec n = (IntVec)shifted - 0x4b400000, half = n >> 1;
  const Vec low = (Vec)((half + 127) << 23), high = (Vec)((n - half + 127) << 23);
  return x == x ? p * low * high : x;
#endif
}

LOPT_HD Vec whole_of(Vec x) { return __builtin_convertvector(__builtin_convertvector(x, IntVec), Vec); }
LOPT_HD Vec number_of(Bits x) { return __builtin_convertvector(x, Vec); }

// The third or sixth root of x >= 0, to .3 percent: a third of the exponent, and a step of Newton's method.
template <int kPower>
LOPT_HD Vec root_estimate(Vec x) {
  static_assert(kPower == 3 || kPower == 6, "a cube root, perhaps of a square root");
  if (kPower == 6) x = sqrt_of(x);
  const Vec third = __builtin_convertvector((IntVec)x, Vec) * (1.0f / 3.0f) + 709921077.0f;
  const Vec y = (Vec) __builtin_convertvector(third, IntVec);
  return (y + y + x / (y * y)) * (1.0f / 3.0f);
}

LOPT_HD Vec load(const float* source) {
  Vec x;
  std::memcpy(&x, source, sizeof x);
  return x;
}

LOPT_HD void store(float* target, Vec x) { std::memcpy(target, &x, sizeof x); }

// The first `count` (1 .. kLanes) values; the lanes beyond read as zero.
LOPT_HD Vec load(const float* source, int count) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_loadu_ps(static_cast<__mmask16>(0xffff >> (kLanes - count)), source);
#else
  if (count == kLanes) return load(source);
  Vec x{};
  for (int i = 0; i < kLanes && i < count; ++i) x[i] = source[i];
  return x;
#endif
}

LOPT_HD void store(float* target, Vec x, int count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(target, static_cast<__mmask16>(0xffff >> (kLanes - count)), (__m512)x);
#else
  if (count == kLanes) return store(target, x);
  for (int i = 0; i < kLanes && i < count; ++i) target[i] = x[i];
#endif
}

// 1 in the first `count` lanes, else 0.
LOPT_HD Vec lane_mask(int count) {
  IntVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < count ? splat(1.0f) : Vec{};
}

// first, first + 1, ...
LOPT_HD Bits count_from(uint32_t first) {
  Bits lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = static_cast<uint32_t>(i);
  return lane + first;
}

// f(begin, lanes) for all vectors of `count` values; `lanes` is kLanes but for a rest at the end.
template <class Function>
LOPT_HD void for_vectors(int64_t count, const Function& f) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) f(i, kLanes);
  if (i < count) f(i, static_cast<int>(count - i));
}

template <int kCount>
struct Doubles {
  typedef double Type __attribute__((vector_size(8 * kCount)));
};

LOPT_HD double sum_of(const Doubles<2>::Type& x) { return x[0] + x[1]; }

template <class V>
LOPT_HD double sum_of(const V& x) {
  typename Doubles<sizeof(V) / 16>::Type half[2];
  std::memcpy(half, &x, sizeof x);
  return sum_of(half[0] + half[1]);
}

LOPT_HD double sum_lanes(Vec x) { return sum_of(__builtin_convertvector(x, Doubles<kLanes>::Type)); }

// `count` rounded up to whole vectors.
LOPT_HD int64_t padded(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

}  // namespace lopt
