// Scalar maths shared by host and device code: one overload set, so that the formulas of features.h and mlp.h can be
// written once for `float` (CUDA thread, plain CPU) and for SIMD vectors (simd.h adds the overloads for `Vec`).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define LOPT_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define LOPT_HD inline __attribute__((always_inline))
#else
#define LOPT_HD inline
#endif

#define LOPT_INLINE __attribute__((always_inline))  // of a lambda, after its parameters

#if defined(__CUDACC__)
#define LOPT_UNROLL _Pragma("unroll")
#elif defined(__GNUC__) && !defined(__clang__)
#define LOPT_UNROLL _Pragma("GCC unroll 64")
#elif defined(__clang__)
#define LOPT_UNROLL _Pragma("unroll")
#else
#define LOPT_UNROLL
#endif

// Unrolled on the GPU only, where an array that a loop indexes would otherwise leave the registers.
#if defined(__CUDACC__)
#define LOPT_UNROLL_ON_DEVICE _Pragma("unroll")
#else
#define LOPT_UNROLL_ON_DEVICE
#endif

// enum Name { items, kCount }, and Name ## Names: the items as one string, which Python compares with its own.
#define LOPT_ENUM(Name, kCount, ...) \
  enum Name { __VA_ARGS__, kCount }; \
  static constexpr const char* Name##Names = #__VA_ARGS__

namespace lopt {

constexpr float kLargestFloat = 3.402823466e38f, kLog2 = 0.693147180559945309f, kLog2E = 1.44269504088896341f;

LOPT_HD float abs_of(float x) { return ::fabsf(x); }

// ---- Logarithm, exponential and roots of one parameter -----------------------------------------------------------------
// On the GPU they come from estimates of one instruction, for what is computed of each parameter; the tensor level calls the
// library. The estimates are off by at most
//   log2_estimate        2^-22, or 2^-22 of themselves where x is outside of (.5, 2)
//   exp2_estimate        two units in the last place; what would be subnormal is 0
//   rsqrt_estimate       2^-22.9 of themselves
//   reciprocal_estimate  one unit in the last place
// as the PTX ISA says. `sim` takes the true value and makes it as wrong as that, up or down by a hash of the argument.
#if defined(__CUDACC__)
__device__ __forceinline__ float log2_estimate(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float exp2_estimate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float rsqrt_estimate(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_estimate(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#elif defined(LOPT_ESTIMATES)
// The float farthest from value within an error, on one side of it.
inline float wrong_by(double value, double error, float argument) {
  uint32_t bits;
  std::memcpy(&bits, &argument, sizeof bits);
  const float wrong = static_cast<float>(bits * 0x9e3779b9u >> 31 ? value + error : value - error);
  return ::fabs(wrong - value) > error ? ::nextafterf(wrong, static_cast<float>(value)) : wrong;
}
inline double last_place(double value) { return ::exp2(::floor(::log2(::fabs(value))) - 23.0); }
inline float log2_estimate(float x) {
  const double y = ::log2(static_cast<double>(x));
  return y - y == 0 ? wrong_by(y, x > 0.5f && x < 2.0f ? 0x1p-22 : ::fabs(y) * 0x1p-22, x) : static_cast<float>(y);
}
inline float exp2_estimate(float x) {
  const double y = ::exp2(static_cast<double>(x));
  if (!(y >= 0x1p-126 && y < 0x1p128)) return y < 1.0 ? 0.0f : static_cast<float>(y);
  return x == 0.0f ? 1.0f : wrong_by(y, 2.0 * last_place(y), x);
}
inline float rsqrt_estimate(float x) {
  const double y = 1.0 / ::sqrt(static_cast<double>(x));
  return wrong_by(y, y * ::exp2(-22.9), x);
}
inline float reciprocal_estimate(float x) {
  const double y = 1.0 / static_cast<double>(x);
  return y - y == 0 && y != 0 ? wrong_by(y, last_place(y), x) : static_cast<float>(y);
}
#endif

// Of normal numbers: an epsilon was added.
#if defined(__CUDA_ARCH__) || defined(LOPT_ESTIMATES)
// log(x) = e log(2) + log(m) with m = x 2^-e in [sqrt(1/2), sqrt(2)), where the estimate's error is absolute: off by at most
// 1.6 * 2^-23 and a unit in the last place. Of infinity and NaN it is some number.
LOPT_HD float log_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const int32_t exponent = (bits - 0x3f3504f3) & static_cast<int32_t>(0xff800000u), mantissa = bits - exponent;
  float m;
  std::memcpy(&m, &mantissa, sizeof m);
  return static_cast<float>(exponent) * (kLog2 * 0x1p-23f) + log2_estimate(m) * kLog2;
}
// Off by at most (2 + .62 |x|) * 2^-23 of itself.
LOPT_HD float exp_of(float x) { return exp2_estimate(x * kLog2E); }
LOPT_HD float rsqrt_of(float x) { return rsqrt_estimate(x); }
LOPT_HD float reciprocal_of(float x) { return reciprocal_estimate(x); }
// Of x >= 0; what is subnormal is about 0.
LOPT_HD float sqrt_of(float x) { return x * rsqrt_estimate(x < 0x1p-126f ? 0x1p-126f : x); }
#else
LOPT_HD float log_of(float x) { return ::logf(x); }
LOPT_HD float exp_of(float x) { return ::expf(x); }
LOPT_HD float rsqrt_of(float x) { return 1.0f / ::sqrtf(x); }
LOPT_HD float reciprocal_of(float x) { return 1.0f / x; }
LOPT_HD float sqrt_of(float x) { return ::sqrtf(x); }
#endif

// A root, to .3 percent.
template <int kPower>
LOPT_HD float root_estimate(float x) {
#if defined(__CUDA_ARCH__) || defined(LOPT_ESTIMATES)
  return exp2_estimate(log2_estimate(x) * (1.0f / kPower));
#else
  return ::powf(x, 1.0f / kPower);
#endif
}
LOPT_HD float whole_of(float x) { return ::truncf(x); }
LOPT_HD float number_of(uint32_t x) { return static_cast<float>(x); }

#if defined(__CUDACC__) || defined(LOPT_ESTIMATES)
// A float with rough logarithms, for columns that are rounded to 11 bits: off by at most 2.5 * 2^-23, or of itself where x
// is outside of (.5, 2).
struct Rough {
  float value;
  LOPT_HD Rough(float x = 0.0f) : value(x) {}
};
LOPT_HD Rough operator+(Rough x, Rough y) { return x.value + y.value; }
LOPT_HD Rough operator-(Rough x, Rough y) { return x.value - y.value; }
LOPT_HD Rough operator*(Rough x, Rough y) { return x.value * y.value; }
LOPT_HD Rough operator/(Rough x, Rough y) { return x.value / y.value; }
LOPT_HD Rough operator-(Rough x) { return -x.value; }
LOPT_HD Rough abs_of(Rough x) { return abs_of(x.value); }
LOPT_HD Rough rsqrt_of(Rough x) { return rsqrt_of(x.value); }
LOPT_HD Rough exp_of(Rough x) { return exp_of(x.value); }
LOPT_HD Rough log_of(Rough x) {
#if defined(__CUDA_ARCH__) || defined(LOPT_ESTIMATES)
  return log2_estimate(x.value) * kLog2;
#else
  return ::logf(x.value);
#endif
}
#endif

// ---- Bounds; NaN stays NaN -------------------------------------------------------------------------------------------

#ifdef __CUDA_ARCH__
LOPT_HD float max_of(float x, float y) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(x), "f"(y));
  return larger;
}
LOPT_HD float clamp_of(float x, float low, float high) {
  float clamped;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(clamped) : "f"(max_of(x, low)), "f"(high));
  return clamped;
}
#else
LOPT_HD float max_of(float x, float y) { return x < y ? y : x; }
// Both comparisons are false of NaN.
LOPT_HD float clamp_of(float x, float low, float high) { return x < low ? low : (x > high ? high : x); }
#endif

#if defined(__CUDACC__) || defined(LOPT_ESTIMATES)
LOPT_HD Rough max_of(Rough x, Rough y) { return max_of(x.value, y.value); }
#endif

// To +-bound, which is not negative.
LOPT_HD float clamp_of(float x, float bound) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 860  // the sign of x and the smaller of the magnitudes, at once
  float clamped;
  asm("min.NaN.xorsign.abs.f32 %0, %1, %2;" : "=f"(clamped) : "f"(x), "f"(bound));
  return clamped;
#else
  return clamp_of(x, -bound, bound);
#endif
}

// The gradient every formula sees: NaN counts as zero, +-Inf as the clip limit.
LOPT_HD float clip_gradient(float grad, float limit) { return grad != grad ? 0.0f : clamp_of(grad, limit); }

}  // namespace lopt
