// apply on the GPU: for every parameter
//   x      = clamp(columns(grad, param, mom, rms) * scale + shift, +-feature_clip)
//   o, h   = small_mlp(x)
//   param  = keep * param - step_size * o.direction * exp(magnitude_rate * o.magnitude)
// and per tensor the mean of the last hidden layer h. One block per chunk, one thread per parameter and round; the
// weights of the MLP lie in shared memory. Source: arXiv:2009.11243. See Note [Order of reduction].
#include "chunks.cuh"
#include "reduce.cuh"

namespace lopt {
namespace {

// Copies count values with all threads of the block.
__device__ __forceinline__ void copy_block(float* to, const float* from, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) to[i] = from[i];
}

// Three blocks per multiprocessor leave 168 registers: with less, some compilers spill.
template <class Features, int kWidth>
__global__ void __launch_bounds__(kThreads, 3) apply_kernel(ApplyParams params) {
  constexpr int kColumns = Features::kNumColumns;
  constexpr int kWeights = MlpLayout<kColumns, kWidth>::kSize;
  alignas(16) __shared__ float weights[kWeights];
  alignas(16) __shared__ float bias[kWidth];
  __shared__ float scale[kColumns], shift[kColumns];
  __shared__ float rows[kWidth][kThreads];  // one row of hidden sums per thread, transposed: registers are dearer

  const ChunkRange chunk = chunk_of_block(params.tensors, params.chunks);
  const TensorEntry tensor = params.tensors[chunk.tensor];
  const int64_t grads = params.grads[chunk.tensor];
  const float limit = params.clip_limit[chunk.tensor], keep = params.keep[chunk.tensor];
  const float step_size = params.step_size[chunk.tensor];
  const bool moves = step_size != 0.0f || keep != 1.0f;  // lr = 0 changes no bit
  copy_block(weights, params.weights + tensor.theta * kWeights, kWeights);
  copy_block(bias, params.bias + chunk.tensor * kWidth, kWidth);
  copy_block(scale, params.scale + chunk.tensor * kColumns, kColumns);
  copy_block(shift, params.shift + chunk.tensor * kColumns, kColumns);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) rows[j][threadIdx.x] = 0.0f;
  __syncthreads();

  for (int i = static_cast<int>(threadIdx.x); i < chunk.count; i += kThreads) {
    const int64_t at = chunk.begin + i;
    const float* mom_at = reinterpret_cast<const float*>(tensor.mom) + at;
    const float* rms_at = reinterpret_cast<const float*>(tensor.rms) + at;
    const float param = load_value(tensor.param, tensor.param_dtype, at);
    const float grad = clip_gradient(load_value(grads, tensor.grad_dtype, at), limit);
    float mom[Features::kNumMom], rms[Features::kNumRms];
#pragma unroll
    for (int k = 0; k < Features::kNumMom; ++k) mom[k] = mom_at[k * tensor.stride];
#pragma unroll
    for (int k = 0; k < Features::kNumRms; ++k) rms[k] = rms_at[k * tensor.stride];

    float x[kColumns], hidden[kWidth];
    Features::columns(grad, param, mom, rms, x);
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      x[c] = clamp_of(x[c] * scale[c] + shift[c], -params.feature_clip, params.feature_clip);
    const MlpOutput<float> out = small_mlp<kColumns, kWidth>(x, weights, bias, hidden);
    if (moves)
      store_value(tensor.param, tensor.param_dtype, at, next_param(param, out, keep, step_size, params.magnitude_rate));
#pragma unroll
    for (int j = 0; j < kWidth; ++j) rows[j][threadIdx.x] += hidden[j];
  }

  // Threads -> chunk.
  __syncthreads();
  for (int j = warp_index(); j < kWidth; j += kWarps) {
    const double sum = sum_rows(kThreads, [&](int64_t thread) -> double { return rows[j][thread]; });
    if (lane_index() == 0) params.partials[int64_t{blockIdx.x} * kWidth + j] = sum;
  }
  if (!last_of_tensor(params.finished + chunk.tensor, chunk.of_tensor)) return;

  // Chunks -> tensor.
  const double* partials = params.partials + tensor.first_chunk * kWidth;  // [chunks of the tensor, kWidth]
  for (int j = warp_index(); j < kWidth; j += kWarps) {
    const double sum = sum_rows(chunk.of_tensor, [&](int64_t r) { return partials[r * kWidth + j]; });
    if (lane_index() == 0)
      params.hidden[chunk.tensor * kWidth + j] = static_cast<float>(sum / static_cast<double>(tensor.numel));
  }
}

}  // namespace

bool apply_cuda(const ApplyParams& params, int feature_set, int width, int device, uint64_t stream) {
  return with_kernel(feature_set, width, [&](auto features, auto width_constant) {
    launch_per_chunk("apply", apply_kernel<decltype(features), decltype(width_constant)::value>, params, device,
                     stream);
  });
}

}  // namespace lopt
