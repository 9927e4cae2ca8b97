// What the kernels of one sweep share: operands, and how a block begins and ends.
//
// Note [One sweep]
// Where what the MLP is conditioned on does not depend on this step's statistics (ThetaSpec(stats="lagged")), accumulate
// and apply need not be two: a thread updates the accumulators of a quad, stores them, and computes the new parameters
// from what it still has in registers, so that everything is read and written once. The functions are those of the two
// kernels. The row of partials that accumulate keeps in registers waits in shared memory where the MLP needs them.
#pragma once

#include "accumulate.cuh"
#include "apply.cuh"

namespace lopt {

// Of one thread: reads a quad, and makes its state that of this step.
template <Dtype kState, class Features, bool kInRegisters = false>
struct Accumulator {
  const AccumulateParams& params;
  const Operands& operands;
  WordsOf<Features>& words;  // in shared memory, as
  StatRows<Features>& rows;
  Pivots pivots{};
  bool first = true;
  float own[kInRegisters ? kNumStats<Features> : 1] = {};

  // By all threads of the block, which meet afterwards.
  __device__ __forceinline__ void begin(const ChunkRange& chunk) {
    if (kState == kBFloat16 && threadIdx.x == 0) words = words_of<Features>(params, operands.tensor, chunk);
    if (!kInRegisters) {
#pragma unroll
      for (int c = 0; c < kNumStats<Features>; ++c) rows[c][threadIdx.x] = 0.0f;
    }
  }

  __device__ __forceinline__ void read(const Quad& quad, QuadValues<Features>& values) {
    load_values<kState>(operands.tensor, operands.grads, quad, values);
    if constexpr (kInRegisters) {
      add(quad, values, own);
    } else {
      float row[kNumStats<Features>];
      get(row);
      add(quad, values, row);
      put(row);
    }
  }

  // After the last quad.
  __device__ __forceinline__ void end(const ChunkRange& chunk) {
    float row[kNumStats<Features>];
    get(row);
    finish_row<Features>(parameters_of_thread(chunk.count, static_cast<int>(threadIdx.x)), pivots, row);
    put(row);
  }

 private:
  __device__ __forceinline__ void add(const Quad& quad, QuadValues<Features>& values,
                                      float (&row)[kNumStats<Features>]) {
    accumulate_quad<kState>(params, operands.tensor, operands.grads, operands.inputs.clip_limit, words, quad, first,
                            values, pivots, row);
    first = false;
  }
  __device__ __forceinline__ void get(float (&row)[kNumStats<Features>]) const {
#pragma unroll
    for (int c = 0; c < kNumStats<Features>; ++c)
      row[c] = kInRegisters ? own[kInRegisters ? c : 0] : rows[c][threadIdx.x];
  }
  __device__ __forceinline__ void put(const float (&row)[kNumStats<Features>]) {
#pragma unroll
    for (int c = 0; c < kNumStats<Features>; ++c) rows[c][threadIdx.x] = row[c];
  }
};

// Rows of partials and of hidden units -> the tensor's statistics and mean.
template <class Features, int kWidth, int kRows>
__device__ __forceinline__ void reduce_sweep(const SweepParams& params, const ChunkRange& chunk,
                                             const TensorEntry& tensor, const StatRows<Features>& stat_rows,
                                             const float (&hidden_rows)[kWidth][kRows]) {
  __syncthreads();
  stats_of_chunk<Features>(params.accumulating, chunk, tensor, stat_rows);
  hidden_of_chunk(params.applying, chunk, tensor, hidden_rows);
  if (!last_of_tensor(params.accumulating.finished + chunk.tensor, chunk.of_tensor)) return;
  stats_of_tensor<Features>(params.accumulating, chunk, tensor);
  hidden_of_tensor<kWidth>(params.applying, chunk, tensor);
}

}  // namespace lopt
