// Scalar maths shared by host and device code: one overload set, so that the formulas of features.h and mlp.h can be
// written once for `float` (CUDA thread, plain CPU) and for SIMD vectors (simd.h adds the overloads for `Vec`).
#pragma once

#include <cmath>
#include <cstdint>

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

LOPT_HD float log_of(float x) { return ::logf(x); }
LOPT_HD float exp_of(float x) { return ::expf(x); }
LOPT_HD float abs_of(float x) { return ::fabsf(x); }
#ifdef __CUDA_ARCH__  // in a fifth of the instructions
// One Newton step makes the hardware's estimate as exact as 1 / sqrtf(x); x > 0.
LOPT_HD float rsqrt_of(float x) {
  const float estimate = ::rsqrtf(x);
  const float error = ::fmaf(::fminf(x, 3.402823466e38f) * estimate, -estimate, 1.0f);
  return ::fmaf(0.5f * estimate, error, estimate);
}
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
LOPT_HD float rsqrt_of(float x) { return 1.0f / ::sqrtf(x); }
LOPT_HD float max_of(float x, float y) { return x < y ? y : x; }
// NaN stays NaN: both comparisons are false.
LOPT_HD float clamp_of(float x, float low, float high) { return x < low ? low : (x > high ? high : x); }
#endif

// The gradient every formula sees: NaN counts as zero, +-Inf as the clip limit.
LOPT_HD float clip_gradient(float grad, float limit) { return grad != grad ? 0.0f : clamp_of(grad, -limit, limit); }

}  // namespace lopt
