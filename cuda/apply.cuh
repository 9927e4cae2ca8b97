// What the kernels share that apply the MLP: the rule of one tensor in shared memory, and the reduction of the hidden units.
#pragma once

#include <type_traits>

#include "chunks.cuh"
#include "reduce.cuh"

namespace lopt {

// Copies count values with all threads of the block.
__device__ __forceinline__ void copy_block(float* to, const float* from, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) to[i] = from[i];
}

// How the parameters of one tensor move: column map and MLP.
template <class Features, int kWidth>
struct Rule {
  static constexpr int kColumns = Features::kNumColumns;
  using Layout = MlpLayout<kColumns, kWidth>;
  alignas(16) float weights[Layout::kSize];
  alignas(16) float bias[kWidth];
  alignas(16) float scale[kColumns];
  alignas(16) float shift[kColumns];

  // By all threads of the block, which meet afterwards.
  __device__ __forceinline__ void load(const ApplyParams& params, const TensorEntry& tensor) {
    copy_block(weights, params.weights + tensor.theta * Layout::kSize, Layout::kSize);
    const TensorInputs inputs(inputs_of(params), tensor.row, kColumns, kWidth, false);
    copy_block(bias, inputs.bias, kWidth);
    copy_block(scale, inputs.scale, kColumns);
    copy_block(shift, inputs.shift, kColumns);
  }

  // x = clamp(columns(grad, param, mom, rms) * scale + shift, +-feature_clip), the columns as numbers of type V.
  template <class V = float>
  __device__ __forceinline__ void columns(float grad, float param, const float* mom, const float* rms,
                                          float feature_clip, float* x) const {
    if constexpr (std::is_same_v<V, float>) {
      Features::columns(grad, param, mom, rms, x);
    } else {
      V m[Features::kNumMom], r[Features::kNumRms], raw[kColumns];
#pragma unroll
      for (int k = 0; k < Features::kNumMom; ++k) m[k] = mom[k];
#pragma unroll
      for (int k = 0; k < Features::kNumRms; ++k) r[k] = rms[k];
      Features::columns(V{grad}, V{param}, m, r, raw);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) x[c] = raw[c].value;
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      x[c] = c < Features::kFirstShifted ? x[c] * scale[c] : x[c] * scale[c] + shift[c];
    if (feature_clip <= kLargestFloat) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) x[c] = clamp_of(x[c], feature_clip);
    }
  }

  // With the bias of the direction.
  __device__ __forceinline__ float skip(const float* x) const {
    float sum = weights[Layout::kB3];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) sum += x[c] * weights[Layout::kSkip + c];
    return sum;
  }
};

// What else there is of a tensor. The rule has copies of what `inputs` points to. Written is the parameter, or the
// direction of a matrix that is treated as a whole.
struct Operands {
  TensorEntry tensor;
  int64_t grads;
  TensorInputs inputs;
  int64_t written;
  int32_t written_dtype;

  template <Dtype kState>
  __device__ __forceinline__ Wide wide() const {
    return wide_operands<kState>(tensor, grads, written, written_dtype);
  }
};

__device__ __forceinline__ Operands operands_of(const ApplyParams& params, int64_t t) {
  const TensorEntry tensor = params.tensors[t];
  const bool whole = is_whole(params, tensor);
  return {tensor, params.grads[t], TensorInputs(inputs_of(params), tensor.row, 0, 0, whole),
          whole ? tensor.direction : tensor.param, whole ? direction_dtype(params.state_dtype) : tensor.param_dtype};
}

// The new value of one parameter in plain float, the oracle of the faster ones; writes its last hidden layer to `hidden`.
template <class Features, int kWidth>
__device__ __forceinline__ float next_of_one(const ApplyParams& params, const Rule<Features, kWidth>& rule,
                                             const Operands& operands, float grad, float param, const float* mom,
                                             const float* rms, float (&hidden)[kWidth]) {
  float x[Features::kNumColumns];
  rule.columns(grad, param, mom, rms, params.feature_clip, x);
  const MlpOutput<float> out = small_mlp<Features::kNumColumns, kWidth>(x, rule.weights, rule.bias, hidden);
  return next_param(param, out, operands.inputs, Features::active(rms), params.magnitude_rate);
}

// The same in memory.
template <Dtype kState, class Features, int kWidth>
__device__ __forceinline__ void apply_one(const ApplyParams& params, const Rule<Features, kWidth>& rule,
                                          const Operands& operands, int64_t at, float (&hidden)[kWidth]) {
  const TensorEntry& tensor = operands.tensor;
  const float param = load_value(tensor.param, tensor.param_dtype, at);
  const float grad = clip_gradient(load_value(operands.grads, tensor.grad_dtype, at), operands.inputs.clip_limit);
  float mom[Features::kNumMom], rms[Features::kNumRms];
  const auto mom_planes = mom_of<kState, Features>(tensor);
  const auto rms_planes = rms_of<kState, Features>(tensor);
#pragma unroll
  for (int k = 0; k < Features::kNumMom; ++k) mom[k] = mom_planes.value(k, at);
#pragma unroll
  for (int k = 0; k < Features::kNumRms; ++k) rms[k] = rms_planes.value(k, at);
  const float next = next_of_one(params, rule, operands, grad, param, mom, rms, hidden);
  if (operands.inputs.moves()) store_value(operands.written, operands.written_dtype, at, next);
}

// Sums of hidden units, kRows per unit in shared memory -> the chunk's partials. After a barrier.
template <int kWidth, int kRows>
__device__ __forceinline__ void hidden_of_chunk(const ApplyParams& params, const ChunkRange& chunk,
                                                const TensorEntry& tensor, const float (&rows)[kWidth][kRows]) {
  const Partials<kWidth> partials(params.partials, tensor, chunk);
  for (int j = warp_index(); j < kWidth; j += kWarps) {
    const double sum = sum_rows(kRows, [&](int64_t row) -> double { return rows[j][row]; });
    if (lane_index() == 0) partials.own(j) = sum;
  }
}

// Partials of its chunks -> the tensor's mean, by the last of its blocks.
template <int kWidth>
__device__ __forceinline__ void hidden_of_tensor(const ApplyParams& params, const ChunkRange& chunk,
                                                 const TensorEntry& tensor) {
  const Partials<kWidth> partials(params.partials, tensor, chunk);
  for (int j = warp_index(); j < kWidth; j += kWarps) {
    const double sum = sum_rows(chunk.of_tensor, [&](int64_t r) { return partials.at(j, r); });
    if (lane_index() == 0)
      params.hidden[tensor.row * kWidth + j] = static_cast<float>(sum / static_cast<double>(tensor.numel));
  }
}

template <int kWidth, int kRows>
__device__ __forceinline__ void reduce_hidden(const ApplyParams& params, const ChunkRange& chunk,
                                              const TensorEntry& tensor, const float (&rows)[kWidth][kRows]) {
  __syncthreads();
  hidden_of_chunk(params, chunk, tensor, rows);
  if (last_of_tensor(params.finished + chunk.tensor, chunk.of_tensor)) hidden_of_tensor<kWidth>(params, chunk, tensor);
}

}  // namespace lopt
