// apply on the GPU: for every parameter
//   x      = clamp(columns(grad, param, mom, rms) * scale + shift, +-feature_clip)
//   o, h   = small_mlp(x)
//   param  = keep * param - step_size * active(rms) * o.direction * exp(magnitude_rate * o.magnitude)
// and per tensor the mean of the last hidden layer h. Here the plain kernel, the oracle of that in apply_mma.cu: one
// block per chunk, one thread per parameter and round; the weights of the MLP lie in shared memory. Source:
// arXiv:2009.11243. See Note [Order of reduction].
#include "apply.cuh"

namespace lopt {
namespace {

template <class Features, int kWidth>
struct ApplyMemory {
  Rule<Features, kWidth> rule;
  float rows[kWidth][kThreads];  // one row of hidden sums per thread, transposed: registers are dearer
};

template <Dtype kState, class Features, int kWidth>
__device__ __forceinline__ void apply_of_block(const ApplyParams& params, Rule<Features, kWidth>& rule,
                                               float (&rows)[kWidth][kThreads]) {
  const ChunkRange chunk = chunk_of_block(params.tensors, params.chunks);
  const Operands operands = operands_of(params, chunk.tensor);
  rule.load(params, operands.tensor);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) rows[j][threadIdx.x] = 0.0f;
  __syncthreads();

  for (int i = static_cast<int>(threadIdx.x); i < chunk.count; i += kThreads) {
    float hidden[kWidth];
    apply_one<kState>(params, rule, operands, chunk.begin + i, hidden);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) rows[j][threadIdx.x] += hidden[j];
  }
  reduce_hidden(params, chunk, operands.tensor, rows);
}

// Two or three blocks per multiprocessor leave 255 or 168 registers: with less, some compilers spill.
template <Dtype kState, class Features, int kWidth>
__global__ void __launch_bounds__(kThreads, (Features::kNumColumns >= 16 && kWidth >= 32) || kWidth >= 64 ? 2 : 3)
    apply_kernel(ApplyParams params) {
  if constexpr (kIsStatic<ApplyMemory<Features, kWidth>>) {
    __shared__ Rule<Features, kWidth> rule;
    __shared__ float rows[kWidth][kThreads];
    apply_of_block<kState>(params, rule, rows);
  } else {
    using All = ApplyMemory<Features, kWidth>;
    LOPT_DYNAMIC_SHARED(All, memory);
    apply_of_block<kState>(params, memory->rule, memory->rows);
  }
}

}  // namespace

#if LOPT_WITH_LAUNCHERS
template <class Features, Dtype kState>
bool launch_apply(const ApplyParams& params, int width, const Target& target) {
  return with_width(width, [&](auto width_constant) {
    constexpr int kWidth = decltype(width_constant)::value;
    launch_per_chunk<ApplyMemory<Features, kWidth>>("apply", apply_kernel<kState, Features, kWidth>, params, target);
  });
}
LOPT_INSTANTIATE(bool, launch_apply, const ApplyParams&, int, const Target&)
#endif

}  // namespace lopt
