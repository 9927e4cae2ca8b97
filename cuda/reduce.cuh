// Reductions in a fixed order: the same inputs give the same bits.
//
// Note [Order of reduction]
// A tensor is reduced in three levels: a thread over its parameters (float, in ascending order), a block over its threads
// (double), and the last block of a tensor over the tensor's chunks (double). Each level is a table of rows, one per
// thread or per chunk; a warp reduces one column: lane l takes rows l, l + 32, ..., and a butterfly adds the lanes. No
// sum depends on which block or warp comes first, so no float is ever added atomically.
#pragma once

#include "launch.cuh"

namespace lopt {

__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x / 32); }
__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x % 32); }

// The sum of value(0) .. value(rows - 1), in every lane of the calling warp.
template <class Value>
__device__ __forceinline__ double sum_rows(int64_t rows, Value value) {
  double sum = 0.0;
  for (int64_t row = lane_index(); row < rows; row += 32) sum += value(row);
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  return sum;
}

// The largest of all lanes of the calling warp.
__device__ __forceinline__ uint32_t max_of_warp(uint32_t value) {
#ifdef __CUDACC__
  return __reduce_max_sync(0xffffffffu, value);
#else
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, value, lanes);
    value = other > value ? other : value;
  }
  return value;
#endif
}

// Called by all threads of a block after they wrote the chunk's partials. True in the block of the tensor that comes
// last, which then sees the partials of all others; `finished` counts, and is zero before and after.
__device__ __forceinline__ bool last_of_tensor(uint32_t* finished, uint32_t num_chunks) {
  __shared__ bool last;
  __threadfence();  // partials before the count
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(finished, 1u) == num_chunks - 1;
    if (last) *finished = 0;
  }
  __syncthreads();
  if (last) __threadfence();  // the count before the partials of others
  return last;
}

}  // namespace lopt
