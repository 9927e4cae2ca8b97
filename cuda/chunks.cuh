// Many tensors, one launch: which chunk a block works on, and values in the dtype of their tensor.
#pragma once

#include "launch.cuh"

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

// bfloat16 is the upper half of a float32.
union FloatBits {
  float value;
  uint32_t bits;
};

__device__ __forceinline__ float load_value(int64_t address, int32_t dtype, int64_t i) {
  if (dtype == kFloat32) return reinterpret_cast<const float*>(address)[i];
  FloatBits x;
  x.bits = uint32_t{reinterpret_cast<const uint16_t*>(address)[i]} << 16;
  return x.value;
}

// Rounds to the nearest bfloat16, ties to even; NaN stays NaN.
__device__ __forceinline__ void store_value(int64_t address, int32_t dtype, int64_t i, float value) {
  if (dtype == kFloat32) {
    reinterpret_cast<float*>(address)[i] = value;
    return;
  }
  FloatBits x;
  x.value = value;
  const uint32_t rounded = (x.bits + 0x7fff + (x.bits >> 16 & 1)) >> 16;
  reinterpret_cast<uint16_t*>(address)[i] = static_cast<uint16_t>(value == value ? rounded : 0x7fc0);
}

}  // namespace lopt
