// Many tensors, one launch: which chunk a block works on, and a thread's four parameters in and out of registers.
//
// Note [Quads]
// A thread handles four consecutive parameters, a quad. Of operands whose addresses allow it, a quad moves in one access of
// 16 bytes (8 for bfloat16 and float16, 4 for codes of 8 bits), a warp's neighbouring quads in full sectors; of others, and at the end of a
// tensor, value by value. Every load of a quad is issued before the first value is used: `load_raw` and `decode` are
// two steps because widening a value would already wait for it. __ldcg and __stcg pass by the first-level cache, which
// holds nothing that is used twice, and say that an address out of a table is one of global memory.
#pragma once

#include "halves.cuh"
#include "reduce.cuh"
#include "rule/codes.h"

namespace lopt {

__device__ __forceinline__ int64_t min_of(int64_t x, int64_t y) { return x < y ? x : y; }

struct ChunkRange {
  int64_t tensor;      // row of the tensor table
  int64_t begin;       // first parameter
  int count;           // parameters, 1 .. kChunk
  uint32_t of_tensor;  // chunks of the tensor
};

__device__ __forceinline__ ChunkRange chunk_of_block(const TensorEntry* tensors, const Chunk* chunks) {
  const Chunk chunk = chunks[blockIdx.x];
  const int64_t numel = tensors[chunk.tensor].numel;
  return {chunk.tensor, chunk.begin, static_cast<int>(min_of(numel - chunk.begin, kChunk)),
          static_cast<uint32_t>((numel + kChunk - 1) / kChunk)};
}

// Partials of a tensor, [kColumns, chunks of the tensor]: its last block reads those of a column at neighbouring addresses.
template <int kColumns>
struct Partials {
  double* of;
  int64_t chunks, chunk;  // of the tensor, and this block's

  __device__ __forceinline__ Partials(double* partials, const TensorEntry& tensor, const ChunkRange& range)
      : of(partials + tensor.first_chunk * kColumns), chunks(range.of_tensor), chunk(range.begin / kChunk) {}
  __device__ __forceinline__ double& own(int column) const { return of[column * chunks + chunk]; }
  __device__ __forceinline__ double at(int column, int64_t r) const { return of[column * chunks + r]; }
};

union FloatBits {
  float value;
  uint32_t bits;
};

__device__ __forceinline__ uint32_t float_bits(float value) {
  FloatBits x;
  x.value = value;
  return x.bits;
}
__device__ __forceinline__ float bits_float(uint32_t bits) {
  FloatBits x;
  x.bits = bits;
  return x.value;
}

// bfloat16 is the upper half of a float32.
__device__ __forceinline__ float load_value(int64_t address, int32_t dtype, int64_t i) {
  if (dtype == kFloat32) return __ldcg(reinterpret_cast<const float*>(address) + i);
  const uint32_t bits = __ldcg(reinterpret_cast<const uint16_t*>(address) + i);
  if (dtype == kBFloat16) return bits_float(bits << 16);
  float value, zero;
  unpack_halves(bits, value, zero);
  return value;
}

// Two values rounded to the nearest bfloat16 or float16, ties to even, the second in the upper 16 bits; NaN stays NaN.
__device__ __forceinline__ uint32_t narrow_pair(int32_t dtype, float x, float y) {
  return dtype == kBFloat16 ? pack_bfloat16(x, y) : pack_halves<false>(x, y);
}

__device__ __forceinline__ void store_value(int64_t address, int32_t dtype, int64_t i, float value) {
  if (dtype == kFloat32)
    __stcg(reinterpret_cast<float*>(address) + i, value);
  else
    __stcg(reinterpret_cast<uint16_t*>(address) + i, static_cast<uint16_t>(narrow_pair(dtype, value, 0.0f)));
}

// ---- Quads -----------------------------------------------------------------------------------------------------------

constexpr int kQuad = 4;

// Which operands of a tensor move in whole quads, those with aligned addresses, as chunks begin at multiples of a quad; and
// whether all do, of float32 parameters and gradients.
enum Wide : int { kNoneWide = 0, kWideParam = 1, kWideGrad = 2, kWideState = 4, kWideWritten = 8, kWidePlain = 16 };

// Written is what apply writes, or 0.
template <Dtype kState>
__device__ __forceinline__ Wide wide_operands(const TensorEntry& tensor, int64_t grads, int64_t written,
                                              int32_t written_dtype) {
  const auto aligned = [](int64_t address, int32_t dtype) { return address % (kQuad * size_of(dtype)) == 0; };
  const int wide = kWideParam * aligned(tensor.param, tensor.param_dtype) |
                   kWideGrad * aligned(grads, tensor.grad_dtype) |
                   kWideState * (aligned(tensor.mom | tensor.rms, kState) && tensor.stride % kQuad == 0) |
                   kWideWritten * aligned(written, written_dtype);
  const bool plain = wide == kWidePlain - 1 && (tensor.param_dtype | tensor.grad_dtype) == kFloat32;
  return static_cast<Wide>(wide | kWidePlain * plain);
}

struct Quad {
  int64_t at;  // first parameter
  int count;   // 4, fewer at the end of a chunk, or none
  Wide wide;   // none, if it is not whole
};

__device__ __forceinline__ Quad quad_at(const ChunkRange& chunk, int i, Wide wide) {
  const int left = chunk.count - i, count = left < 0 ? 0 : left < kQuad ? left : kQuad;
  return {chunk.begin + i, count, count == kQuad ? wide : kNoneWide};
}

// A quad as it lies in memory: a float32 in each word, or two bfloat16 or float16 in each of the first two.
struct RawQuad {
  uint32_t words[kQuad];
};

__device__ __forceinline__ RawQuad load_wide(int64_t address, int32_t dtype, int64_t at) {
  if (dtype == kFloat32) {
    const uint4 four = __ldcg(reinterpret_cast<const uint4*>(reinterpret_cast<const uint32_t*>(address) + at));
    return {{four.x, four.y, four.z, four.w}};
  }
  const uint2 four = __ldcg(reinterpret_cast<const uint2*>(reinterpret_cast<const uint16_t*>(address) + at));
  return {{four.x, four.y, 0, 0}};
}

// Zero where the quad has no parameter.
__device__ __forceinline__ RawQuad load_narrow(int64_t address, int32_t dtype, const Quad& quad) {
  RawQuad raw{};
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    if (dtype == kFloat32)
      raw.words[j] = j < quad.count ? __ldcg(reinterpret_cast<const uint32_t*>(address) + quad.at + j) : 0;
    else if (j < quad.count)
      raw.words[j / 2] |= uint32_t{__ldcg(reinterpret_cast<const uint16_t*>(address) + quad.at + j)} << 16 * (j % 2);
  }
  return raw;
}

__device__ __forceinline__ RawQuad load_raw(int64_t address, int32_t dtype, const Quad& quad, bool wide) {
  return wide ? load_wide(address, dtype, quad.at) : load_narrow(address, dtype, quad);
}

// Of float32 and bfloat16.
__device__ __forceinline__ void decode(const RawQuad& raw, int32_t dtype, float* values) {
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    const uint32_t pair = raw.words[j / 2];
    values[j] = bits_float(dtype == kFloat32 ? raw.words[j] : j % 2 ? pair & 0xffff0000u : pair << 16);
  }
}

// Of float16; of others nothing.
__device__ __forceinline__ void decode_halves(const RawQuad& raw, int32_t dtype, float* values) {
  if (dtype != kFloat16) return;
  unpack_halves(raw.words[0], values[0], values[1]);
  unpack_halves(raw.words[1], values[2], values[3]);
}

__device__ __forceinline__ void store_quad(int64_t address, int32_t dtype, const Quad& quad, const float* values) {
  if (!(quad.wide & kWideWritten)) {
#pragma unroll
    for (int j = 0; j < kQuad; ++j)
      if (j < quad.count) store_value(address, dtype, quad.at + j, values[j]);
  } else if (dtype == kFloat32) {
    float* to = reinterpret_cast<float*>(address) + quad.at;
    __stcg(reinterpret_cast<float4*>(to), {values[0], values[1], values[2], values[3]});
  } else {
    uint16_t* to = reinterpret_cast<uint16_t*>(address) + quad.at;
    __stcg(reinterpret_cast<uint2*>(to),
           {narrow_pair(dtype, values[0], values[1]), narrow_pair(dtype, values[2], values[3])});
  }
}

// ---- Quads of all accumulators --------------------------------------------------------------------------------------

template <Dtype kState>
__device__ __forceinline__ int64_t plane_at(int64_t address, int64_t stride, int k) {
  return address + k * stride * size_of(kState);
}

// Planes of accumulators of a tensor: momenta or second moments. A state of 8 bits also has a scale for each block.
template <Dtype kState, class Code, int kPlanes>
struct Planes {
  int64_t address, stride, blocks;
  uint8_t* scales;

  // `first`: planes before these in the scales.
  __device__ __forceinline__ Planes(const TensorEntry& tensor, int64_t address, int first)
      : address(address),
        stride(tensor.stride),
        blocks(code_blocks(tensor.numel)),
        scales(reinterpret_cast<uint8_t*>(tensor.scales) + first * blocks) {}

  __device__ __forceinline__ uint8_t* scale_at(int k, int64_t at) const {
    return scales + k * blocks + at / kCodeBlock;
  }

  // The number of one parameter.
  __device__ __forceinline__ float value(int k, int64_t at) const {
    if constexpr (kState == kInt8) {
      const auto code = __ldcg(reinterpret_cast<const typename Code::Byte*>(address) + k * stride + at);
      return decoded<Code>(static_cast<float>(code), code_unit<Code>(__ldcg(scale_at(k, at))));
    } else {
      return load_value(plane_at<kState>(address, stride, k), kState, at);
    }
  }

  // A quad of every plane, as `decode` wants it, so that all loads are under way before the first value is used; zero where it
  // has no parameter.
  __device__ __forceinline__ void load(const Quad& quad, bool wide, float (&values)[kPlanes][kQuad]) const {
    if constexpr (kState == kFloat32) {
      const float* from = reinterpret_cast<const float*>(address) + quad.at;
      if (wide) {
#pragma unroll
        for (int k = 0; k < kPlanes; ++k) {
          const float4 four = __ldcg(reinterpret_cast<const float4*>(from + k * stride));
          values[k][0] = four.x, values[k][1] = four.y, values[k][2] = four.z, values[k][3] = four.w;
        }
        return;
      }
#pragma unroll
      for (int k = 0; k < kPlanes; ++k)
#pragma unroll
        for (int j = 0; j < kQuad; ++j) values[k][j] = j < quad.count ? __ldcg(from + k * stride + j) : 0.0f;
    } else if constexpr (kState == kBFloat16) {  // two in a word
      const uint16_t* from = reinterpret_cast<const uint16_t*>(address) + quad.at;
      if (wide) {
#pragma unroll
        for (int k = 0; k < kPlanes; ++k) {
          const uint2 four = __ldcg(reinterpret_cast<const uint2*>(from + k * stride));
          values[k][0] = bits_float(four.x), values[k][1] = bits_float(four.y);
        }
        return;
      }
#pragma unroll
      for (int k = 0; k < kPlanes; ++k)
#pragma unroll
        for (int i = 0; i < kQuad / 2; ++i) {
          const uint32_t low = 2 * i < quad.count ? __ldcg(from + k * stride + 2 * i) : 0;
          const uint32_t high = 2 * i + 1 < quad.count ? __ldcg(from + k * stride + 2 * i + 1) : 0;
          values[k][i] = bits_float(low | high << 16);
        }
    } else {  // four in a word, and the scale
      const uint8_t* from = reinterpret_cast<const uint8_t*>(address) + quad.at;
#pragma unroll
      for (int k = 0; k < kPlanes; ++k) {
        uint32_t codes = 0;
        if (wide) {
          codes = __ldcg(reinterpret_cast<const uint32_t*>(from + k * stride));
        } else {
#pragma unroll
          for (int j = 0; j < kQuad; ++j)
            if (j < quad.count) codes |= uint32_t{__ldcg(from + k * stride + j)} << 8 * j;
        }
        values[k][0] = bits_float(codes);
        values[k][1] = bits_float(quad.count > 0 ? __ldcg(scale_at(k, quad.at)) : 0);
      }
    }
  }

  __device__ __forceinline__ void decode(float (&values)[kPlanes][kQuad]) const {
    if constexpr (kState != kFloat32) {
#pragma unroll
      for (int k = 0; k < kPlanes; ++k) {
        const uint32_t words[2] = {float_bits(values[k][0]), float_bits(values[k][1])};
#pragma unroll
        for (int j = 0; j < kQuad; ++j) {
          if constexpr (kState == kBFloat16) {
            values[k][j] = bits_float(j % 2 ? words[j / 2] & 0xffff0000u : words[j / 2] << 16);
          } else {
            const auto code = static_cast<typename Code::Byte>(words[0] >> 8 * j);
            values[k][j] = decoded<Code>(static_cast<float>(code), code_unit<Code>(words[1]));
          }
        }
      }
    }
  }

  // What has 8 bits is stored as it is encoded; for a bfloat16 state, the values must be bfloat16 numbers.
  __device__ __forceinline__ void store(const Quad& quad, const float (&values)[kPlanes][kQuad]) const {
    if constexpr (kState == kFloat32) {
      float* to = reinterpret_cast<float*>(address) + quad.at;
      if (quad.wide & kWideState) {
#pragma unroll
        for (int k = 0; k < kPlanes; ++k)
          __stcg(reinterpret_cast<float4*>(to + k * stride), {values[k][0], values[k][1], values[k][2], values[k][3]});
        return;
      }
#pragma unroll
      for (int k = 0; k < kPlanes; ++k)
#pragma unroll
        for (int j = 0; j < kQuad; ++j)
          if (j < quad.count) __stcg(to + k * stride + j, values[k][j]);
    } else if constexpr (kState == kBFloat16) {
      uint16_t* to = reinterpret_cast<uint16_t*>(address) + quad.at;
      if (quad.wide & kWideState) {
#pragma unroll
        for (int k = 0; k < kPlanes; ++k)
          __stcg(reinterpret_cast<uint2*>(to + k * stride),
                 {float_bits(values[k][0]) >> 16 | float_bits(values[k][1]),
                  float_bits(values[k][2]) >> 16 | float_bits(values[k][3])});
        return;
      }
#pragma unroll
      for (int k = 0; k < kPlanes; ++k)
#pragma unroll
        for (int j = 0; j < kQuad; ++j)
          if (j < quad.count) __stcg(to + k * stride + j, static_cast<uint16_t>(float_bits(values[k][j]) >> 16));
    }
  }

  // Codes of a warp's 128 parameters, stored with their scales; values become the numbers that these are. By all lanes, each
  // with its next quad, in order; hash: of its parameters.
  template <class Words>
  __device__ __forceinline__ void encode(const Quad& quad, const Words& words, int first, const uint32_t (&hash)[kQuad],
                                         float (&values)[kPlanes][kQuad]) const {
    uint8_t* to = reinterpret_cast<uint8_t*>(address) + quad.at;
#pragma unroll
    for (int k = 0; k < kPlanes; ++k) {
      uint32_t largest = 0;
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        const uint32_t magnitude = float_bits(values[k][j]) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
      }
      const uint32_t scale = code_scale(max_of_warp(largest));
      const float unit = code_unit<Code>(scale), inverse = code_inverse<Code>(scale);
      uint32_t codes = 0;
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        const float code = encoded<Code>(values[k][j], inverse, words.bits(first + k, hash[j]));
        values[k][j] = decoded<Code>(code, unit);
        codes |= (static_cast<uint32_t>(static_cast<int32_t>(code)) & 0xffu) << 8 * j;
      }
      if (quad.wide & kWideState) {
        __stcg(reinterpret_cast<uint32_t*>(to + k * stride), codes);
      } else {
#pragma unroll
        for (int j = 0; j < kQuad; ++j)
          if (j < quad.count) __stcg(to + k * stride + j, static_cast<uint8_t>(codes >> 8 * j));
      }
      if (quad.count > 0 && quad.at % kCodeBlock == 0) __stcg(scale_at(k, quad.at), static_cast<uint8_t>(scale));
    }
  }
};
template <Dtype kState, class Features>
using MomPlanes = Planes<kState, MomCode, Features::kNumMom>;
template <Dtype kState, class Features>
using RmsPlanes = Planes<kState, RmsCode, Features::kNumRms>;

template <Dtype kState, class Features>
__device__ __forceinline__ MomPlanes<kState, Features> mom_of(const TensorEntry& tensor) {
  return {tensor, tensor.mom, 0};
}
template <Dtype kState, class Features>
__device__ __forceinline__ RmsPlanes<kState, Features> rms_of(const TensorEntry& tensor) {
  return {tensor, tensor.rms, Features::kNumMom};
}

// Four parameters with all that belongs to them.
template <class Features>
struct QuadValues {
  float param[kQuad], grad[kQuad], mom[Features::kNumMom][kQuad], rms[Features::kNumRms][kQuad];
};

template <Dtype kState, class Features>
__device__ __forceinline__ void load_values(const TensorEntry& tensor, int64_t grads, const Quad& quad,
                                            QuadValues<Features>& values) {
  const auto mom = mom_of<kState, Features>(tensor);
  const auto rms = rms_of<kState, Features>(tensor);
  if (quad.wide & kWidePlain) {  // most often: one branch for all
    mom.load(quad, true, values.mom);
    rms.load(quad, true, values.rms);
    const RawQuad raw_param = load_wide(tensor.param, kFloat32, quad.at),
                  raw_grad = load_wide(grads, kFloat32, quad.at);
    decode(raw_param, kFloat32, values.param);
    decode(raw_grad, kFloat32, values.grad);
  } else {
    mom.load(quad, quad.wide & kWideState, values.mom);
    rms.load(quad, quad.wide & kWideState, values.rms);
    const RawQuad raw_param = load_raw(tensor.param, tensor.param_dtype, quad, quad.wide & kWideParam);
    const RawQuad raw_grad = load_raw(grads, tensor.grad_dtype, quad, quad.wide & kWideGrad);
    decode(raw_param, tensor.param_dtype, values.param);
    decode(raw_grad, tensor.grad_dtype, values.grad);
    if ((tensor.param_dtype | tensor.grad_dtype) & kFloat16) {  // a branch that others jump over
      decode_halves(raw_param, tensor.param_dtype, values.param);
      decode_halves(raw_grad, tensor.grad_dtype, values.grad);
    }
  }
  mom.decode(values.mom);
  rms.decode(values.rms);
}

}  // namespace lopt
