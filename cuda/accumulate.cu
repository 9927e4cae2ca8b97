// accumulate on the GPU: for every parameter
//   grad  = clamp(grad, +-limit)
//   mom_k = d_k mom_k + (1 - d_k) grad,  rms_k = d_k rms_k + (1 - d_k) grad^2
// (a narrow state rounded at once, rounding.h, codes.h) and per tensor the statistics of stats.h. One block per chunk, four
// parameters per thread and round (Note [Quads]).
// Source: arXiv:2009.11243; moments are merged after Chan, Golub and LeVeque (1979). See Note [Order of reduction].
#include "accumulate.cuh"

namespace lopt {
namespace {

// Three or four blocks per multiprocessor leave 168 or 128 registers: enough loads in flight, and nothing spills.
template <Dtype kState, class Features>
__global__ void __launch_bounds__(kThreads, Features::kNumMom + Features::kNumRms > 5 ? 3 : 4)
    accumulate_kernel(AccumulateParams params) {
  constexpr int kStats = kNumStats<Features>;
  __shared__ StatRows<Features> rows;
  __shared__ WordsOf<Features> words;

  const ChunkRange chunk = chunk_of_block(params.tensors, params.chunks);
  const TensorEntry tensor = params.tensors[chunk.tensor];
  const int64_t grads = params.grads[chunk.tensor];
  const float limit = params.clip_limit[tensor.row];
  if (kState != kFloat32) {
    if (threadIdx.x == 0) words = words_of<Features>(params, tensor, chunk);
    __syncthreads();
  }

  const Wide wide = wide_operands<kState>(tensor, grads, 0, kFloat32);
  float row[kStats] = {};
  Pivots pivots{};
  const int begin = kQuad * static_cast<int>(threadIdx.x);
  // The lanes of a warp stay together for a state of 8 bits, whose blocks they share.
  const int ahead = kState == kInt8 ? kQuad * lane_index() : 0;
  for (int i = begin; i - ahead < chunk.count; i += kQuad * kThreads) {
    const Quad quad = quad_at(chunk, i, wide);
    QuadValues<Features> values;
    load_values<kState>(tensor, grads, quad, values);
    accumulate_quad<kState>(params, tensor, grads, limit, words, quad, i == begin, values, pivots, row);
  }
  finish_row<Features>(parameters_of_thread(chunk.count, static_cast<int>(threadIdx.x)), pivots, row);

#pragma unroll
  for (int c = 0; c < kStats; ++c) rows[c][threadIdx.x] = row[c];
  __syncthreads();
  stats_of_chunk<Features>(params, chunk, tensor, rows);
  if (last_of_tensor(params.finished + chunk.tensor, chunk.of_tensor)) stats_of_tensor<Features>(params, chunk, tensor);
}

}  // namespace

#if LOPT_WITH_LAUNCHERS
template <class Features, Dtype kState>
void launch_accumulate(const AccumulateParams& params, const Target& target) {
  launch_per_chunk("accumulate", accumulate_kernel<kState, Features>, params, target);
}
LOPT_INSTANTIATE(void, launch_accumulate, const AccumulateParams&, const Target&)
#endif

}  // namespace lopt
