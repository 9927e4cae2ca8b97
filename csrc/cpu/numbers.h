// Numbers in memory, float32, bfloat16, float16 or codes of 8 bits, that the kernels see as floats. In the namespace of the instruction set:
// of functions that are not inlined, the linker would keep one for all.
#pragma once

#include "cpu/simd.h"
// simd.h comes first: see there.
#include "api/structs.h"
#include "rule/codes.h"
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
    return {reinterpret_cast<void*>(address + begin * size_of(dtype)), static_cast<Dtype>(dtype)};
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

// kPlanes accumulators of a tensor, `stride` elements apart, float32, bfloat16 or, as Code says, 8 bits. The latter two are
// seen through a buffer of kSpan floats for each.
template <class Code, int kPlanes, int kSpan>
struct Planes {
  static_assert(kSpan % kCodeBlock == 0, "blocks are whole");
  using Byte = typename Code::Byte;
  Numbers numbers;  // of the first
  int64_t stride;
  uint8_t* scales = nullptr;  // of the first, where the numbers begin: at a block
  int64_t blocks = 0;         // between scales of planes

  // Of a tensor, from `begin` on, which is a multiple of kCodeBlock; `first`: planes before these in the scales.
  static Planes of(const TensorEntry& tensor, int64_t address, int first, int32_t dtype, int64_t begin) {
    const int64_t blocks = code_blocks(tensor.numel);
    uint8_t* scales = reinterpret_cast<uint8_t*>(tensor.scales + first * blocks + begin / kCodeBlock);
    return {Numbers::at(address, dtype, begin), tensor.stride, dtype == kInt8 ? scales : nullptr, blocks};
  }

  // From `begin` on: where they are, or copies in `buffer` [kPlanes, kSpan].
  float* read(int64_t begin, int64_t count, float* buffer) const {
    if (numbers.dtype == kFloat32) return static_cast<float*>(numbers.address) + begin;
    for (int k = 0; k < kPlanes; ++k) {
      if (numbers.dtype == kBFloat16)
        widen_bfloat16(static_cast<const uint16_t*>(numbers.address) + begin + k * stride, count, buffer + k * kSpan);
      else
        decode(k, begin, count, buffer + k * kSpan);
    }
    return buffer;
  }
  int64_t step() const { return numbers.dtype == kFloat32 ? stride : kSpan; }  // between planes of what `read` returned

  // Puts back what `read` returned, if that is bfloat16 numbers.
  void write(int64_t begin, int64_t count, const float* buffer) const {
    if (numbers.dtype != kBFloat16) return;
    for (int k = 0; k < kPlanes; ++k) {
      uint16_t* target = static_cast<uint16_t*>(numbers.address) + k * stride + begin;
      for (int64_t i = 0; i < count; ++i) {
        uint32_t bits;
        std::memcpy(&bits, buffer + k * kSpan + i, sizeof bits);
        target[i] = static_cast<uint16_t>(bits >> 16);
      }
    }
  }

  // Codes of what `read` returned, which is rounded to them; random(k, i): 16 bits for each number from number i on.
  template <class Random>
  void encode(int64_t begin, int64_t count, float* buffer, const Random& random) const {
    for (int k = 0; k < kPlanes; ++k) {
      for (int64_t at = 0; at < count; at += kCodeBlock) {
        const int64_t size = count - at < kCodeBlock ? count - at : kCodeBlock;
        float* values = buffer + k * kSpan + at;
        Byte* codes = static_cast<Byte*>(numbers.address) + k * stride + begin + at;
        Bits most{};
        for_vectors(size, [&](int64_t i, int lanes) LOPT_INLINE {
          const Bits magnitude = (Bits)load(values + i, lanes) & 0x7fffffffu;
          most = magnitude > most ? magnitude : most;
        });
        uint32_t largest = 0;
        for (int lane = 0; lane < kLanes; ++lane) largest = most[lane] > largest ? most[lane] : largest;
        const uint32_t scale = code_scale(largest);
        const float unit = code_unit<Code>(scale), inverse = code_inverse<Code>(scale);
        scales[k * blocks + (begin + at) / kCodeBlock] = static_cast<uint8_t>(scale);
        alignas(64) float chosen[kCodeBlock];
        for_vectors(size, [&](int64_t i, int lanes) LOPT_INLINE {
          const Vec code = encoded<Code>(load(values + i, lanes), inverse, random(k, at + i));
          store(chosen + i, code);
          store(values + i, decoded<Code>(code, unit), lanes);
        });
        for (int64_t i = 0; i < size; ++i) codes[i] = static_cast<Byte>(static_cast<int32_t>(chosen[i]));
      }
    }
  }

 private:
  void decode(int k, int64_t begin, int64_t count, float* to) const {
    const Byte* codes = static_cast<const Byte*>(numbers.address) + k * stride + begin;
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(codes[i]);
    for (int64_t at = 0; at < count; at += kCodeBlock) {
      const int64_t size = count - at < kCodeBlock ? count - at : kCodeBlock;
      const float unit = code_unit<Code>(scales[k * blocks + (begin + at) / kCodeBlock]);
      for_vectors(size, [&](int64_t i, int lanes)
                            LOPT_INLINE { store(to + at + i, decoded<Code>(load(to + at + i, lanes), unit), lanes); });
    }
  }
};

}  // namespace
}  // namespace LOPT_ISA
}  // namespace lopt
