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

// Two or three blocks per multiprocessor leave 255 or 168 registers: with less, some compilers spill.
template <Dtype kState, class Features, int kWidth>
__global__ void __launch_bounds__(kThreads, Features::kNumColumns >= 16 && kWidth >= 32 ? 2 : 3)
    apply_kernel(ApplyParams params) {
  __shared__ Rule<Features, kWidth> rule;
  __shared__ float rows[kWidth][kThreads];  // one row of hidden sums per thread, transposed: registers are dearer

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

}  // namespace

template <class Features, Dtype kState>
bool launch_apply(const ApplyParams& params, int width, const Target& target) {
  return with_width(width, [&](auto width_constant) {
    launch_per_chunk("apply", apply_kernel<kState, Features, decltype(width_constant)::value>, params, target);
  });
}
LOPT_INSTANTIATE(bool, launch_apply, const ApplyParams&, int, const Target&)

}  // namespace lopt
