// Numbers in memory, float32, bfloat16 or float16, that the kernels see as floats. In the namespace of the instruction set:
// of functions that are not inlined, the linker would keep one for all.
#pragma once

#include "cpu/simd.h"
// simd.h comes first: see there.
#include "api/structs.h"
#include "rule/halves.h"

namespace lopt {
namespace LOPT_ISA {
namespace {

// bfloat16 is the upper half of a float32.
inline void widen_bfloat16(const uint16_t* source, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = uint32_t{source[i]} << 16;
    std::memcpy(to + i, &bits, sizeof bits);
  }
}

// Rounds to nearest, ties to even; NaN stays NaN.
inline void narrow_bfloat16(const float* source, int64_t count, uint16_t* to) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, source + i, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to[i] = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
  }
}

#if defined(__AVX512F__)
#define LOPT_HALVES  // the processor converts kLanes of them, rounding as half_bits does
inline Vec load_halves(const uint16_t* source) {
  return (Vec)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
}
inline void store_halves(uint16_t* target, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target),
                      _mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
#define LOPT_HALVES
inline Vec load_halves(const uint16_t* source) {
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
}
inline void store_halves(uint16_t* target, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target),
                   _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#endif

inline void widen_float16(const uint16_t* source, int64_t count, float* to) {
  int64_t i = 0;
#ifdef LOPT_HALVES
  for (; i + kLanes <= count; i += kLanes) store(to + i, load_halves(source + i));
#endif
  for (; i < count; ++i) to[i] = half_value(source[i]);
}

// Rounds to nearest, ties to even, from 65520 on to infinity; NaN stays NaN.
inline void narrow_float16(const float* source, int64_t count, uint16_t* to) {
  int64_t i = 0;
#ifdef LOPT_HALVES
  for (; i + kLanes <= count; i += kLanes) store_halves(to + i, load(source + i));
#endif
  for (; i < count; ++i) to[i] = static_cast<uint16_t>(half_bits(source[i]));
}

// A place in memory.
struct Numbers {
  void* address;
  Dtype dtype = kFloat32;

  static Numbers at(int64_t address, int32_t dtype, int64_t begin) {
    return {reinterpret_cast<void*>(address + begin * (dtype == kFloat32 ? 4 : 2)), static_cast<Dtype>(dtype)};
  }

  // From `begin` on: where they are, or a copy in `buffer`.
  float* read(int64_t begin, int64_t count, float* buffer) const {
    if (dtype == kFloat32) return static_cast<float*>(address) + begin;
    const uint16_t* source = static_cast<const uint16_t*>(address) + begin;
    dtype == kBFloat16 ? widen_bfloat16(source, count, buffer) : widen_float16(source, count, buffer);
    return buffer;
  }

  // Where to write values that `write` puts there.
  float* place(int64_t begin, float* buffer) const {
    return dtype == kFloat32 ? static_cast<float*>(address) + begin : buffer;
  }

  // Puts back what `read` returned, rounded.
  void write(int64_t begin, int64_t count, const float* buffer) const {
    if (dtype == kFloat32) return;
    uint16_t* target = static_cast<uint16_t*>(address) + begin;
    dtype == kBFloat16 ? narrow_bfloat16(buffer, count, target) : narrow_float16(buffer, count, target);
  }
};

// kPlanes accumulators of a tensor, `stride` elements apart, float32 or bfloat16. The latter are seen through a buffer of
// kSpan floats for each; what is written there must be bfloat16 numbers.
template <int kPlanes, int kSpan>
struct Planes {
  Numbers numbers;  // of the first
  int64_t stride;

  // From `begin` on: where they are, or copies in `buffer` [kPlanes, kSpan].
  float* read(int64_t begin, int64_t count, float* buffer) const {
    if (numbers.dtype == kFloat32) return static_cast<float*>(numbers.address) + begin;
    const uint16_t* source = static_cast<const uint16_t*>(numbers.address) + begin;
    for (int k = 0; k < kPlanes; ++k) widen_bfloat16(source + k * stride, count, buffer + k * kSpan);
    return buffer;
  }
  int64_t step() const { return numbers.dtype == kFloat32 ? stride : kSpan; }  // between planes of what `read` returned

  // Puts back what `read` returned.
  void write(int64_t begin, int64_t count, const float* buffer) const {
    if (numbers.dtype == kFloat32) return;
    for (int k = 0; k < kPlanes; ++k) {
      uint16_t* target = static_cast<uint16_t*>(numbers.address) + k * stride + begin;
      for (int64_t i = 0; i < count; ++i) {
        uint32_t bits;
        std::memcpy(&bits, buffer + k * kSpan + i, sizeof bits);
        target[i] = static_cast<uint16_t>(bits >> 16);
      }
    }
  }
};

}  // namespace
}  // namespace LOPT_ISA
}  // namespace lopt
