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

constexpr float kLargestFloat = 3.402823466e38f;

LOPT_HD float abs_of(float x) { return ::fabsf(x); }

// ---- Logarithm, exponential and root of one parameter -------------------------------------------------------------------
// On the GPU they are estimates of one instruction, for what is computed of each parameter; the tensor level calls the
// library. Arguments of log_of and rsqrt_of are normal numbers (an epsilon was added), infinity or NaN.
//   log2_estimate   off by at most 2^-22, or 2^-22 of itself where x is outside of (.5, 2)
//   exp2_estimate   off by at most two units in the last place; what would be subnormal is 0
//   rsqrt_estimate  off by at most 2^-22.9 of itself
// as the PTX ISA says. `sim` takes the true value and makes it as wrong as that, up or down by a hash of the argument.
#if defined(__CUDA_ARCH__)
LOPT_HD float log2_estimate(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
LOPT_HD float exp2_estimate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
LOPT_HD float rsqrt_estimate(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#elif defined(LOPT_ESTIMATES)
inline float wrong_by(double value, double error, float argument) {
  uint32_t bits;
  std::memcpy(&bits, &argument, sizeof bits);
  return static_cast<float>(bits * 0x9e3779b9u >> 31 ? value + error : value - error);
}
inline float log2_estimate(float x) {
  const double y = ::log2(static_cast<double>(x));
  return y - y == 0 ? wrong_by(y, x > 0.5f && x < 2.0f ? 0x1p-22 : ::fabs(y) * 0x1p-22, x) : static_cast<float>(y);
}
inline float exp2_estimate(float x) {
  const double y = ::exp2(static_cast<double>(x));
  if (!(y >= 0x1p-126 && y < 0x1p128)) return y < 1.0 ? 0.0f : static_cast<float>(y);
  return wrong_by(y, ::exp2(::floor(static_cast<double>(x)) - 22.0), x);
}
inline float rsqrt_estimate(float x) {
  const double y = 1.0 / ::sqrt(static_cast<double>(x));
  return wrong_by(y, y * 0x1.12p-23, x);
}
#endif

#if defined(__CUDA_ARCH__) || defined(LOPT_ESTIMATES)
// Off by at most 2.5 * 2^-23, or of itself where x is outside of (.5, 2).
LOPT_HD float log_of(float x) { return log2_estimate(x) * 0.693147180559945309f; }
// Off by at most (2 + .62 |x|) * 2^-23 of itself.
LOPT_HD float exp_of(float x) { return exp2_estimate(x * 1.44269504088896341f); }
// Off by at most 1.1 * 2^-23 of itself.
LOPT_HD float rsqrt_of(float x) { return rsqrt_estimate(x); }
#else
LOPT_HD float log_of(float x) { return ::logf(x); }
LOPT_HD float exp_of(float x) { return ::expf(x); }
LOPT_HD float rsqrt_of(float x) { return 1.0f / ::sqrtf(x); }
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
