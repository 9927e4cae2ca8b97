// accumulate and apply in one sweep on the GPU (Note [One sweep]), with the MLP in plain float: the oracle of that in
// sweep_mma.cu. One block per chunk, four parameters per thread and round (Note [Quads]).
#include "sweep.cuh"

namespace lopt {
namespace {

// The first of four values, which then move up.
[[maybe_unused]] __device__ __forceinline__ float pass(float (&values)[kQuad]) {
  const float first = values[0];
#pragma unroll
  for (int j = 1; j < kQuad; ++j) values[j - 1] = values[j];
  return first;
}

template <class Features, int kWidth>
struct SweepMemory {
  Rule<Features, kWidth> rule;
  StatRows<Features> stat_rows;
  float hidden_rows[kWidth][kThreads];
  WordsOf<Features> words;
};

template <Dtype kState, class Features, int kWidth>
__device__ __forceinline__ void sweep_of_block(const SweepParams& params, Rule<Features, kWidth>& rule,
                                               StatRows<Features>& stat_rows, float (&hidden_rows)[kWidth][kThreads],
                                               WordsOf<Features>& words) {
  const ApplyParams& applying = params.applying;
  const ChunkRange chunk = chunk_of_block(applying.tensors, applying.chunks);
  const Operands operands = operands_of(applying, chunk.tensor);
  const TensorEntry& tensor = operands.tensor;
  Accumulator<kState, Features> accumulator{params.accumulating, operands, words, stat_rows};
  accumulator.begin(chunk);
  rule.load(applying, tensor);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) hidden_rows[j][threadIdx.x] = 0.0f;
  __syncthreads();

  const Wide wide = operands.wide<kState>();
  for (int i = kQuad * static_cast<int>(threadIdx.x); i < chunk.count; i += kQuad * kThreads) {
    const Quad quad = quad_at(chunk, i, wide);
    QuadValues<Features> values;
    accumulator.read(quad, values);
    float next[kQuad] = {};
    // A loop that is not unrolled has no index for registers: the quad moves past it. Without the barrier the compiler
    // would load all weights before the loop, into more registers than there are.
#pragma unroll 1
    for (int j = 0; j < kQuad; ++j) {
      asm volatile("" ::: "memory");
      float mom[Features::kNumMom], rms[Features::kNumRms], hidden[kWidth];
#pragma unroll
      for (int k = 0; k < Features::kNumMom; ++k) mom[k] = pass(values.mom[k]);
#pragma unroll
      for (int k = 0; k < Features::kNumRms; ++k) rms[k] = pass(values.rms[k]);
      (void)pass(next);
      next[kQuad - 1] = next_of_one(applying, rule, operands, pass(values.grad), pass(values.param), mom, rms, hidden);
      if (j < quad.count) {
#pragma unroll
        for (int unit = 0; unit < kWidth; ++unit) hidden_rows[unit][threadIdx.x] += hidden[unit];
      }
    }
    if (operands.inputs.moves()) store_quad(operands.written, operands.written_dtype, quad, next);
  }
  accumulator.end(chunk);
  reduce_sweep<Features>(params, chunk, tensor, stat_rows, hidden_rows);
}

// Two or three blocks per multiprocessor leave 255 or 168 registers.
template <Dtype kState, class Features, int kWidth>
__global__ void __launch_bounds__(kThreads, Features::kNumColumns >= 16 || kWidth >= 32 ? 2 : 3)
    sweep_kernel(SweepParams params) {
  using All = SweepMemory<Features, kWidth>;
  if constexpr (kIsStatic<All>) {
    __shared__ Rule<Features, kWidth> rule;
    __shared__ StatRows<Features> stat_rows;
    __shared__ float hidden_rows[kWidth][kThreads];
    __shared__ WordsOf<Features> words;
    sweep_of_block<kState>(params, rule, stat_rows, hidden_rows, words);
  } else {
    LOPT_DYNAMIC_SHARED(All, memory);
    sweep_of_block<kState>(params, memory->rule, memory->stat_rows, memory->hidden_rows, memory->words);
  }
}

}  // namespace

#if LOPT_WITH_LAUNCHERS
template <class Features, Dtype kState>
bool launch_sweep(const AccumulateParams& accumulating, const ApplyParams& applying, int width, const Target& target) {
  if constexpr (kState == kInt8) {  // which has no kernels of one sweep
    launch_accumulate<Features, kState>(accumulating, target);
    return launch_apply<Features, kState>(applying, width, target);
  } else {
    return with_width(width, [&](auto width_constant) {
      constexpr int kWidth = decltype(width_constant)::value;
      launch_per_chunk<SweepMemory<Features, kWidth>>("sweep", sweep_kernel<kState, Features, kWidth>,
                                                      SweepParams{accumulating, applying, applying.num_chunks}, target);
    });
  }
}
LOPT_INSTANTIATE(bool, launch_sweep, const AccumulateParams&, const ApplyParams&, int, const Target&)
#endif

}  // namespace lopt
